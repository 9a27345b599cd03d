"""A task's account of its time."""

import logging

import pytest

from data_prep import progress
from data_prep.progress import TokenizeProgress


@pytest.fixture
def now(monkeypatch):
    """A clock that tests turn."""
    hands = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: hands[0])
    return hands


def test_time_counts_as_lost_only_when_the_encoder_has_nothing_left_to_do(now):
    told = TokenizeProgress("task", None)
    now[0] += 50  # Earlier shards are verified.
    with told.waiting(lambda: True):
        now[0] += 1
    now[0] += 3
    with told.waiting(lambda: False):
        now[0] += 4
    assert told.seconds == 8
    assert told.busy_share == pytest.approx(7 / 8)


def test_a_line_says_speed_and_time_left_every_few_seconds(now, caplog):
    caplog.set_level(logging.INFO, "mvar")
    told = TokenizeProgress("task 0/2", 400)
    with told.waiting(lambda: True):
        now[0] += 1
    told.add(10)
    now[0] += 9
    told.add(90)
    assert caplog.messages == ["task 0/2: 100/400 images   10/s   0 shards, encoder busy 90%   0:00:30 left"]


def test_a_task_that_did_nothing_divides_by_nothing(now):
    told = TokenizeProgress("task", 0)
    assert (told.seconds, told.busy_share) == (0, 1)
