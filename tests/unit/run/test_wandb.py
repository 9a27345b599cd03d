"""Weights & Biases: nothing is dropped after a rollback, WANDB_MODE is heard, old clients are named.

With a stand-in that keeps wandb's rule for steps, and with the real client's offline mode.
"""

from __future__ import annotations

import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mvar.config import TrackingConfig, TrainConfig
from mvar.run.tracking import Tracker
from tests.unit.run.test_tracking import TRAIN, tracker

T = TypeVar("T")


class StandIn(types.ModuleType):
    """wandb, as far as we use it: its step never goes down, and what comes with a lower one is lost."""

    def __init__(self, version: str = "0.31.0") -> None:
        super().__init__("wandb")
        self.__version__ = version
        self.rows: list[dict[str, Any]] = []
        self.modes: list[str] = []
        self.axes: dict[str, str | None] = {}
        self.step = -1

    def init(self, *, mode: str, **_: Any) -> StandIn:
        self.modes.append(mode)
        return self

    def Settings(self, **_: Any) -> None: ...

    def Image(self, path: str) -> str:
        return path

    def define_metric(self, name: str, step_metric: str | None = None, **_: Any) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        step = self.step + 1 if step is None else step
        if step >= self.step:
            self.rows.append(row)
            self.step = step

    def finish(self) -> None: ...


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    def put(version: str = "0.31.0") -> StandIn:
        module = StandIn(version)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    monkeypatch.delenv("WANDB_MODE", raising=False)
    return put


def test_steps_after_a_rollback_are_not_dropped(tmp_path: Path, stand_in: Callable[..., StandIn]) -> None:
    wandb = stand_in()
    with tracker(tmp_path, wandb="online") as track:
        for step in range(1, 9):
            track.write("train", step, **(TRAIN | {"loss": 100.0 + step}))
    with tracker(tmp_path, resumed_step=4, wandb="online") as track:  # In the same process, on the same run.
        for step in range(5, 9):
            track.write("train", step, **(TRAIN | {"loss": 200.0 + step}))
            track.write("val", step, loss=300.0 + step, accuracy=0.5)
    losses = {
        name: [(row["step"], row[name]) for row in wandb.rows if name in row] for name in ("train/loss", "val/loss")
    }
    assert losses["train/loss"] == [(2, 102), (4, 104), (6, 106), (8, 108), (6, 206), (8, 208)]
    assert losses["val/loss"] == [(step, 300 + step) for step in range(5, 9)]
    assert wandb.axes == {"step": None, "*": "step"}


@pytest.mark.parametrize(
    ("asked", "said", "mode"),
    [
        (None, "online", "online"),
        (None, "disabled", None),
        (None, "dryrun", "offline"),
        (None, "run", "online"),
        (None, "", "offline"),
        (None, None, "offline"),
        ("online", "offline", "online"),
        ("disabled", "online", None),
    ],
)
def test_wandb_mode_of_the_environment_is_heard_unless_the_configuration_says(
    tmp_path: Path,
    stand_in: Callable[..., StandIn],
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    said: str | None,
    mode: str | None,
) -> None:
    wandb = stand_in()
    if said is not None:
        monkeypatch.setenv("WANDB_MODE", said)
    tracking: dict[str, Any] = {} if asked is None else {"wandb": asked}
    config = TrainConfig.model_validate({"run": "r", "data": {"store": "s"}, "tracking": tracking})
    with Tracker(
        tmp_path,
        config.tracking,
        is_main=True,
        resumed_step=0,
        samples_at=int,
        settings={},
        lines=lambda _: None,
    ):
        pass
    assert wandb.modes == ([] if mode is None else [mode])


def test_two_words_on_the_mode_are_told(
    tmp_path: Path,
    stand_in: Callable[..., StandIn],
    monkeypatch: pytest.MonkeyPatch,
    voice: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in()
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracker(tmp_path, wandb="online"):
        pass
    assert "tracking.wandb=online is taken, and not WANDB_MODE=offline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "old"), [("0.18.7", True), ("0.30.0", True), ("0.31.0", False), ("1.0.0rc1", False)]
)
def test_a_client_whose_offline_segments_replace_each_other_is_named(
    tmp_path: Path,
    stand_in: Callable[..., StandIn],
    voice: None,
    capsys: pytest.CaptureFixture[str],
    version: str,
    old: bool,
) -> None:
    stand_in(version)
    for resumed in (0, 4):
        with tracker(tmp_path, resumed_step=resumed, wandb="offline"):
            pass
        said = f"wandb {version}: the offline segments" in capsys.readouterr().err
        assert said == (old and resumed > 0)


def test_the_real_client_keeps_a_run_over_a_rollback_and_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # Whatever run of this process another test has left open would be taken for the first of these.
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    for resumed, last in ((0, 8), (4, 6), (6, 10)):
        with tracker(folder, resumed_step=resumed, wandb="offline") as track:
            for step in range(resumed + 1, last + 1):
                track.write("train", step, **(TRAIN | {"loss": float(100 * resumed + step)}))
        time.sleep(1.1)  # The client names segments by the second.
    # The client's own process writes them, and may not have begun when the run has ended.
    segments = eventually(
        lambda: sorted((folder / "wandb").glob("offline-run-*/*.wandb")), lambda found: len(found) == 3
    )
    kept = [rows_and_axes(path) for path in segments]
    assert [[(row["step"], row["train/loss"]) for row in rows] for rows, _, _ in kept] == [
        [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0)],
        [(6, 406.0)],
        [(8, 608.0), (10, 610.0)],
    ]
    assert all(("*", "step") in axes for _, axes, _ in kept)
    assert len({run_id for *_, run_id in kept}) == 1


def eventually(look: Callable[[], T], enough: Callable[[T], bool]) -> T:
    """What `look` finds once it is enough. A client that never writes it fails the test instead of hanging it."""
    for _ in range(1200):
        if enough(found := look()):
            return found
        time.sleep(0.05)
    raise AssertionError(f"after a minute there is still only {found}")


def rows_and_axes(path: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]], str]:
    """What a segment holds: its rows, (metric, its axis), and the id of its run."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    rows, axes, run_id = [], [], ""
    # The client's own process writes, and is not done when it says so.
    for data in eventually(lambda: _records(path.read_bytes()), lambda records: bool(records) and _is_end(records[-1])):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run_id = record.run.run_id
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(row)
        if record.HasField("metric") and record.metric.step_metric:
            axes.append((record.metric.glob_name or record.metric.name, record.metric.step_metric))
    return rows, axes, run_id


def _is_end(data: bytes) -> bool:
    from wandb.proto.wandb_internal_pb2 import Record

    record = Record()
    record.ParseFromString(data)
    return bool(record.HasField("exit") or record.HasField("footer"))


def _records(data: bytes) -> list[bytes]:
    """LevelDB's log: blocks of 32 KiB, in them pieces with checksum, length and type (whole, first, middle, last)."""
    found, place, parts = [], 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(parts)
            parts = b""
    return found


def test_the_floor_of_the_version_is_the_one_that_the_docs_name() -> None:
    from mvar.run.tracking import STITCHES_OFFLINE

    floor = ".".join(map(str, STITCHES_OFFLINE))
    root = Path(__file__).resolve().parents[3]
    assert f'"wandb>={floor}"' in (root / "pyproject.toml").read_text()
    assert f"wandb {floor}" in (root / "docs" / "train.md").read_text()
    assert TrackingConfig().wandb is None
