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
class BatchPhase:
    """From step `step` on, when `samples` images had been seen, each step takes `global_batch` images."""

    step: int
    samples: int
    global_batch: int


@dataclass(frozen=True)
class CurriculumPoint:
    """What a step learns from: the first `scales` scales, the loss of the finest of them times `newest_weight`."""

    scales: int
    newest_weight: float = 1.0


@dataclass(frozen=True)
class Curriculum:
    """Progressive training (as in the published code's options): finer scales join one by one.

    The first `begin` scales until warm-up ends, all of `scales` from `share` of the run on, evenly between. A new
    scale's loss grows from a hundredth to its full weight over `ramp_steps`.
    """

    scales: int
    begin: int
    share: float
    ramp_steps: float

    def at(self, when: float, warmup_steps: int, total_steps: int) -> CurriculumPoint:
        """At `when`, in steps."""
        missing = self.scales - self.begin
        span = total_steps * self.share - warmup_steps
        if not self.share or missing <= 0 or span <= 0:
            return CurriculumPoint(self.scales)
        joined = min(max(round((when - warmup_steps) / span * missing), 0), missing)
        if not joined or joined == missing or not self.ramp_steps:
            return CurriculumPoint(self.begin + joined)
        since = when - (warmup_steps + (joined - 0.5) / missing * span)
        return CurriculumPoint(self.begin + joined, min(max(since / self.ramp_steps, 0.01), 1.0))


@dataclass(frozen=True)
class Plan:
    """How long a run is and how its learning rate and weight decay go.

    The schedules run over images seen, counted in steps of the present global batch. So they go on where they were when
    the global batch is changed on the way, and the peak learning rate follows the batch.
    """

    phases: tuple[BatchPhase, ...]
    """The global batches of the run; the last one holds now."""
    total_samples: int
    total_steps: int
    """Length of the schedule, in steps of the present global batch."""
    last_step: int
    """Optimizer steps that are really run: to the end of the schedule, or fewer with `max_steps`."""
    max_steps: int | None
    warmup_steps: int
    peak_lr: float
    warmup_start: float
    final_lr: float
    schedule: str
    weight_decay: float
    weight_decay_end: float
    curriculum: Curriculum

    @classmethod
    def of(cls, config: TrainConfig, images: int, phases: tuple[BatchPhase, ...] = ()) -> Plan:
        """The plan of `config` on a store of `images` training images. An epoch's remainder is never dropped.

        `phases`: the last one of `config.global_batch`; by default it holds from the beginning.
        """
        optim, batch = config.optim, config.global_batch
        phases = phases or (BatchPhase(0, 0, batch),)
        assert phases[-1].global_batch == batch
        total_samples = math.ceil(Fraction(config.epochs) * images)
        total = max(1, math.ceil(total_samples / batch))
        left = max(0, total_samples - phases[-1].samples)
        end = phases[-1].step + math.ceil(left / batch)
        warmup_epochs = config.epochs / 50 if optim.warmup_epochs is None else optim.warmup_epochs
        return cls(
            phases=phases,
            total_samples=total_samples,
            total_steps=total,
            last_step=min(end, config.max_steps or end),
            max_steps=config.max_steps,
            warmup_steps=min(total, round(warmup_epochs * images / batch)),
            peak_lr=optim.base_lr * batch / 256,
            warmup_start=optim.warmup_start,
            final_lr=optim.final_lr,
            schedule=optim.schedule,
            weight_decay=optim.weight_decay,
            weight_decay_end=optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end,
            curriculum=Curriculum(
                scales=len(config.model.patch_nums),
                begin=optim.progressive_scales,
                share=optim.progressive,
                ramp_steps=optim.progressive_warmup_epochs * images / batch,
            ),
        )

    def samples(self, step: int) -> int:
        """Images seen after `step` optimizer steps."""
        now = [phase for phase in self.phases if phase.step <= step][-1]
        return now.samples + (step - now.step) * now.global_batch

    def is_over(self, step: int, samples: int) -> bool:
        """Whether a run that ended there has nothing left to do."""
        return samples >= self.total_samples or (self.max_steps is not None and step >= self.max_steps)

    def lr(self, step: int) -> float:
        """Learning rate of `step` (0-based)."""
        when = self._position(step)
        share = lr_share(when, self.total_steps, self.warmup_steps, self.warmup_start, self.final_lr, self.schedule)
        return self.peak_lr * share

    def decay(self, step: int) -> float:
        """Weight decay of `step` (0-based) for parameters that decay."""
        return weight_decay(self._position(step), self.total_steps, self.weight_decay, self.weight_decay_end)

    def curriculum_at(self, step: int) -> CurriculumPoint:
        """What `step` (0-based) learns from."""
        return self.curriculum.at(self._position(step), self.warmup_steps, self.total_steps)

    def _position(self, step: int) -> float:
        """Steps of the present global batch that the images seen before `step` would have made.

        Never beyond the last one: after another batch, or images that were skipped, the last step may begin less than a
        whole step before the end, and the schedules are not made for what comes after their last step.
        """
        return min(self.samples(step) / self.phases[-1].global_batch, self.total_steps - 1)


def lr_share(step: float, total_steps: int, warmup_steps: int, start: float, final: float, kind: str) -> float:
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


def weight_decay(step: float, total_steps: int, start: float, end: float) -> float:
    """Weight decay of `step`: a half cosine from `start` to `end` over the whole run."""
    t = step / max(1, total_steps - 1)
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * t))


def decays(name: str, dimensions: int) -> bool:
    """Whether the parameter gets weight decay: matrices do; vectors, biases and the embeddings of place do not."""
    return dimensions > 1 and not name.endswith("bias") and not any(part in name for part in NO_DECAY_NAMES)
