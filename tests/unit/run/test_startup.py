"""Where a start's time went is told once, when its first step is done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mvar.run import startup, stopping
from mvar.run.history import History
from mvar.run.startup import Startup, process_age_s
from mvar.run.stopping import Watchdog
from mvar.run.tracking import Stopwatch


def test_parts_last_from_the_process_s_beginning_to_the_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, fed = [1000.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(startup, "process_age_s", lambda: 4.5)
    monkeypatch.setattr(stopping.Watchdog, "feed", lambda _, phase: fed.append(phase))
    timed = Startup(Watchdog({"start": 0, "step": 0, "validate": 0, "save": 0}))
    now[0] += 2
    timed.passed("weights")
    watch = Stopwatch()
    now[0] += 3
    watch.stop()
    now[0] += 5  # The next step, which is under way when the first one is read.
    assert [timed.stepped(watch), timed.stepped(watch)] == [True, False]
    assert timed.parts_s == {startup.IMPORTS: 4.5, "weights": 2, startup.STEP: 3}
    assert fed == ["start", "start"]

    history = History(tmp_path)
    with history.recording(world=1):
        history.going_on(7)
        history.first_step(8, timed.parts_s)
    (record,) = [e for e in map(json.loads, history.path.read_text().splitlines()) if e["event"] == "first_step"]
    assert (record["step"], sum(record["seconds"].values())) == (8, 9.5)
    assert history.starts()[0].begin_step == 7


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells when a process began")
def test_a_process_knows_its_age() -> None:
    slow = "import time; time.sleep(0.3); from mvar.run.startup import process_age_s; print(process_age_s())"
    before = time.monotonic()
    told = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True, check=True).stdout
    assert 0.3 <= float(told) <= time.monotonic() - before + 0.02
    assert process_age_s() > 0
