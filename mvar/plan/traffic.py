"""Bytes that a rank hands to collectives in one optimizer step, as DeepSpeed 0.19 really does it.

- Stage 0 sums the gradients of a step once, over all ranks.
- Stages 1 and 2 also all-reduce whole gradients (there is no reduce-scatter), stage 2 in every micro-batch, and gather
  the updated weights once a step.
- Stage 3 reduce-scatters gradients in every micro-batch. It gathers each weight before the forward pass uses it and,
  unless few enough weights come in between that it is kept, again before the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvar.ds_config import WIDE_SUMS_FROM
from mvar.plan.memory import DEFAULT_LIVE, DEFAULT_PERSISTENT, FP32, Setup
from mvar.plan.sizes import Sizes

DEFAULT_REUSE = 1_000_000_000


@dataclass(frozen=True)
class Traffic:
    """Of one rank and one optimizer step. All-reduce and reduce-scatter take whole tensors, all-gather its part."""

    all_reduce: int
    reduce_scatter: int
    all_gather: int
    world: int

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
    g = FP32 if N >= WIDE_SUMS_FROM else e
    if setup.stage == 0:
        return Traffic(g * P, 0, 0, N)
    if setup.stage < 3:
        times = setup.accumulation if setup.stage == 2 else 1
        return Traffic(times * g * P, 0, e * P // N if N > 1 else 0, N)
    counts = [count for group in sizes.groups for count in group]
    padded = sum(-(-count // N) * N for count in counts)
    threshold = setup.number("stage3_param_persistence_threshold", DEFAULT_PERSISTENT)
    kept = sum(-(-count // N) for count in counts if count <= threshold)
    often = sum(-(-count // N) for count in counts if count > threshold)
    gathers = setup.accumulation * (1 if _kept_for_backward(sizes, setup) else 2)
    gathered = e * (gathers * often + kept) if N > 1 else 0
    return Traffic(0, setup.accumulation * g * padded, gathered, N)


def _kept_for_backward(sizes: Sizes, setup: Setup) -> bool:
    """Whether weights that the forward pass gathered are still there in the backward pass."""
    reuse = setup.number("stage3_max_reuse_distance", DEFAULT_REUSE)
    live = setup.number("stage3_max_live_parameters", DEFAULT_LIVE)
    return sizes.parameters < min(reuse, live)
