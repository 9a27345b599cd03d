"""How codes are drawn: one frozen object for the library, the command and the record of a job.

Legend: S scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from mvar.errors import ConfigError

Guidance = Literal["ramp", "constant"]
FloatTable = float | tuple[float, ...]
"""One value for all scales, or one for each, coarse to fine."""
IntTable = int | tuple[int, ...]


class ScaleOptions(NamedTuple):
    """The options of one scale. `strength` 0: no guidance."""

    strength: float
    top_k: int
    top_p: float
    temperature: float


@dataclass(frozen=True)
class SamplingOptions:
    """How codes are drawn. A tuple holds one value for each scale. Raises ConfigError for what cannot be."""

    cfg: FloatTable = 1.5
    """Guidance: logits are (1 + t) * with class - t * without. A number is t at its largest, see `guidance`; a tuple is
    the t of each scale. 0 everywhere: off, half the work."""
    top_k: IntTable = 900
    """So many likeliest codes, and ties, are kept (0: all; 1: greedy, the lowest index of a tie)."""
    top_p: FloatTable = 0.96
    """The likeliest codes that hold this share of the probability are kept (0 or 1: all)."""
    smooth: bool = False
    """Feed mixtures of code vectors, which looks smoother and scores worse."""
    temperature: FloatTable = 1.0
    """Logits are divided by it, after guidance and before top_k and top_p."""
    guidance: Guidance = "ramp"
    """How a number `cfg` goes over the scales: rising linearly from 0, as published, or the same at all."""
    interval: tuple[int, int] | None = None
    """First and last scale with guidance, counted from 0; None: all."""

    def __post_init__(self) -> None:
        numbers = [("cfg", self.cfg), ("top_k", self.top_k), ("top_p", self.top_p), ("temperature", self.temperature)]
        for name, value in numbers:
            if isinstance(value, tuple) and not value:
                raise ConfigError(f"{name}: an empty table. Give a number, or one for each scale.")
        if not all(math.isfinite(value) for value in _values(self.cfg)):
            raise ConfigError(f"cfg {self.cfg}: expected finite numbers.")
        if min(_values(self.top_k)) < 0 or not all(0 <= share <= 1 for share in _values(self.top_p)):
            raise ConfigError(f"top_k {self.top_k}, top_p {self.top_p}: expected top_k >= 0 and top_p from 0 to 1.")
        if not all(0 < value < math.inf for value in _values(self.temperature)):
            raise ConfigError(f"temperature {self.temperature}: expected more than 0. For greedy codes: top_k 1.")
        if self.guidance not in get_args(Guidance):
            raise ConfigError(f"guidance {self.guidance!r}: expected one of {', '.join(get_args(Guidance))}.")
        if self.guidance != "ramp" and isinstance(self.cfg, tuple):
            raise ConfigError(f"guidance {self.guidance}: cfg says the guidance of each scale already. Leave one out.")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise ConfigError(f"interval {self.interval}: expected first and last scale, from 0, such as (3, 9).")

    def of_scales(self, num_scales: int) -> tuple[ScaleOptions, ...]:
        """The options of each scale of a pyramid. Raises ConfigError where a table has another length."""
        for name in ("cfg", "top_k", "top_p", "temperature"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_scales:
                raise ConfigError(
                    f"{name}: a table of {len(value)} values, but the model has {num_scales} scales. Give one number, "
                    "or one for each scale."
                )
        first, last = (0, num_scales - 1) if self.interval is None else self.interval
        if last >= num_scales:
            raise ConfigError(f"interval {first}-{last}: the model's scales are 0 to {num_scales - 1}.")
        return tuple(
            ScaleOptions(
                self._strength(scale, num_scales) if first <= scale <= last else 0.0,
                _of(self.top_k, scale),
                _of(self.top_p, scale),
                _of(self.temperature, scale),
            )
            for scale in range(num_scales)
        )

    def _strength(self, scale: int, num_scales: int) -> float:
        if isinstance(self.cfg, tuple):
            return self.cfg[scale]
        return self.cfg if self.guidance == "constant" else self.cfg * (scale / max(num_scales - 1, 1))


def guided_scales(scales: Sequence[ScaleOptions]) -> int:
    """Scales that need the half without a class: up to the last that is guided.

    Those before the first guided one need it too, since what it remembers of them goes into the others.
    """
    return max((number for number, scale in enumerate(scales, start=1) if scale.strength != 0), default=0)


def _values(table: Any) -> tuple[Any, ...]:
    return table if isinstance(table, tuple) else (table,)


def _of(table: Any, scale: int) -> Any:
    return table[scale] if isinstance(table, tuple) else table


DEFAULTS = SamplingOptions()
