"""Which rank computes where, and what speaks against its machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mvar.errors import HardwareFaultError
from mvar.run import strikes
from mvar.run.world import World


class Suspects:
    """The machines of a run. Made by all ranks together."""

    def __init__(self, run: Path, world: World) -> None:
        self._run, self._world = run, world
        self.places = world.gather((strikes.node_name(), device_name(world.device)))
        """Node and device of each rank."""

    def describe(self, rank: int) -> str:
        node, device = self.places[rank]
        return f"rank {rank} on {node} ({device})"

    def strike(self, rank: int, what: str, evidence: str, *, step: int | None = None, out: bool = False) -> None:
        """Something speaks against a rank's machine: rank 0 writes it down. `out`: enough to do without the machine."""
        if self._world.is_main:
            node, device = self.places[rank]
            strikes.note(
                self._run, step=step, rank=rank, node=node, device=device, what=what, evidence=evidence, out=out
            )

    def end(self, ranks: Iterable[int], text: str) -> None:
        """End the run because of these ranks, if there are any: all raise, HardwareFaultError or RemoteError."""
        mine = self._world.rank in {*ranks}
        self._world.raise_together(HardwareFaultError(text) if mine else None)


def device_name(device: torch.device) -> str:
    """Such as `cuda:3 NVIDIA H100 80GB HBM3 GPU-...`: what an administrator needs to find it."""
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{device} {properties.name} GPU-{getattr(properties, 'uuid', 'unknown')}"
