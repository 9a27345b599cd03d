"""Bytes that a rank hands to collectives in one optimizer step, and when, as DeepSpeed 0.19 really does it.

- Stage 0 sums the gradients of a step once, over all ranks, after the last backward pass.
- Stages 1 and 2 also all-reduce whole gradients (there is no reduce-scatter), stage 2 in every micro-batch, during the
  backward pass if `overlap_comm`; and they gather the updated weights once a step.
- Stage 3 reduce-scatters gradients in every micro-batch. It gathers each weight before the forward pass uses it and,
  unless few enough weights come in between that it is kept, again before the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvar.ds_config import WIDE_SUMS_FROM
from mvar.plan.links import Kind
from mvar.plan.memory import DEFAULT_BUCKET, DEFAULT_LIVE, DEFAULT_PERSISTENT, FP32, Setup
from mvar.plan.sizes import Sizes

DEFAULT_REUSE = 1_000_000_000


@dataclass(frozen=True)
class Collective:
    """What a rank hands over in one phase of a step, in so many messages."""

    kind: Kind
    handed: int
    """Bytes, all messages together. All-reduce and reduce-scatter take whole tensors, all-gather a rank's part."""
    messages: int


@dataclass(frozen=True)
class Traffic:
    """Of one rank and one optimizer step, all of its micro-batches together."""

    world: int
    forward: tuple[Collective, ...] = ()
    """What the forward passes wait for, or hide."""
    backward: tuple[Collective, ...] = ()
    after: tuple[Collective, ...] = ()
    """With nothing to compute meanwhile."""
    overlaps: bool = False
    """What belongs to a pass travels while it computes."""

    def handed(self, kind: Kind) -> int:
        """Bytes of one kind."""
        return sum(one.handed for one in (*self.forward, *self.backward, *self.after) if one.kind == kind)

    @property
    def all_reduce(self) -> int:
        return self.handed("all_reduce")

    @property
    def reduce_scatter(self) -> int:
        return self.handed("reduce_scatter")

    @property
    def all_gather(self) -> int:
        return self.handed("all_gather")

    @property
    def handed_over(self) -> int:
        return self.all_reduce + self.reduce_scatter + self.all_gather

    @property
    def on_the_wire(self) -> int:
        """Bytes that a rank sends in ring algorithms."""
        others = self.world - 1
        ring = (2 * self.all_reduce + self.reduce_scatter) * others / self.world
        return round(ring + self.all_gather * others)


def traffic(sizes: Sizes, setup: Setup) -> Traffic:
    """Sums over ranks of losses and norms, some hundred bytes, are left out."""
    N, e, P = setup.world, setup.weight_bytes, sizes.parameters
    if N == 1 and setup.stage < 3:
        return Traffic(1, after=(Collective("all_reduce", _gradient_bytes(setup) * _times(setup) * P, 1),))
    overlaps = bool(setup.zero.get("overlap_comm", setup.stage == 3))
    bucket = setup.number("reduce_bucket_size", DEFAULT_BUCKET)
    g, times = _gradient_bytes(setup), _times(setup)
    if setup.stage < 3:
        summed = (Collective("all_reduce", times * g * P, times * -(-P // bucket)),)
        if setup.stage == 0:
            return Traffic(N, after=summed)
        gather_bucket = setup.number("allgather_bucket_size", DEFAULT_BUCKET)
        gathered = Collective("all_gather", e * P // N, -(-P // gather_bucket))
        if setup.stage == 1:
            return Traffic(N, after=(*summed, gathered))
        return Traffic(N, backward=summed, after=(gathered,), overlaps=overlaps)
    counts = [count for group in sizes.groups for count in group]
    padded = sum(-(-count // N) * N for count in counts)
    threshold = setup.number("stage3_param_persistence_threshold", DEFAULT_PERSISTENT)
    kept = sum(-(-count // N) for count in counts if count <= threshold)
    parted = [-(-count // N) for count in counts if count > threshold]
    scattered = Collective("reduce_scatter", times * g * padded, times * -(-padded // bucket))
    if N == 1:
        return Traffic(N, backward=(scattered,), overlaps=overlaps)
    fetched = Collective("all_gather", times * e * sum(parted), times * len(parted))
    again = () if _kept_for_backward(sizes, setup) else (fetched,)
    persistent = Collective("all_gather", e * kept, 1)
    return Traffic(N, forward=(fetched,), backward=(*again, scattered), after=(persistent,), overlaps=overlaps)


def _gradient_bytes(setup: Setup) -> int:
    return FP32 if setup.world >= WIDE_SUMS_FROM else setup.weight_bytes


def _times(setup: Setup) -> int:
    """How often gradients travel in a step."""
    return setup.accumulation if setup.stage >= 2 else 1


def _kept_for_backward(sizes: Sizes, setup: Setup) -> bool:
    """Whether weights that the forward pass gathered are still there in the backward pass."""
    reuse = setup.number("stage3_max_reuse_distance", DEFAULT_REUSE)
    live = setup.number("stage3_max_live_parameters", DEFAULT_LIVE)
    return sizes.parameters < min(reuse, live)
