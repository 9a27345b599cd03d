"""What `make bench` consists of, and how large each part is on the machine at hand.

The parts' sizes are chosen so that all of them take less than half an hour on two cores: a part has a share of the
time that is left, and takes the first of its sizes that is expected to fit into it. What is expected follows from how
fast the machine multiplies matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness import DTYPES
from benchmarks.roofline import matmul_gflops
from mvar.checkpoint.saver import available_memory

LIMIT_MINUTES = 30.0
PLANNED_MINUTES = 27.0
"""Expectations are not exact."""
SHARE = 0.6
"""Of the peak of matrix products in fp32 that the parts reach on average."""
FREE = 0.95
"""Of the memory that a part may take."""
BF16_GAIN = 2.0
"""Gain of a pass in bf16 over one in fp32, on a machine that multiplies bf16 matrices faster than fp32 ones."""

Sizes = Sequence[tuple[str, float]]
"""Options, the largest first, each with its share of the first one's operations."""
DEPTHS: Sizes = [(f"--depth {depth}", (depth / 12) ** 3) for depth in (12, 10, 8, 6, 4)]
CHANNELS: Sizes = [(f"--channels {channels}", (channels / 160) ** 2) for channels in (160, 96, 64)]


@dataclass(frozen=True)
class Machine:
    """How fast it multiplies matrices, and the memory that is free."""

    fp32_gflops: float
    bf16_gflops: float
    memory_gib: float

    @classmethod
    def measure(cls) -> Machine:
        """A look of some seconds."""
        fp32, bf16 = (matmul_gflops(dtype, torch.device("cpu"), 2) for dtype in DTYPES.values())
        return cls(fp32, bf16, available_memory() / 2**30)

    @property
    def has_bf16(self) -> bool:
        return self.bf16_gflops > self.fp32_gflops

    def minutes(self, tflop: float) -> float:
        """Expected for a part that does half of these operations in fp32 and half in bf16."""
        gain = BF16_GAIN if self.has_bf16 else 1.0
        return tflop * 1e3 / (self.fp32_gflops * SHARE) * (1 + 1 / gain) / 2 / 60


@dataclass(frozen=True)
class Part:
    """A call of a benchmark; its results lie in `benchmarks/results/NAME.json`."""

    name: str
    module: str
    words: str
    minutes: float
    """When all take theirs; see `allotted`."""
    tflop: float = 0.0
    """Operations at the first of its sizes, as if all were in fp32. 0: always as small."""
    sizes: Sizes = (("", 1.0),)
    without_bf16: str = ""
    """More options where bf16 matrices are not multiplied as such."""
    gib: float = 0.0
    """Most memory at the first of its sizes; with the depth, memory grows like its square, operations like its cube."""

    def command(self, machine: Machine, minutes: float, size: str | None = None) -> list[str]:
        """Its words after `python -m`. `size`: instead of the first that fits into `minutes` and memory."""
        fitting = [
            words
            for words, share in self.sizes
            if machine.minutes(share * self.tflop) <= minutes
            and share ** (2 / 3) * self.gib <= FREE * machine.memory_gib
        ]
        chosen = size if size is not None else [*fitting, self.sizes[-1][0]][0]
        extra = "" if machine.has_bf16 else self.without_bf16
        return [f"benchmarks.{self.module}", *self.words.split(), *chosen.split(), *extra.split()]


PARTS = (
    Part("roofline", "roofline", "", 0.5),
    Part("store_read", "store_read", "--rounds 5", 0.5),
    Part("startup", "startup", "", 3),
    Part("scaling", "scaling", "--rounds 5", 1.5),
    Part("collectives", "collectives", "--rounds 15", 0.5),
    Part("evaluate", "evaluate", "--images 5000", 1),
    Part("tokenize_identical", "tokenize_identical", "--made 12 --channels 32 --tasks 2 --kills 3 --pause 3", 1.5),
    Part("tokenize", "tokenize", "--images 6 --batch 2 --rounds 5", 2, 22, CHANNELS, "--precision fp32"),
    Part("checkpoint", "checkpoint", "--batch 1 --rounds 5", 2, 30, DEPTHS),
    Part("train_step", "train_step", "--batch 2 8 --rounds 5", 11, 181, DEPTHS, gib=21.5),
    Part("against_var_512", "against_var", "--size 512 --batch 1 --rounds 5", 3, 127, DEPTHS),
    Part("sample", "sample", "--batch 1 2 8 --rounds 5", 4, 125, DEPTHS),
    Part("against_var_256", "against_var", "--size 256 --batch 4 --rounds 5", 5, 131, DEPTHS),
)
"""In the order in which they run. Operations: those of one training step of an image at depth 12 and 256 px (0.57
TFLOP; a third of it for a forward pass, two for an image with guidance), times images, six rounds, both contestants,
both precisions."""


def allotted(left: Sequence[Part], elapsed_minutes: float, planned_minutes: float = PLANNED_MINUTES) -> float:
    """Minutes for the first of the parts that are left of a whole run, which began so long ago."""
    return (planned_minutes - elapsed_minutes) * left[0].minutes / sum(part.minutes for part in left)
