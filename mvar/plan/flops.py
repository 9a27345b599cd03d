"""Floating-point operations of a training step, by part. A multiplication and an addition are two operations.

Conditioning is computed once for each image, attention inside each scale only. Layer norms, activations, softmax and
decays are left out, as is usual: they are memory-bound. Recomputed blocks are not counted as useful work (MFU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mvar.model.block import VECTORS
from mvar.model.kernels.ssd import chunk_length
from mvar.model.mamba2 import CONV_WIDTH, EXPAND, HEAD_WIDTH, STATE
from mvar.plan.sizes import Sizes

BACKWARD = 2
"""The backward pass does twice the forward pass's work."""


@dataclass(frozen=True)
class Flops:
    """Of a forward pass of one image."""

    linear: int
    """The blocks' matmuls of tokens with weights, and those at both ends."""
    attention: int
    """Scores and their use, inside each scale."""
    scan: int
    """Mamba-2's convolution and chunked state-space sum."""
    conditioning: int
    """Once for each image."""

    @property
    def forward(self) -> int:
        return self.linear + self.attention + self.scan + self.conditioning

    @property
    def training(self) -> int:
        """Forward and backward pass of an image."""
        return (1 + BACKWARD) * self.forward


def flops(sizes: Sizes) -> Flops:
    """Of one image."""
    C, depth, tokens = sizes.width, sizes.model.depth, sizes.tokens
    inner = EXPAND * C
    conv = inner + 2 * STATE
    projected = inner + conv + inner // HEAD_WIDTH
    block = 4 * C * C + 8 * C * C + C * projected + inner * C
    ends = sizes.model.vocab_size * C * tokens + sizes.model.latent_channels * C * (tokens - sizes.lengths[0])
    alone = 1  # The softmax over one token is 1: nothing is computed.
    attention = sum(4 * length * length * C for length in sizes.lengths if length > alone)
    chunk = chunk_length(tokens)
    padded = -(-tokens // chunk) * chunk
    carried = 2 * 2 * STATE * inner if chunk < tokens else 0  # into the state and out of it
    scan = padded * (2 * chunk * STATE + 2 * chunk * inner + carried) + tokens * 2 * CONV_WIDTH * conv
    vectors = VECTORS * C * C
    conditioning = vectors if sizes.model.shared_conditioning else depth * vectors
    return Flops(
        linear=2 * (depth * block * tokens + ends),
        attention=depth * attention,
        scan=depth * scan,
        conditioning=2 * (conditioning + 2 * C * C),
    )


def gpu_days(sizes: Sizes, images: int, peak_tflops: float, mfu: float) -> float:
    """Days that one GPU would take for so many training images, at that share of its peak."""
    return flops(sizes).training * images / (peak_tflops * 1e12 * mfu) / 86400


def best_interval_s(write_s: float, mtbf_s: float) -> float:
    """Seconds of work between two checkpoints that lose least time on average.

    Daly's higher-order estimate (J. T. Daly, Future Generation Computer Systems 22, 2006, eq. 37); for short
    writes it is Young's sqrt(2 write mtbf) (J. W. Young, Communications of the ACM 17, 1974). `write_s`: how long
    training stands still for one. `mtbf_s`: mean time between failures of the whole job.
    """
    if write_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(write_s / (2 * mtbf_s))
    return math.sqrt(2 * write_s * mtbf_s) * (1 + ratio / 3 + ratio * ratio / 9) - write_s


def time_lost(interval_s: float, write_s: float, mtbf_s: float) -> float:
    """Share of time lost to checkpoints and to work done twice, to first order."""
    return write_s / (interval_s + write_s) + (interval_s / 2 + write_s) / mtbf_s
