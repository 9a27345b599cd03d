"""The pyramid of token maps: side lengths of each scale, and where each scale lies in the flat sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from mvar.errors import ConfigError

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of the token maps of a 256 px image (680 tokens)."""
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
"""Sides of the token maps of a 512 px image (2,240 tokens)."""


@dataclass(frozen=True)
class ScalePyramid:
    """Geometry of the scales, coarse to fine. Tokens are in raster order inside a scale, scales are concatenated.

    `patch_nums`: side of each token map. Raises ConfigError unless there is at least one scale and the sides rise.
    """

    patch_nums: tuple[int, ...]

    def __post_init__(self) -> None:
        sides = self.patch_nums
        if not sides or sides[0] < 1 or any(b <= a for a, b in pairwise(sides)):
            raise ConfigError(
                f"patch_nums: got {list(sides)}, expected rising positive sides such as {list(PATCH_NUMS_256)}."
            )

    @property
    def num_scales(self) -> int:
        return len(self.patch_nums)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.patch_nums)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First token of each scale, then the total: num_scales + 1 entries."""
        return (0, *accumulate(self.lengths))

    @property
    def total(self) -> int:
        """Tokens of all scales."""
        return self.offsets[-1]

    def segment(self, scale: int) -> slice:
        """Where the tokens of `scale` lie in the flat sequence."""
        return slice(self.offsets[scale], self.offsets[scale + 1])
