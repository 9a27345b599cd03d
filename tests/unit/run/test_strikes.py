"""What speaks against machines: written whole, read past what is torn, and no reason to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvar.run import strikes

CASE = {"step": 3, "rank": 1, "node": "n2", "device": "cuda:0", "what": "stays behind", "evidence": "2 s, usually 1 s"}


def test_a_strike_is_kept_with_its_job_and_said(
    tmp_path: Path, voice: None, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"}
    made = strikes.note(tmp_path, **CASE, environ=environ)  # type: ignore[arg-type]
    with (tmp_path / strikes.NAME).open("a") as file:
        file.write('{"time": 3, "unknown": 1}\n{"ti')
    assert strikes.read(tmp_path) == [made]
    assert (made.job, made.restarts, made.out) == ("7_2", 1, False)
    assert "n2: rank 1 (cuda:0) at step 3: stays behind: 2 s, usually 1 s" in capsys.readouterr().err


def test_a_disk_that_is_full_ends_nothing(tmp_path: Path) -> None:
    strikes.note(tmp_path / "no such folder", **CASE, environ={})  # type: ignore[arg-type]
    assert strikes.read(tmp_path / "no such folder") == []


def test_a_node_is_called_as_slurm_calls_it() -> None:
    assert strikes.node_name({"SLURMD_NODENAME": "gpu007"}) == "gpu007"
    assert strikes.node_name({})
