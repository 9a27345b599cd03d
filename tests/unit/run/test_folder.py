"""Run folders."""

import os
from pathlib import Path

import pytest

from mvar.errors import CheckpointError, TrainingError
from mvar.run import folder
from mvar.run.folder import RunFolder


def test_finished_says_at_which_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.finished_at() == (-1, -1)
    run.finish(12, 96)
    assert run.finished_at() == (12, 96)
    run.finished.write_text("torn")
    with pytest.raises(TrainingError, match="FINISHED"):
        run.finished_at()


def test_a_claimed_folder_names_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "CLAIM_PATIENCE_S", 0.1)
    first, second = RunFolder(tmp_path / "new" / "run"), RunFolder(tmp_path / "new" / "run")
    with first.claimed(90), pytest.raises(TrainingError, match=f"process {os.getpid()} on"), second.claimed(90):
        pass
    with second.claimed(90):
        pass


def test_claiming_tidies_up_after_killed_processes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in (".tmp-step-000000005", ".trash-step-000000003", "step-000000004"):
        (run.checkpoints / name).mkdir(parents=True)
    with run.claimed(90):
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000004"]


def test_a_run_that_once_saved_never_begins_again_silently(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.require_no_history()
    run.metrics.write_text('{"kind": "train", "step": 3, "samples": 3}\n')
    run.require_no_history()  # Killed before its first checkpoint: nothing is lost by doing it again.
    run.metrics.write_text('{"kind": "checkpoint", "step": 3, "samples": 3}\n')
    with pytest.raises(CheckpointError, match="--from-scratch"):
        run.require_no_history()
    run.metrics.unlink()
    (run.checkpoints / "step-000000004.damaged").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"step-000000004\.damaged"):
        run.require_no_history()


def test_from_scratch_moves_everything_aside_and_keeps_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.set_aside() is None
    for number in (1, 2):
        run.metrics.write_text(f"{number}")
        run.checkpoints.mkdir()
        assert run.set_aside() == tmp_path / f"before-from-scratch-{number}"
        assert not run.metrics.exists() and not run.checkpoints.exists()
    assert (tmp_path / "before-from-scratch-1" / "metrics.jsonl").read_text() == "1"
