"""How fast the ranks of a job talk to each other."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mvar.machine.findings import Finding
from mvar.run.world import World

MIB = 2**20
SIZES_MIB = (1, 64)
ROUNDS = 8


def look(world: World) -> list[Finding]:
    """All ranks together: time of an all-reduce, and the bandwidth of each rank's links that it comes to."""
    adapters = Path("/sys/class/infiniband")
    names = sorted(path.name for path in adapters.iterdir()) if adapters.is_dir() else []
    found = [Finding("adapters", ", ".join(names) or "no InfiniBand or RoCE adapter is seen")]
    for size in SIZES_MIB:
        taken_s = statistics.median(all_reduce_s(world, size * MIB) for _ in range(ROUNDS))
        # A ring sends and receives 2 (n - 1) / n of the tensor; what a data sheet calls bandwidth.
        rate = 2 * (world.size - 1) / world.size * size * MIB / taken_s
        text = f"{1e3 * taken_s:.2f} ms, {rate / 1e9:.2f} GB/s a rank, {world.size} ranks over {dist.get_backend()}"
        found.append(Finding(f"all-reduce {size} MiB", text))
    return found


def all_reduce_s(world: World, size: int) -> float:
    """Seconds of one all-reduce of `size` bytes, as the slowest rank sees it."""
    tensor = torch.zeros(size // 4, device=world.device)
    dist.barrier()
    began_s = time.perf_counter()
    dist.all_reduce(tensor)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    taken = torch.tensor([time.perf_counter() - began_s], dtype=torch.float64, device=world.device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)
