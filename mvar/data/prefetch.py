"""Batches before they are asked for: read ahead by a thread, and one step ahead of their use."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from mvar.threads import helper

T = TypeVar("T")


def read_ahead(batches: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same batches, read by a thread up to `depth` ahead. Its errors are raised here; closing ends it."""
    ready: queue.Queue[T | BaseException] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | BaseException) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def run() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
        except BaseException as error:  # Handed to the reader, who raises it.
            put(error)

    thread = helper(run, "mvar-read-ahead")
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


class Feed(Generic[T]):
    """Hands out each step's micro-batches, `ahead` steps ahead of their use.

    So an error of reading (a damaged shard on one node) can be put to the vote of all ranks before any of them waits
    for the others in the step that lacks its data: with 1 where votes are counted at once, 2 where a step later.
    """

    def __init__(self, stream: Iterator[T], accumulation: int, ahead: int = 1) -> None:
        self._stream, self._accumulation = stream, accumulation
        self.error: Exception | None = None
        """Why batches of a step to come are missing."""
        self._ahead = deque(self._read() for _ in range(ahead))

    def take(self) -> list[T]:
        self._ahead.append(self._read())
        return self._ahead.popleft()

    def _read(self) -> list[T]:
        if self.error is not None:
            return []
        try:
            return [next(self._stream) for _ in range(self._accumulation)]
        except Exception as error:
            self.error = error
            return []
