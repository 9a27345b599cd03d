"""Learning rate and weight decay as pure functions of the step, and which parameters decay.

Nothing here has state: whoever resumes at step n gets what the undisturbed run had at step n. Kinds and numbers are
those of the published recipes (arXiv 2404.02905, which arXiv 2411.10433 follows).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from mvar.config import TrainConfig

FLAT_SHARE = {"lin0": 0.05, "lin": 0.15, "exp": 0.15, "lin00": 0.0, "cos": 0.0}
"""Share of the time after warm-up during which the rate stays at its peak."""

NO_DECAY_NAMES = ("pos_start", "pos_1LC", "lvl_embed", "scale_mul", "ada_gss", "A_log", "dt_bias")
"""Parts of names of parameters that never decay, whatever their shape."""


@dataclass(frozen=True)
class Plan:
    """How long a run is, in optimizer steps, and how its learning rate and weight decay go."""

    total_steps: int
    """Length of the schedule."""
    last_step: int
    """Steps that are really run: `total_steps`, or fewer with `max_steps`."""
    warmup_steps: int
    peak_lr: float
    warmup_start: float
    final_lr: float
    schedule: str
    weight_decay: float
    weight_decay_end: float

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> Plan:
        """The plan of `config` on a store of `images` training images. An epoch's remainder is never dropped."""
        optim = config.optim
        images_seen = Fraction(config.epochs) * images
        total = max(1, math.ceil(images_seen / config.global_batch))
        warmup_epochs = config.epochs / 50 if optim.warmup_epochs is None else optim.warmup_epochs
        return cls(
            total_steps=total,
            last_step=min(total, config.max_steps or total),
            warmup_steps=min(total, round(warmup_epochs * images / config.global_batch)),
            peak_lr=optim.base_lr * config.global_batch / 256,
            warmup_start=optim.warmup_start,
            final_lr=optim.final_lr,
            schedule=optim.schedule,
            weight_decay=optim.weight_decay,
            weight_decay_end=optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end,
        )

    def lr(self, step: int) -> float:
        """Learning rate of `step` (0-based)."""
        share = lr_share(step, self.total_steps, self.warmup_steps, self.warmup_start, self.final_lr, self.schedule)
        return self.peak_lr * share

    def decay(self, step: int) -> float:
        """Weight decay of `step` (0-based) for parameters that decay."""
        return weight_decay(step, self.total_steps, self.weight_decay, self.weight_decay_end)


def lr_share(step: int, total_steps: int, warmup_steps: int, start: float, final: float, kind: str) -> float:
    """Learning rate of `step` as a share of the peak.

    Warm-up is linear from `start`. Then, with t from 0 to 1 and FLAT_SHARE flat at the start: `lin0`, `lin`, `lin00`
    fall linearly to `final`, `exp` exponentially, `cos` along a half cosine. `lin0.3` (any number) has no flat part
    but a knee: slowly down for that share of the time, then faster to `final`.
    """
    if step < warmup_steps:
        return start + (1 - start) * step / warmup_steps
    t = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    if kind == "cos":
        return final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * t))
    if kind in FLAT_SHARE:
        flat = FLAT_SHARE[kind]
        if t < flat:
            return 1.0
        if kind == "exp":
            return math.pow(final, (t - flat) / (1 - flat))
        return final + (1 - final) * (1 - t) / (1 - flat)
    knee = float(kind.removeprefix("lin"))
    # Half as far down at the knee as a straight line from 1 to `final` would be.
    middle = (1 + final + (1 - final) * (1 - knee)) / 2
    if t < knee:
        return 1 + (middle - 1) * t / knee
    return final + (middle - final) * (1 - t) / (1 - knee)


def weight_decay(step: int, total_steps: int, start: float, end: float) -> float:
    """Weight decay of `step`: a half cosine from `start` to `end` over the whole run."""
    t = step / max(1, total_steps - 1)
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * t))


def decays(name: str, dimensions: int) -> bool:
    """Whether the parameter gets weight decay: matrices do; vectors, biases and the embeddings of place do not."""
    return dimensions > 1 and not name.endswith("bias") and not any(part in name for part in NO_DECAY_NAMES)
