"""Run folders."""

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from mvar.errors import CheckpointError, TrainingError
from mvar.run import folder
from mvar.run.claims import Claims
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


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_restart_waits_until_the_dead_process_is_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain's next job, on the same host, within the time of a takeover: no error, or the chain would end."""
    no_locks(monkeypatch)
    monkeypatch.setattr(folder, "CLAIM_PATIENCE_S", 0.0)
    run = RunFolder(tmp_path)
    Claims(tmp_path).take("run")  # Nobody keeps it alive.
    begin_s = time.monotonic()
    with run.claimed(0.6) as ours:
        assert ours() and time.monotonic() - begin_s >= 0.5


def test_without_locks_a_living_process_is_known_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_locks(monkeypatch)
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.claimed(9) as ours, pytest.raises(TrainingError, match="is training in it"), second.claimed(9):
        pass
    assert ours  # Its own claim was never touched.


def test_nothing_is_tidied_up_by_who_lost_the_claim_right_after_taking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one took the claim away before this one wrote anything: it must not remove the other's work."""
    run = RunFolder(tmp_path)
    half = run.checkpoints / ".tmp-step-000000005"
    half.mkdir(parents=True)
    monkeypatch.setattr(folder, "CLAIM_PATIENCE_S", 0.1)
    take = Claims.take
    other = Claims(tmp_path)

    def robbed(claims: Claims, name: str) -> bool:
        taken = take(claims, name)
        if taken and claims is not other and not half.with_name("robbed").exists():
            half.with_name("robbed").touch()
            (tmp_path / ".run.claim").unlink()
            assert take(other, name)
        return taken

    monkeypatch.setattr(Claims, "take", robbed)
    with pytest.raises(TrainingError, match="is training in it"), run.claimed(90):
        pass
    assert half.is_dir() and other.holds("run")


def test_claiming_tidies_up_after_killed_processes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in (".tmp-step-000000005", ".trash-step-000000003", "step-000000004"):
        (run.checkpoints / name).mkdir(parents=True)
    with run.claimed(90):
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000004"]


def test_a_start_does_not_fail_by_what_nfs_keeps_of_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of the killed job is still about, with a file of a half-written checkpoint open."""
    run = RunFolder(tmp_path)
    kept = run.checkpoints / ".tmp-step-000000005" / ".nfs0001"
    kept.parent.mkdir(parents=True)
    for path in (kept, kept.with_name("rank-00000.safetensors")):
        path.touch()
    unlink = os.unlink

    def busy(path: str, *, dir_fd: int | None = None) -> None:
        if os.path.basename(path) == kept.name:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        unlink(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        with run.claimed(90):
            assert [path.name for path in kept.parent.iterdir()] == [kept.name]
            run.require_no_history()  # It is no checkpoint that was lost.
    with run.claimed(90):
        assert not kept.parent.exists()


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
