"""An array in memory once a machine, for all ranks there: one of them fills it, the others map what it filled.

The memory has no name in any file system. It goes with the last process that has it, however these processes end, and
no limit of /dev/shm matters. Others reach it through the process that made it, in /proc.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvar.run.world import World


@dataclass(frozen=True)
class _Offer:
    """Where the memory is to be found, or why there is none."""

    pid: int
    descriptor: int
    name: str
    problem: str | None = None


def shared_array(
    world: World, shape: tuple[int, ...], dtype: Any, fill: Callable[[NDArray[Any]], None], room: int | None = None
) -> tuple[NDArray[Any] | None, str]:
    """An array that is filled once on every machine; or None, and why this rank has none. All ranks together.

    `fill` is called by one rank of each machine; what it raises, all raise. `room`: bytes of memory that there are.
    The array is for reading only.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype), ""
    machines = world.gather(_machine())
    first = machines.index(machines[world.rank])
    made: list[mmap.mmap] = []
    descriptors: list[int] = []

    def make() -> _Offer | None:
        if world.rank != first:
            return None
        if room is not None and size > room:
            return _Offer(0, 0, "", f"{size / 2**30:.1f} GiB are needed and {room / 2**30:.1f} GiB of memory are free")
        name = f"mvar-{secrets.token_hex(8)}"
        try:
            descriptors.append(os.memfd_create(name))
            os.truncate(descriptors[0], size)
            made.append(mmap.mmap(descriptors[0], size))
        except (AttributeError, OSError) as error:
            return _Offer(0, 0, "", f"this system has no memory to share ({error})")
        fill(np.frombuffer(made[0], dtype).reshape(shape))
        return _Offer(os.getpid(), descriptors[0], name)

    try:
        offer = world.gather(world.together(make))[first]
        assert offer is not None
        problem = offer.problem
        if problem is None and not made:
            try:
                made.append(_map(offer, size))
            except OSError as error:
                problem = f"the memory of process {offer.pid} cannot be reached ({error})"
        world.gather(None)  # All have it.
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if problem is not None:
        return None, problem
    array = np.frombuffer(made[0], dtype).reshape(shape)
    array.flags.writeable = False
    return array, ""


def _machine() -> tuple[str, str]:
    """The same for all processes of a machine, and for no others."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname(), boot


def _map(offer: _Offer, size: int) -> mmap.mmap:
    path = f"/proc/{offer.pid}/fd/{offer.descriptor}"
    found = os.readlink(path)
    if offer.name not in found:  # Another process that has this number here: containers may count on their own.
        raise OSError(f"{path} is {found}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
