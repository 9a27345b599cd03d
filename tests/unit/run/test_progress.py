"""What long work says of itself."""

import logging

import pytest

from mvar.run import progress
from mvar.run.progress import ProgressLine


@pytest.fixture
def now(monkeypatch):
    """A clock that tests turn."""
    hands = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: hands[0])
    return hands


def test_a_line_comes_every_few_seconds_and_at_the_end(now, caplog):
    caplog.set_level(logging.INFO, "mvar")
    line = ProgressLine("samples", 5000, "pictures", every_s=10)
    for _ in range(5):
        now[0] += 4
        line.add(1000, "   all well")
    assert caplog.messages == [
        "samples: 3,000/5,000 pictures   250/s   all well   0:00:08 left",
        "samples: 5,000/5,000 pictures   250/s   all well   0:00:00 left",
    ]


def test_where_nobody_knows_the_total_no_time_is_left(now, caplog):
    caplog.set_level(logging.INFO, "mvar")
    line = ProgressLine("task 0/2", None, every_s=1)
    now[0] += 7
    line.restart()
    now[0] += 2
    line.add(3)
    assert caplog.messages == ["task 0/2: 3 images   1.5/s"]
