"""Durations for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, with days in front where there are any: `1:02:03`, `2 d 0:00:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
