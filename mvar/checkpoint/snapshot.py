"""A rank's part of a checkpoint in host memory: what weights and moments were at the call, whatever training does next.

On a GPU the copies run in a stream of their own, beside the next step's forward and backward passes, which change
neither weights nor moments. Whoever does change them lets the GPU wait for the copies first (`Partition.hold`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mvar.checkpoint.partition import Copied, Partition
from mvar.log import log


class Snapshot:
    """Memory for one snapshot at a time, allocated with the first. `device`: where the training computes."""

    def __init__(self, partition: Partition, device: torch.device) -> None:
        self._partition, self._device = partition, device
        self._buffer: Tensor | None = None
        self._aside: Aside | None = None

    def take(self) -> Iterator[Tensor]:
        """Everything this rank owns, float32, in the order of `Partition.layout`: to be read once, in any thread.

        The one before must have been read.
        """
        if self._buffer is None:
            self._buffer = torch.empty(self._partition.bytes_owned // 4)
            self._aside = aside_of(self._device, self._buffer)
        places, later, begin = [], [], 0
        for _, _, values in self._partition.blocks():
            place = self._buffer[begin : begin + values.numel()]
            places.append(place)
            begin += values.numel()
            if self._aside is not None and values.device == self._device:
                later.append((place, values))
            else:
                place.copy_(values)
        if self._aside is None:
            return iter(places)
        copied = self._aside.copy(later)
        self._partition.hold(copied)
        return _after(copied, places)


def _after(copied: Copied, places: list[Tensor]) -> Iterator[Tensor]:
    copied.synchronize()
    yield from places


class Aside:
    """Copies from a GPU to host memory, beside what the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Copied:
        """Begin to copy each second to its first, as they are after what the GPU was given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, values in pairs:
                place.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return copied


def aside_of(device: torch.device, buffer: Tensor) -> Aside | None:
    """For copies from `device` into `buffer`, whose pages it locks; None on a CPU."""
    if device.type != "cuda":
        return None
    runtime: Any = torch.cuda.cudart()
    size = buffer.numel() * buffer.element_size()
    code = int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0))  # `pin_memory` rounds up to a power of two.
    if code:
        log.warning(
            "%.1f GiB for snapshots cannot be locked in memory (CUDA error %d): training stands still while they are"
            " copied. See ulimit -l.",
            size / 2**30,
            code,
        )
    return Aside(device)
