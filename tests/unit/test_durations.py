"""Durations for people."""

import pytest

from mvar.durations import duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (3725.4, "1:02:05"), (86399.6, "1 d 0:00:00"), (200_000, "2 d 7:33:20")]
)
def test_durations_are_days_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text
