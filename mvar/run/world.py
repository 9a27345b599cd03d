"""The processes of a run: how they come together, on which device, and how they talk."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from mvar.errors import BackendError, ConfigError, MvarError
from mvar.run import extensions
from mvar.run.launcher import Place, detect, require_address, require_one_task_per_gpu

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of a run, and the few things they say to each other outside of gradients."""

    place: Place
    device: torch.device

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def is_main(self) -> bool:
        return self.place.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, float64, in place on this rank's device; the result is on the CPU, equal everywhere."""
        values = values.to(self.device, torch.float64)
        if self.size > 1:
            dist.all_reduce(values)
        return values.cpu()

    def gather(self, value: T) -> list[T]:
        """Everybody's object, in the order of ranks, for everybody."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        """Rank 0's object for everybody."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def raise_together(self, error: BaseException | None) -> None:
        """If any rank brings an error, all raise: the first of these its own, the others a RemoteError."""
        described = None if error is None else (str(error), isinstance(error, MvarError))
        failed = [(rank, *what) for rank, what in enumerate(self.gather(described)) if what is not None]
        if not failed:
            return
        first, text, expected = failed[0]
        if error is not None and first == self.rank:
            raise error
        raise RemoteError(first, text, expected)

    def together(self, action: Callable[[], T]) -> T:
        """Run `action`, which must not talk to other ranks, on every rank; if one fails, all do."""
        try:
            result, error = action(), None
        except Exception as raised:
            result, error = None, raised
        self.raise_together(error)
        return cast(T, result)


class RemoteError(Exception):
    """Another rank failed and says why; this one ends with it. `expected`: the cause is a MvarError."""

    def __init__(self, rank: int, text: str, expected: bool) -> None:
        super().__init__(f"rank {rank} failed: {text}")
        self.expected = expected


def start(environ: MutableMapping[str, str] = os.environ, threads: int | None = None) -> World:
    """Join the other processes through DeepSpeed (NCCL with GPUs, gloo without), choose the device, set CPU threads.

    Raises ConfigError where the launch is wrong. Where compiled DeepSpeed extensions are kept: `mvar.run.extensions`.
    """
    place = detect(environ)
    require_one_task_per_gpu(place, environ)
    if place.address is not None:
        require_address(place)
    choose_accelerator(environ)
    extensions.prepare(environ)  # Before the ranks meet: none of them compiles yet.
    index = _device_index(place, environ) if torch.cuda.is_available() else None
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    # DeepSpeed reads these; LOCAL_RANK is what it takes for the number of the GPU.
    environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(index or 0))
    if index is not None:
        torch.cuda.set_device(device)
    torch.set_num_threads(threads or max(1, cores() // place.local_size))
    _join(place, device, environ)
    _adopt_by_deepspeed(device)
    return World(place, device)


def join(environ: MutableMapping[str, str] = os.environ, device: Literal["auto", "cpu", "cuda"] = "auto") -> World:
    """Join the other processes with torch alone (NCCL with GPUs, gloo without), and choose the device.

    A process that is alone joins nobody: there is no process group then. Raises ConfigError where the launch is wrong,
    BackendError where a GPU is asked for and there is none.
    """
    place = detect(environ)
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("device: got cuda, but torch sees no GPU here. Set device=cpu, or device=auto.")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        require_one_task_per_gpu(place, environ)
    chosen = torch.device("cuda", _device_index(place, environ)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if place.size > 1:
        require_address(place)
        _join(place, chosen, environ)
    return World(place, chosen)


def choose_accelerator(environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell DeepSpeed, before its import, that a machine without GPUs is no accident."""
    if not torch.cuda.is_available():
        environ.setdefault("DS_ACCELERATOR", "cpu")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_index(place: Place, environ: Mapping[str, str]) -> int:
    count = torch.cuda.device_count()
    if place.local_rank < count:
        return place.local_rank
    if place.launcher == "srun" and count == 1:
        return 0  # Slurm shows each task its own GPU only.
    raise ConfigError(
        f"{place.local_size} processes on this machine, but it shows {count} GPUs"
        f" (CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES', 'unset')}). Start one process per GPU."
    )


def _join(place: Place, device: torch.device, environ: MutableMapping[str, str]) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.address is None:
        # Alone, nothing needs a port: two runs on one machine cannot meet by accident.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, device_id=bound)


def _adopt_by_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed use the process group that was just made."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Said by torch at every call of DeepSpeed's; nothing a user can do.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # A kernel for tensor-parallel inference. Training never calls it, and compiling it needs g++ and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


def finish() -> None:
    """Leave the other processes. Without it the interpreter's end may abort in a thread of gloo."""
    if dist.is_initialized():
        dist.destroy_process_group()
