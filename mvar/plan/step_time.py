"""How long an optimizer step takes: arithmetic, what is computed twice, and the messages that arithmetic does not hide.

    step = forward passes + backward passes + messages left over + host

A pass hides its messages while it computes, all but the first one (DeepSpeed's `overlap_comm`); what takes longer than
the pass is left over. The update itself, a few milliseconds that memory's bandwidth sets, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvar.config import ActivationCheckpointing
from mvar.plan.flops import flops
from mvar.plan.gpus import Gpu
from mvar.plan.links import Links
from mvar.plan.memory import FP32, Setup
from mvar.plan.sizes import Sizes
from mvar.plan.traffic import Collective, Traffic

SELECTIVE_REPEATS = 0.5
"""Share of a forward pass that selective recomputation runs again: of a d16's step on one H200, the matrix products,
which are kept, take a third and attention a tenth; the rest comes twice (docs/measured.md)."""
HOST_BYTES_S = 20e9
"""A rank's share of host memory's bandwidth, and of PCIe's: what an update on the host runs at."""
DISK_BYTES_S = 3e9
"""A rank's share of NVMe disks."""
UPDATE_BYTES = 7 * FP32
"""Gradient, weight and both moments are read, the last three written, for each parameter."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equally many GPUs. `mfu`: share of the peak that arithmetic alone reaches."""

    nodes: int
    gpus: int
    gpu: Gpu
    mfu: float
    links: Links

    @property
    def world(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class StepTime:
    """Of one optimizer step, seconds."""

    arithmetic_s: float
    """What a training needs: three forward passes' operations."""
    repeated_s: float
    """Recomputed in backward passes."""
    messages_s: float
    """Of all messages, hidden or not."""
    waiting_s: float
    """Of messages that no arithmetic hides."""
    host_s: float
    """Updates on the host, and disks."""

    @property
    def total_s(self) -> float:
        return self.arithmetic_s + self.repeated_s + self.waiting_s + self.host_s

    @property
    def efficiency(self) -> float:
        """Share of the step that is the arithmetic a training needs."""
        return self.arithmetic_s / self.total_s

    @property
    def limit(self) -> str:
        """What takes longest."""
        parts = {
            "arithmetic": self.arithmetic_s + self.repeated_s,
            "messages": self.messages_s,
            "host and disks": self.host_s,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(sizes: Sizes, setup: Setup, sent: Traffic, images: int, cluster: Cluster) -> StepTime:
    """`images`: of a step, over all ranks."""
    speed = cluster.gpu.bf16_tflops * 1e12 * cluster.mfu
    forward_s = flops(sizes).forward * images / cluster.world / speed
    return composed(forward_s, forwards_again(setup.recompute), sent, cluster, _host_s(sizes, setup))


def composed(forward_s: float, again: float, sent: Traffic, cluster: Cluster, host_s: float = 0.0) -> StepTime:
    """Of any model whose forward passes of a step take `forward_s`, a share `again` of which is recomputed."""
    repeated_s = again * forward_s
    phases = ((sent.forward, forward_s), (sent.backward, 2 * forward_s + repeated_s), (sent.after, 0.0))
    messages_s = waiting_s = 0.0
    for part, busy_s in phases:
        taken_s, count = _seconds(part, cluster), max(1, sum(one.messages for one in part))
        messages_s += taken_s
        waiting_s += max(taken_s - busy_s, taken_s / count) if sent.overlaps and busy_s else taken_s
    return StepTime(3 * forward_s, repeated_s, messages_s, waiting_s, host_s)


def forwards_again(recompute: ActivationCheckpointing) -> float:
    """Forward passes that are computed a second time."""
    if recompute == "off":
        return 0.0
    if recompute == "selective":
        return SELECTIVE_REPEATS
    return 1.0 if recompute == "every" else 1 / int(recompute)


def _seconds(part: tuple[Collective, ...], cluster: Cluster) -> float:
    links, nodes, gpus = cluster.links, cluster.nodes, cluster.gpus
    return sum(links.collective_s(one.kind, one.handed, nodes, gpus, one.messages) for one in part)


def _host_s(sizes: Sizes, setup: Setup) -> float:
    """Gradients down, updates by the CPU, weights up; with disks, masters and moments read and written as well."""
    where = setup.device_of("offload_optimizer")
    if where == "none":
        return 0.0
    own = sizes.parameters / setup.world
    host_s = own * (FP32 + setup.weight_bytes + UPDATE_BYTES) / HOST_BYTES_S
    return host_s + (own * 6 * FP32 / DISK_BYTES_S if where == "nvme" else 0.0)
