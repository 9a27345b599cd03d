"""Reasons to stop."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mvar.config import EngineConfig, Phase
from mvar.run import stopping
from mvar.run.stopping import StopRequests, Watchdog


def test_signals_ask_to_stop_and_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with StopRequests(tmp_path / "STOP", 0, {}) as stops:
            assert stops.reason is None
            os.kill(os.getpid(), number)
            assert stops.reason == f"got {number.name}"
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_process_looks_for_the_stop_file_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [1000.0], []
    stops = StopRequests(tmp_path / "STOP", 0, {}, clock=lambda: now[0])
    other = StopRequests(tmp_path / "STOP", 0, {}, clock=lambda: now[0], looks=False)
    exists: Any = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: looks.append(path) or exists(path))
    for _ in range(100):
        assert stops.reason is None and other.reason is None
        now[0] += 0.0375  # 100 steps in 3.75 s.
    assert looks == [tmp_path / "STOP"] * 4
    (tmp_path / "STOP").touch()
    now[0] += 1
    assert stops.reason is not None and "STOP exists" in stops.reason
    assert other.reason is None and len(looks) == 5


@dataclass
class Hound:
    """Python's faulthandler, as far as a watchdog uses it; it never bites."""

    limit_s: float | None = None

    def dump_traceback_later(self, limit_s: float, **_: Any) -> None:
        self.limit_s = limit_s

    def cancel_dump_traceback_later(self) -> None:
        self.limit_s = None


def test_each_phase_has_its_limit_and_0_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hound = Hound()
    monkeypatch.setattr(stopping, "faulthandler", hound)
    engine = EngineConfig(watchdog_s=100, watchdog_start_s=7, watchdog_validate_s=0)
    with Watchdog(engine.limits_s()) as watchdog:
        assert hound.limit_s == 7
        for phase, limit_s in (("step", 100), ("save", 100), ("validate", None), ("start", 7)):
            watchdog.feed(phase)  # type: ignore[arg-type]
            assert hound.limit_s == limit_s
    assert hound.limit_s is None


def test_last_words_come_before_the_bite_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "faulthandler", Hound())
    said = threading.Event()
    limits_s: dict[Phase, float] = {"start": 10_000, "step": 0.05, "validate": 0, "save": 0}
    with Watchdog(limits_s, said.set) as watchdog:
        watchdog.feed("save")
        assert not said.wait(0.2)
        watchdog.feed("step")
        assert said.wait(30)
    said.clear()
    with Watchdog(limits_s, said.set):
        pass
    assert not said.wait(0.1)


def test_the_end_of_a_slurm_job_comes_early_enough_to_save(tmp_path: Path) -> None:
    now = time.time()
    environ = {"SLURM_JOB_END_TIME": str(int(now) + 1000)}
    stops = StopRequests(tmp_path / "STOP", 300, environ, clock=lambda: now)
    assert stops.reason is None
    now += 701
    assert stops.reason == "the job's time is nearly over"


@pytest.mark.parametrize(
    ("environ", "ends"), [({"TORCHELASTIC_RUN_ID": "x"}, True), ({"CROSS_RANK": "0"}, True), ({}, False)]
)
def test_a_process_whose_launcher_died_asks_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], ends: bool
) -> None:
    """Under torchrun and the deepspeed launcher. One that a shell started in the background outlives it as ever."""
    parent = [4711]
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    stops = StopRequests(tmp_path / "STOP", 0, environ)
    assert stops.reason is None
    parent[0] = 1
    assert (stops.reason is not None and "launcher" in stops.reason) == ends
