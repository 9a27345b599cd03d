"""The processes of a run: how they come together, on which device, and how they talk."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from mvar.cgroups import affinity, cores, cpu_quota, share_of_cores
from mvar.config import DeviceChoice
from mvar.errors import BackendError, ConfigError, MvarError
from mvar.log import log
from mvar.run import compiled_extensions
from mvar.run.interfaces import explaining, require_reachable
from mvar.run.launcher import Place, detect, require_address, require_one_task_per_gpu

T = TypeVar("T")

GRACE = timedelta(minutes=1)
"""Collectives wait so much longer than the longest watchdog, which has something to say."""
FOREVER = timedelta(days=30)
LATECOMERS = timedelta(minutes=30)
"""The first ranks wait at least so long for the last ones to start: no watchdog looks yet."""
TRACE = "nccl_trace_rank_"
"""What NCCL's flight recorder calls its files, without the rank; torch's tools look for it."""


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """`values`, from the host, on the device: without waiting for what it is busy with, as pageable memory would."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Later:
    """Numbers on their way from the device to the host."""

    values: Tensor
    arrived: torch.cuda.Event | None = None

    def get(self) -> Tensor:
        """On the CPU. Waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values


@dataclass(frozen=True)
class World:
    """All processes of a run, and the few things they say to each other outside of gradients."""

    place: Place
    device: torch.device
    own_cores: int = field(default_factory=cores, kw_only=True)
    """For this rank alone: those that it may run on, divided by the ranks that may run on them too."""

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def is_main(self) -> bool:
        return self.place.rank == 0

    @property
    def devices(self) -> str:
        """What the ranks compute on, in words; of this rank's kind, as all have the same."""
        own = f"{platform.machine()} CPU ({self.own_cores} cores a rank)"
        return f"{self.size} x {torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else own}"

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, float64, in place on this rank's device; the result is on the CPU, equal everywhere."""
        return self.sum_later(values).get()

    def sum_later(self, values: Tensor, also: Tensor | None = None) -> Later:
        """The same without waiting for the device. `also`: numbers that are equal everywhere, to come behind the sums.

        What is computed meanwhile must not touch `values` and `also`, unless they are of another type or device.
        """
        values = values.to(self.device, torch.float64)
        if self.size > 1:
            dist.all_reduce(values)
        if also is not None:
            values = torch.cat([values, also.to(self.device, torch.float64)])
        if self.device.type != "cuda":
            return Later(values)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.device))
        return Later(host, arrived)

    def gather(self, value: T) -> list[T]:
        """Everybody's object, in the order of ranks, for everybody."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_to_main(self, value: T) -> list[T] | None:
        """Everybody's object, in the order of ranks, for rank 0; None for the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
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


def start(
    environ: MutableMapping[str, str] = os.environ, threads: int | None = None, start_limit_s: float = 0
) -> World:
    """Join the other processes through DeepSpeed (NCCL with GPUs, gloo without), choose the device, set CPU threads.

    `start_limit_s`: how long to wait for them, if that is more than half an hour. Raises ConfigError where the launch
    is wrong. Where compiled DeepSpeed extensions are kept: `mvar.run.compiled_extensions`.
    """
    place = detect(environ)
    require_one_task_per_gpu(place, environ)
    if place.address is not None:
        require_address(place)
    choose_accelerator(environ)
    compiled_extensions.prepare(environ)  # Before the ranks meet: none of them compiles yet.
    index = _device_index(place, environ) if torch.cuda.is_available() else None
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    # DeepSpeed reads these; LOCAL_RANK is what it takes for the number of the GPU.
    environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(index or 0))
    if index is not None:
        torch.cuda.set_device(device)
    _join(place, device, environ, start_limit_s)
    _adopt_by_deepspeed(device)
    world = _meet(place, device)
    torch.set_num_threads(threads or world.own_cores)
    return world


def join(environ: MutableMapping[str, str] = os.environ, device: DeviceChoice = "auto") -> World:
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
        _join(place, chosen, environ, 0)
    return _meet(place, chosen)


def be_patient(limits_s: Iterable[float]) -> None:
    """Let collectives of all groups that exist wait longer than a watchdog with any of these limits (0: for ever).

    NCCL's own limit is ten minutes, gloo's thirty, and neither says where the ranks stood. DeepSpeed makes groups of
    its own: call this after its start.
    """
    limits = list(limits_s)
    patience = max(timedelta(seconds=limit) for limit in limits) + GRACE if all(limits) else FOREVER
    if dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(patience, group)


def write_flight_record(folder: Path, rank: int, environ: Mapping[str, str] = os.environ) -> None:
    """What NCCL's flight recorder knows of the last collectives, in the file where it would put it by itself.

    It does so when a collective fails, but a watchdog that finds a hung rank comes first.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None:
        return
    prefix = environ.get("TORCH_FR_DUMP_TEMP_FILE") or environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    path = Path(f"{prefix or folder / TRACE}{rank}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dump())
        log.warning("no progress for long; NCCL's last collectives: %s", path)
    except Exception as error:  # The stacks come all the same.
        log.warning("%s: NCCL's last collectives cannot be written: %s", path, error)


def choose_accelerator(environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell DeepSpeed, before its import, that a machine without GPUs is no accident."""
    if not torch.cuda.is_available():
        environ.setdefault("DS_ACCELERATOR", "cpu")


def _meet(place: Place, device: torch.device) -> World:
    """The world, once all have joined: the ranks of a machine tell each other which cores they may run on."""
    world = World(place, device)
    if place.size == 1:
        return world
    first = place.rank - place.local_rank
    masks = world.gather(affinity())[first : first + place.local_size]
    return replace(world, own_cores=share_of_cores(masks, place.local_rank, cpu_quota()))


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


def _join(place: Place, device: torch.device, environ: MutableMapping[str, str], limit_s: float) -> None:
    by_gloo = device.type != "cuda"
    common: dict[str, Any] = {
        "backend": "gloo" if by_gloo else "nccl",
        "timeout": max(timedelta(seconds=limit_s), LATECOMERS),
        "device_id": None if by_gloo else device,
    }
    if by_gloo:
        require_reachable(place, environ)
    with explaining(place, environ) if by_gloo else nullcontext():
        if place.address is None:
            # Alone, nothing needs a port: two runs on one machine cannot meet by accident.
            dist.init_process_group(store=HashStore(), rank=0, world_size=1, **common)
        else:
            environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
            dist.init_process_group(rank=place.rank, world_size=place.size, **common)


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
