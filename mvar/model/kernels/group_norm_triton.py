"""Group norm and SiLU of channels_last maps as three Triton kernels, without gradients: two passes over the map.

torch's own group norm on a GPU takes maps with channels first, and copies others back and forth. Here a first kernel
has each channel's mean and sum of squared deviations over a run of pixels, a second one makes of them a factor and a
summand for each channel of an image, a third applies them. Runs are as long whatever the batch, so that an image's
numbers do not depend on its company.

Shapes: B images, H x W = P pixels of a map, C channels, G groups, R runs of pixels.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads annotations of kernels as names of its own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar.model.kernels.launch import block, on

RUN = 512
"""Pixels of a run."""
TILE = 4096
"""Elements that a program holds at once."""
WARPS = 8


def fused(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, *, silu: bool) -> Tensor:
    """Group norm of a channels_last map, then SiLU if asked for, in x's dtype and layout; computed in float32."""
    batch, channels, height, width = x_BCHW.shape
    pixels = height * width
    runs, lanes = triton.cdiv(pixels, RUN), block(channels)
    x_BPC = x_BCHW.permute(0, 2, 3, 1).view(batch, pixels, channels)
    out_BPC = torch.empty_like(x_BPC)
    parts_2BRC = x_BCHW.new_empty(2, batch, runs, channels, dtype=torch.float32)
    affine_2BC = x_BCHW.new_empty(2, batch, channels, dtype=torch.float32)
    rows = max(1, TILE // lanes)
    if x_BPC.numel():
        with on(x_BCHW):
            group_norm_parts_kernel[(batch * runs,)](
                x_BPC, *parts_2BRC, pixels, runs,
                CHANNELS=channels, LANES=lanes, RUN=RUN, ROWS=min(rows, RUN), num_warps=WARPS,
            )  # fmt: skip
            group_norm_affine_kernel[(batch * groups,)](
                *parts_2BRC, weight_C, bias_C, *affine_2BC, pixels, runs, eps,
                CHANNELS=channels, GROUPS=groups, LANES=block(channels // groups), RUN=RUN, RUNS=block(runs),
                num_warps=4,
            )  # fmt: skip
            group_norm_apply_kernel[(batch * triton.cdiv(pixels, rows),)](
                x_BPC, *affine_2BC, out_BPC, pixels,
                CHANNELS=channels, LANES=lanes, ROWS=rows, SILU=silu, num_warps=WARPS,
            )  # fmt: skip
    return out_BPC.view(batch, height, width, channels).permute(0, 3, 1, 2)


@triton.jit(do_not_specialize=("pixels", "runs"))
def group_norm_parts_kernel(
    x_ptr,
    mean_ptr,
    square_ptr,
    pixels,
    runs,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of one run: means, and sums of squared deviations from them, put together tile by tile (Chan et al. 1979)."""
    image = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * RUN
    last = tl.minimum(first + RUN, pixels)
    c = tl.arange(0, LANES)
    inside = c < CHANNELS
    x_ptr += image * pixels * CHANNELS + c[None, :]
    mean = tl.zeros((LANES,), tl.float32)
    square = tl.zeros((LANES,), tl.float32)
    for start in tl.range(first, last, ROWS):
        pixel = start + tl.arange(0, ROWS)
        here = (pixel < last)[:, None] & inside[None, :]
        x = tl.load(x_ptr + pixel[:, None] * CHANNELS, mask=here, other=0.0).to(tl.float32)
        count = tl.minimum(last - start, ROWS).to(tl.float32)
        own = tl.sum(x, 0) / count
        centred = tl.where(here, x - own[None, :], 0.0)
        before = (start - first).to(tl.float32)
        share = count / (before + count)
        apart = own - mean
        mean += apart * share
        square += tl.sum(centred * centred, 0) + apart * apart * before * share
    at = tl.program_id(0).to(tl.int64) * CHANNELS + c
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)


@triton.jit(do_not_specialize=("pixels", "runs"))
def group_norm_affine_kernel(
    mean_ptr,
    square_ptr,
    weight_ptr,
    bias_ptr,
    factor_ptr,
    summand_ptr,
    pixels,
    runs,
    eps,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Of one group of one image."""
    EACH: tl.constexpr = CHANNELS // GROUPS
    image = (tl.program_id(0) // GROUPS).to(tl.int64)
    lane, run = tl.arange(0, LANES), tl.arange(0, RUNS)
    c = (tl.program_id(0) % GROUPS) * EACH + lane
    inside = lane < EACH
    here = (run < runs)[:, None] & inside[None, :]
    at = (image * runs + run)[:, None] * CHANNELS + c[None, :]
    means = tl.load(mean_ptr + at, mask=here, other=0.0)
    squares = tl.load(square_ptr + at, mask=here, other=0.0)
    counts = tl.maximum(tl.minimum(pixels - run * RUN, RUN), 0).to(tl.float32)[:, None]
    whole = pixels.to(tl.float32) * EACH
    mean = tl.sum(tl.sum(counts * means, 1), 0) / whole
    apart = tl.where(here, means - mean, 0.0)
    variance = tl.sum(tl.sum(squares + counts * apart * apart, 1), 0) / whole
    factor = tl.rsqrt(variance + eps) * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    summand = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32) - mean * factor
    tl.store(factor_ptr + image * CHANNELS + c, factor, mask=inside)
    tl.store(summand_ptr + image * CHANNELS + c, summand, mask=inside)


@triton.jit(do_not_specialize=("pixels",))
def group_norm_apply_kernel(
    x_ptr,
    factor_ptr,
    summand_ptr,
    out_ptr,
    pixels,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    tiles = tl.cdiv(pixels, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, LANES)
    inside = c < CHANNELS
    factor = tl.load(factor_ptr + image * CHANNELS + c, mask=inside, other=0.0)
    summand = tl.load(summand_ptr + image * CHANNELS + c, mask=inside, other=0.0)
    at = (image * pixels + pixel)[:, None] * CHANNELS + c[None, :]
    here = (pixel < pixels)[:, None] & inside[None, :]
    y = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32) * factor[None, :] + summand[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=here)
