"""Reasons to stop."""

import os
import signal
import time
from pathlib import Path

from mvar.run.stopping import StopRequests


def test_signals_ask_to_stop_and_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with StopRequests(tmp_path / "STOP", 0, {}) as stops:
            assert stops.reason is None
            os.kill(os.getpid(), number)
            assert stops.reason == f"got {number.name}"
    assert signal.getsignal(signal.SIGTERM) is before


def test_stop_file(tmp_path: Path) -> None:
    stops = StopRequests(tmp_path / "STOP", 0, {})
    assert stops.reason is None
    (tmp_path / "STOP").touch()
    assert stops.reason is not None and "STOP exists" in stops.reason


def test_the_end_of_a_slurm_job_comes_early_enough_to_save(tmp_path: Path) -> None:
    now = time.time()
    environ = {"SLURM_JOB_END_TIME": str(int(now) + 1000)}
    stops = StopRequests(tmp_path / "STOP", 300, environ, clock=lambda: now)
    assert stops.reason is None
    now += 701
    assert stops.reason == "the job's time is nearly over"
