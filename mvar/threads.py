"""Helper threads, and the GPU that they use."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


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
