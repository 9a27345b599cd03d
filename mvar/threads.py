"""Helper threads, and the GPU and the cores that they use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def same_gpu() -> Callable[[], None]:
    """What a new thread calls first, to use the GPU of the thread that calls this.

    A thread begins with GPU 0, whatever its process uses: the first call of CUDA in it, such as for pinned memory,
    would open a context there, half a gigabyte for each rank of the machine.
    """
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def use() -> None:
        if index is not None:
            torch.cuda.set_device(index)

    return use


def helper(action: Callable[[], object], name: str) -> threading.Thread:
    """A daemon thread at work on `action`, on the GPU of the thread that starts it."""
    use_gpu = same_gpu()

    def run() -> None:
        use_gpu()
        action()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def on_one_core(action: Callable[[], T]) -> T:
    """What `action` gives, computed by one thread: float32 sums that are split over threads depend on their number."""
    use_gpu = same_gpu()

    def begin() -> None:
        use_gpu()
        torch.set_num_threads(1)

    with ThreadPoolExecutor(1, "mvar-alone", initializer=begin) as pool:
        return pool.submit(action).result()
