"""Mamba-2's causal depthwise convolution and its SiLU as two Triton kernels, one pass over the tokens each.

A program owns a run of tokens of one image and a block of channels. Rows may begin anywhere and may be a slice of wider
ones; what is read again for the next tap comes from the cache.
Shapes: B images, L tokens, K channels, W taps, V = W - 1 rows before the first token, R runs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads annotations of kernels as names of its own types.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar.model.kernels.launch import cut, on

CHANNELS = 64
FORWARD_ROWS, BACKWARD_ROWS = 32, 16
"""Tokens of a tile."""
BACKWARD_RUNS = 2
"""Runs of an image in the backward pass: each writes its part of the weights' gradients."""
WARPS = 4


def forward(x_BLK: Tensor, tail_BVK: Tensor | None, weight_KW: Tensor, bias_K: Tensor) -> Tensor:
    """SiLU of the convolution, contiguous (B, L, K) in x's dtype. `tail_BVK`: the rows before x, or zeros."""
    batch, length, channels = x_BLK.shape
    out_BLK = x_BLK.new_empty(batch, length, channels)
    tail_BVK = None if tail_BVK is None else tail_BVK.contiguous()
    if out_BLK.numel():
        with on(x_BLK):
            causal_conv_forward_kernel[(batch * triton.cdiv(length, FORWARD_ROWS), triton.cdiv(channels, CHANNELS))](
                x_BLK, tail_BVK, weight_KW, bias_K, out_BLK, length, channels, x_BLK.stride(0), x_BLK.stride(1),
                TAPS=weight_KW.shape[1], ALIGNED=_aligned(x_BLK), OUT_ALIGNED=_aligned(out_BLK), ROWS=FORWARD_ROWS,
                CHANNELS=CHANNELS, num_warps=WARPS,
            )  # fmt: skip
    return out_BLK


def backward(
    dout_BLK: Tensor, x_BLK: Tensor, weight_KW: Tensor, bias_K: Tensor, dx_BLK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, float32; x's is written into `dx_BLK`, which may be a slice. Without a tail.

    `dout_BLK`: contiguous.
    """
    batch, length, channels = x_BLK.shape
    runs, each = cut(length, BACKWARD_RUNS, BACKWARD_ROWS)
    taps = weight_KW.shape[1]
    partial_RUK = dout_BLK.new_empty(batch * runs, taps + 1, channels, dtype=torch.float32)
    if x_BLK.numel():
        with on(x_BLK):
            causal_conv_backward_kernel[(batch * runs, triton.cdiv(channels, CHANNELS))](
                dout_BLK, x_BLK, weight_KW, bias_K, dx_BLK, partial_RUK, length, channels, runs, each,
                x_BLK.stride(0), x_BLK.stride(1), dx_BLK.stride(0), dx_BLK.stride(1),
                TAPS=taps, ALIGNED=_aligned(x_BLK), OUT_ALIGNED=_aligned(dout_BLK), DX_ALIGNED=_aligned(dx_BLK),
                ROWS=BACKWARD_ROWS, CHANNELS=CHANNELS, num_warps=WARPS,
            )  # fmt: skip
    sums_UK = partial_RUK.sum(0)
    return sums_UK[:taps].t(), sums_UK[taps]


def _aligned(x_BLK: Tensor) -> int:
    """What the distances of images and rows are multiples of, up to 16."""
    return math.gcd(x_BLK.stride(0), x_BLK.stride(1), 16)


@triton.jit(do_not_specialize=("length", "image_stride", "row_stride"))
def causal_conv_forward_kernel(
    x_ptr,
    tail_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    length,
    channels,
    image_stride,
    row_stride,
    TAPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(length, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = k < channels
    x_ptr += tl.multiple_of(image * image_stride, ALIGNED)
    out = tl.zeros((ROWS, CHANNELS), tl.float32) + _channel(bias_ptr, k, inside, 1)[None, :]
    for tap in tl.static_range(TAPS):
        row = token + (tap - (TAPS - 1))
        x = _rows(x_ptr, row, (row >= 0) & (row < length), row_stride, k, inside, ALIGNED)
        if tail_ptr is not None:
            before = tail_ptr + image * (TAPS - 1) * channels
            x += _rows(before, row + (TAPS - 1), row < 0, channels, k, inside, OUT_ALIGNED)
        out += x * _channel(weight_ptr + tap, k, inside, TAPS)[None, :]
    out *= tl.sigmoid(out)
    at = (image * length + token)[:, None] * channels + k[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(token < length)[:, None] & inside[None, :])


@triton.jit(
    do_not_specialize=("length", "runs", "each", "image_stride", "row_stride", "dx_image_stride", "dx_row_stride")
)
def causal_conv_backward_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    length,
    channels,
    runs,
    each,
    image_stride,
    row_stride,
    dx_image_stride,
    dx_row_stride,
    TAPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    DX_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A token's dx comes from the outputs at itself and the TAPS - 1 tokens after it."""
    image = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * each
    last = tl.minimum(first + each, length)
    k = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = k < channels
    x_ptr += tl.multiple_of(image * image_stride, ALIGNED)
    dx_ptr += tl.multiple_of(image * dx_image_stride, DX_ALIGNED)
    dout_ptr += image * length * channels
    partial_ptr += tl.program_id(0).to(tl.int64) * (TAPS + 1) * channels + k
    bias = _channel(bias_ptr, k, inside, 1)
    dbias = tl.zeros((CHANNELS,), tl.float32)
    each_tap = tl.arange(0, TAPS)
    dweight = tl.zeros((TAPS, CHANNELS), tl.float32)
    for start in tl.range(first, last, ROWS):
        token = start + tl.arange(0, ROWS)
        dx = tl.zeros((ROWS, CHANNELS), tl.float32)
        for later in tl.static_range(TAPS):
            at = token + later
            before = tl.zeros((ROWS, CHANNELS), tl.float32) + bias[None, :]
            for tap in tl.static_range(TAPS):
                row = at + (tap - (TAPS - 1))
                x = _rows(x_ptr, row, (row >= 0) & (row < length), row_stride, k, inside, ALIGNED)
                before += x * _channel(weight_ptr + tap, k, inside, TAPS)[None, :]
            sigmoid = tl.sigmoid(before)
            dout = _rows(dout_ptr, at, at < length, channels, k, inside, OUT_ALIGNED)
            dbefore = dout * sigmoid * (1.0 + before * (1.0 - sigmoid))
            dx += dbefore * _channel(weight_ptr + (TAPS - 1 - later), k, inside, TAPS)[None, :]
            if later == 0:
                own = tl.where((token < last)[:, None], dbefore, 0.0)
                dbias += tl.sum(own, 0)
                for tap in tl.static_range(TAPS):
                    row = token + (tap - (TAPS - 1))
                    x = _rows(x_ptr, row, (row >= 0) & (row < length), row_stride, k, inside, ALIGNED)
                    dweight += tl.where((each_tap == tap)[:, None], tl.sum(own * x, 0)[None, :], 0.0)
        rows = tl.multiple_of(token * dx_row_stride, DX_ALIGNED)[:, None]
        tl.store(
            dx_ptr + rows + k[None, :],
            dx.to(dx_ptr.dtype.element_ty),
            mask=(token < last)[:, None] & inside[None, :],
        )
    tl.store(partial_ptr[None, :] + each_tap[:, None] * channels, dweight, mask=inside[None, :])
    tl.store(partial_ptr + TAPS * channels, dbias, mask=inside)


@triton.jit
def _channel(ptr, k, inside, stride):
    return tl.load(ptr + k * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rows(ptr, row, here, stride, k, inside, ALIGNED: tl.constexpr):
    at = tl.multiple_of(row * stride, ALIGNED)[:, None] + k[None, :]
    return tl.load(ptr + at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
