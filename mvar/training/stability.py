"""Whether a step went well: losses and gradients that are not finite, or far above what was usual.

All ranks see the same averages, so all judge alike without talking.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from mvar.checkpoint.record import KnownSteps
from mvar.training.engine import StepResult

WINDOW, KNOWN = 128, 32
"""Good steps that are remembered, and how many are needed before anything counts as a spike."""
SIGMA_OF_MAD = 1.4826
"""Standard deviation of a normal distribution, in its median absolute deviations."""
LEAST_SIGMA = 0.01
"""As a share of the median: steadier losses than that are no reason to call a small rise a spike."""


class DivergedError(Exception):
    """Too many bad steps in a row. Raised on all ranks in the same step."""

    def __init__(self, first: int, done: int, reason: str) -> None:
        super().__init__(f"steps {first} to {done - 1}: {reason}")
        self.first, self.done, self.reason = first, done, reason
        """First bad step (0-based), and the steps done after the last one."""


class Stability:
    """Judges the steps of one stretch of training. `known`: what is known of the steps before it."""

    def __init__(self, max_bad_steps: int, spike_sigmas: float, known: KnownSteps | None = None) -> None:
        self._limit, self._sigmas = max_bad_steps, spike_sigmas
        known = known or KnownSteps((), (), 0, 0)
        self._bad_in_a_row, self._scales = known.bad_in_a_row, known.scales
        before = {"loss": known.loss, "gradient norm": known.grad_norm}
        self._usual = {name: deque(values, maxlen=WINDOW) for name, values in before.items()}

    def known(self) -> KnownSteps:
        """What a checkpoint keeps, so that whoever resumes judges as if nothing had been."""
        loss, norm = (tuple(filter(math.isfinite, values)) for values in self._usual.values())
        return KnownSteps(loss, norm, self._scales, self._bad_in_a_row)

    def judge(self, step: int, result: StepResult) -> str | None:
        """Why step `step` (0-based) was bad, or None. Raises DivergedError after `max_bad_steps` in a row."""
        reason = self._reason(result)
        if reason is None:
            self._bad_in_a_row = 0
            return None
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self._limit:
            raise DivergedError(step + 1 - self._bad_in_a_row, step + 1, reason)
        return reason

    def _reason(self, result: StepResult) -> str | None:
        if result.skipped:
            overflowed = result.loss_scale is not None and not result.bad_samples
            return None if overflowed else "loss or gradient is not finite"  # fp16 looks for its loss scale.
        scales = sum(math.isfinite(loss) for loss in result.averages.loss_per_scale)
        if scales != self._scales:  # Progressive training: with a new scale, other losses are usual.
            self._scales = scales
            for known in self._usual.values():
                known.clear()
        measured = {"loss": result.averages.loss, "gradient norm": result.grad_norm or 0.0}
        for name, value in measured.items():
            usual = self._usual[name]
            if self._sigmas and len(usual) >= KNOWN:
                median = statistics.median(usual)
                deviation = SIGMA_OF_MAD * statistics.median(abs(other - median) for other in usual)
                sigma = max(deviation, LEAST_SIGMA * median)
                if not math.isfinite(value) or value > median + self._sigmas * sigma:
                    return f"{name} {value:.4g}, usually {median:.4g} +- {sigma:.2g}"
        for name, value in measured.items():
            self._usual[name].append(value)
        return None
