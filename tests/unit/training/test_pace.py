"""Which ranks stay behind: by the median of some steps, beside the median rank."""

from __future__ import annotations

import time

import torch

from mvar.training.pace import DeviceTimer, Pace, Spread


def told(pace: Pace, steps: list[list[float]]) -> list[int]:
    return [rank for seconds_R in steps for rank, _ in pace.behind(seconds_R)]


def test_a_rank_that_is_slower_than_the_median_over_all_steps_is_told_once() -> None:
    pace = Pace(1.3, 5)
    steady = [1.0, 1.0, 1.4, 1.1]
    assert told(pace, [steady] * 4) == []
    ((rank, evidence),) = pace.behind(steady)
    assert rank == 2 and "1.4 s" in evidence and "takes 1 s" in evidence
    assert told(pace, [steady] * 20) == []


def test_of_two_ranks_the_faster_is_the_measure() -> None:
    assert told(Pace(1.3, 3), [[1.0, 1.4]] * 3) == [1]


def test_a_hiccup_in_fewer_than_half_of_the_steps_is_none() -> None:
    assert told(Pace(1.3, 5), [[1.0, 9.0], [1.0, 9.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]) == []


def test_milliseconds_alone_and_a_factor_of_0_are_none() -> None:
    assert told(Pace(1.3, 3), [[0.001, 0.005]] * 3) == []
    assert told(Pace(0, 3), [[1.0, 9.0]] * 3) == []
    assert told(Pace(1.3, 1), [[1.0]] * 3) == []


def test_the_spread_of_a_step() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 4.0]) == Spread(slowest_rank=3, slowest_s=4.0, median_s=2.0)
    assert Spread.of([3.0]) == Spread(0, 3.0, 3.0)


def test_a_timer_adds_up_what_was_inside_and_nothing_else() -> None:
    timer = DeviceTimer(torch.device("cpu"))
    for _ in range(2):
        with timer:
            time.sleep(0.02)
        time.sleep(0.2)
    assert 0.04 <= timer.seconds() < 0.2
