"""metrics.jsonl has every step once; nothing that only watches can stop a training."""

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mvar.config import TrackingConfig
from mvar.errors import WriteError
from mvar.run import tracking
from mvar.run.tracking import Guarded, JsonLines, Tracker, cut_after, flat
from mvar.training.console import TransformerLines

TRAIN: dict[str, Any] = {
    "loss": 1 / 3,
    "loss_per_scale": [0.1, float("nan")],
    "accuracy": 0.25,
    "accuracy_per_scale": [0.5, 0.0],
    "grad_norm": None,
    "lr": 1e-4,
    "weight_decay": 0.05,
    "skipped": False,
    "imgs_per_s": 8.0,
    "step_s": 0.5,
    "wait_s": 0.05,
    "memory_gib": 1.5,
}


def tracker(folder: Path, resumed_step: int = 0, *, is_main: bool = True, **changes: Any) -> Tracker:
    return Tracker(
        folder,
        TrackingConfig(**({"log_every": 2, "wandb": "disabled"} | changes)),
        is_main=is_main,
        resumed_step=resumed_step,
        samples_at=lambda step: 4 * step,
        settings={"seed": 1},
        lines=TransformerLines(2, 10),
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_are_complete_exact_and_valid_json(tmp_path: Path) -> None:
    with tracker(tmp_path) as track:
        track.write("train", 1, **TRAIN)
        assert lines(tmp_path) == [
            {"kind": "train", "step": 1, "samples": 4} | TRAIN | {"loss_per_scale": [0.1, None]}
        ], "must be readable before the file is closed"
    assert lines(tmp_path)[0]["loss"] == 1 / 3


def test_resuming_leaves_every_step_once(tmp_path: Path) -> None:
    with tracker(tmp_path) as track:
        for step in range(1, 6):
            track.write("train", step, **TRAIN)
        track.write("val", 4, loss=1.0, accuracy=0.1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "los')  # Killed while writing.
    with tracker(tmp_path, resumed_step=3) as track:
        for step in range(4, 7):
            track.write("train", step, **TRAIN)
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_torn_line_that_ends_in_the_right_step_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnot json\n{"kind": "train", "step": 2}')
    cut_after(path, 2)
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_only_rank_0_writes(tmp_path: Path, voice: None, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, is_main=False) as track:
        track.write("train", 2, **TRAIN)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert capsys.readouterr().out == ""


def test_console_lines_are_aligned_and_have_the_means(
    tmp_path: Path, voice: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracker(tmp_path) as track:
        for step in range(1, 11):
            track.write("train", step, **(TRAIN | {"loss": float(step), "loss_per_scale": [1.0, 2.0]}))
        track.write("val", 10, loss=3.0, accuracy=0.5)
        track.write("sample", 10, file="samples/x.png")
    *steps, validation, sample = capsys.readouterr().out.splitlines()
    assert len(steps) == 5 and len({len(line) for line in steps}) == 1
    assert "step  2/10" in steps[0] and "loss  1.5000" in steps[0] and "last  2.0000" in steps[0]
    assert "img/s     8.0" in steps[0] and "wait 10.0%" in steps[0] and "eta 0:00:04" in steps[0]
    assert "validation loss  3.0000" in validation and "samples/x.png" in sample


def test_a_skipped_step_is_shown_at_once(tmp_path: Path, voice: None, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, log_every=5) as track:
        track.write("train", 1, **(TRAIN | {"skipped": True, "loss": float("nan"), "bad_samples": [3, 9]}))
    assert "SKIPPED bad samples [3, 9]" in capsys.readouterr().out
    assert lines(tmp_path)[0]["loss"] is None


def test_wandb_keeps_one_run_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resumed in (0, 2):
        with tracker(tmp_path, resumed, wandb="offline") as track:
            track.write("train", resumed + 2, **TRAIN)
            assert any(isinstance(sink, Guarded) and sink._sink is not None for sink in track._sinks)
        ids.append((tmp_path / "wandb-id").read_text())
    assert ids[0] == ids[1]
    folders = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    # wandb numbers the second of two starts within a second.
    assert folders and all(re.fullmatch(rf"offline-run-\d+_\d+-{ids[0]}(-\d+)?", name) for name in folders)


def test_a_failing_sink_never_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, voice: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(tracking, "WeightsAndBiases", explode)
    with tracker(tmp_path, wandb="online") as track:
        track.write("train", 1, **TRAIN)
        track.write("train", 2, **TRAIN)
    assert len(lines(tmp_path)) == 2
    assert capsys.readouterr().err.count("wandb failed and is off from here: no network") == 1


def test_tensorboard_gets_numbers(tmp_path: Path) -> None:
    with tracker(tmp_path, tensorboard=True) as track:
        track.write("train", 2, **TRAIN)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss_per_scale/01")] == [
        (2, pytest.approx(0.1))
    ]


def test_flat_names() -> None:
    numbers = flat({"kind": "val", "step": 3, "loss": 2.0, "loss_per_scale": [1.0, None], "file": "x"})
    assert numbers == {"val/loss": 2.0, "val/loss_per_scale/01": 1.0}


class FullDisk:
    """A file on a disk that takes so many bytes and no more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(data[: self.room])
        self.room -= taken
        return int(taken)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_records_wait_for_room_on_a_full_disk_and_none_is_torn_or_doubled(
    tmp_path: Path, voice: None, capsys: pytest.CaptureFixture[str]
) -> None:
    records = JsonLines(tmp_path / "metrics.jsonl", 0)
    disk = FullDisk(records._file, 40)
    records._file = disk  # type: ignore[assignment]
    for step in range(1, 6):
        records.write({"kind": "train", "step": step})
    assert capsys.readouterr().err.count("No space left on device; records wait.") == 1
    assert [line["step"] for line in lines(tmp_path)] == [1]
    with pytest.raises(WriteError, match=r"metrics\.jsonl: cannot be written \(No space"):
        records.sync()
    disk.room = 10_000
    records.write({"kind": "train", "step": 6})
    records.sync()
    records.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
