"""Headway in something long: a block was copied, a shard read. Told from any depth and thread to who has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[], object]] = []


def made() -> None:
    """Something long came a step further."""
    for listener in tuple(_listeners):
        listener()


@contextmanager
def heard_by(listener: Callable[[], object]) -> Iterator[None]:
    """Call `listener` whenever headway is made in this process, by the thread that makes it."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
