"""Attention inside each scale as three Triton kernels, from the projection of q, k and v to the heads' output.

Kernels for packed sequences are made for long ones. Here most sequences have less than 200 tokens, and what costs is
reading and writing. So q and k are normalised where they are read, and the backward pass writes the projection's
gradient as one tensor. No atomics: the same bits every time.

Every token has bounds: the first token of its scale and the first one after it. A program owns a tile of tokens of one
head and goes over the tokens between the tile's lowest and highest bound; a tile may hold several small scales.
Shapes: B batch, L tokens, S scales, H heads, D head width.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads annotations of kernels as names of its own types.

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvar.model.kernels.launch import block, on

TILE = 64
"""Tokens of a tile, on both sides of a product."""
WARPS, STAGES = 4, 2
LOG2E = math.log2(math.e)
LEAST = 16
"""Triton's products want at least so many elements a side."""


def attend(
    qkv_BL3HD: Tensor, scale_H: Tensor | None, lengths: tuple[int, ...], softmax_scale: float, floor: float
) -> Tensor:
    """(B, L, H, D) in qkv's dtype. With `scale_H`, q and k are unit vectors, q times the heads' scales."""
    out: Tensor = _ScaleAttention.apply(qkv_BL3HD, scale_H, lengths, softmax_scale, floor)  # type: ignore[no-untyped-call]
    return out


@lru_cache(maxsize=64)
def bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 (2, L): the first token of each token's scale, and the first one after it."""
    lengths_S = torch.tensor(lengths)
    after_S = lengths_S.cumsum(0)
    both_2S = torch.stack((after_S - lengths_S, after_S))
    return both_2S.repeat_interleave(lengths_S, dim=1, output_size=sum(lengths)).to(device, torch.int32)


class _ScaleAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BL3HD: Tensor,
        scale_H: Tensor | None,
        lengths: tuple[int, ...],
        softmax_scale: float,
        floor: float,
    ) -> Tensor:
        qkv_BL3HD = qkv_BL3HD.contiguous()
        batch, length, _, heads, width = qkv_BL3HD.shape
        bounds_2L = bounds(lengths, qkv_BL3HD.device)
        out_BLHD = qkv_BL3HD.new_empty(batch, length, heads, width)
        log_sums_BHL = qkv_BL3HD.new_empty(batch, heads, length, dtype=torch.float32)
        with on(qkv_BL3HD):
            scale_attention_forward_kernel[(triton.cdiv(length, TILE), batch * heads)](
                qkv_BL3HD, scale_H, bounds_2L, out_BLHD, log_sums_BHL, length, softmax_scale * LOG2E, floor,
                **_constants(qkv_BL3HD, scale_H),
            )  # fmt: skip
        ctx.save_for_backward(qkv_BL3HD, scale_H, bounds_2L, out_BLHD, log_sums_BHL)
        ctx.softmax_scale, ctx.floor = softmax_scale, floor
        return out_BLHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLHD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BL3HD, scale_H, bounds_2L, out_BLHD, log_sums_BHL = ctx.saved_tensors
        batch, length, _, heads, _ = qkv_BL3HD.shape
        dout_BLHD = dout_BLHD.contiguous()
        dqkv_BL3HD, inner_BHL = torch.empty_like(qkv_BL3HD), torch.empty_like(log_sums_BHL)
        tiles = triton.cdiv(length, TILE)
        dscale_BHL = None if scale_H is None else torch.empty_like(log_sums_BHL)
        constants = _constants(qkv_BL3HD, scale_H)
        with on(qkv_BL3HD):
            scale_attention_query_gradient_kernel[(tiles, batch * heads)](
                qkv_BL3HD, scale_H, bounds_2L, out_BLHD, dout_BLHD, log_sums_BHL, inner_BHL, dqkv_BL3HD, dscale_BHL,
                length, ctx.softmax_scale, ctx.softmax_scale * LOG2E, ctx.floor, **constants,
            )  # fmt: skip
            scale_attention_key_value_gradient_kernel[(tiles, batch * heads)](
                qkv_BL3HD, scale_H, bounds_2L, dout_BLHD, log_sums_BHL, inner_BHL, dqkv_BL3HD,
                length, ctx.softmax_scale, ctx.softmax_scale * LOG2E, ctx.floor, **constants,
            )  # fmt: skip
        dscale_H = None if dscale_BHL is None else dscale_BHL.sum((0, 2)).to(scale_H.dtype)
        return dqkv_BL3HD, dscale_H, None, None, None


def _constants(qkv_BL3HD: Tensor, scale_H: Tensor | None) -> dict[str, Any]:
    heads, width = qkv_BL3HD.shape[3:]
    return {
        "HEADS": heads,
        "WIDTH": width,
        "LANES": max(LEAST, block(width)),
        "UNIT": scale_H is not None,
        "TILE": TILE,
        "num_warps": WARPS,
        "num_stages": STAGES,
    }


@triton.jit(do_not_specialize=("length",))
def scale_attention_forward_kernel(
    qkv_ptr,
    scale_ptr,
    bounds_ptr,
    out_ptr,
    log_sums_ptr,
    length,
    log_scale,
    floor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Softmax as it goes; sums of exponentials are kept as logarithms to the base 2."""
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    low, high = _bounds(bounds_ptr, row, length)
    qkv_ptr += image * length * (3 * HEADS * WIDTH) + head * WIDTH
    scale = _scale(scale_ptr, head, UNIT)
    q = _vectors(qkv_ptr, row, row < length, scale, floor, HEADS, WIDTH, LANES, UNIT)
    most = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    out = tl.zeros((TILE, LANES), tl.float32)
    end = tl.max(high, 0)
    for start in tl.range(tl.min(low, 0), end, TILE):
        column = start + tl.arange(0, TILE)
        k = _vectors(qkv_ptr + HEADS * WIDTH, column, column < end, 1.0, floor, HEADS, WIDTH, LANES, UNIT)
        v = _rows(qkv_ptr + 2 * HEADS * WIDTH, column, column < end, 3 * HEADS * WIDTH, WIDTH, LANES)
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale, -1e30)
        now = tl.maximum(most, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - now[:, None]), 0.0)
        shrink = tl.exp2(most - now)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = now
    out_ptr += image * length * (HEADS * WIDTH) + head * WIDTH
    _store_rows(out_ptr, out / total[:, None], row, row < length, HEADS * WIDTH, WIDTH, LANES)
    tl.store(log_sums_ptr + tl.program_id(1).to(tl.int64) * length + row, most + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=("length",))
def scale_attention_query_gradient_kernel(
    qkv_ptr,
    scale_ptr,
    bounds_ptr,
    out_ptr,
    dout_ptr,
    log_sums_ptr,
    inner_ptr,
    dqkv_ptr,
    dscale_ptr,
    length,
    softmax_scale,
    log_scale,
    floor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile's dq, its part of the scale's gradient, and out . dout of each token, which the other kernel needs too."""
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = row < length
    low, high = _bounds(bounds_ptr, row, length)
    to_image = image * length * (HEADS * WIDTH) + head * WIDTH
    qkv_ptr += 3 * image * length * (HEADS * WIDTH) + head * WIDTH
    per_token = tl.program_id(1).to(tl.int64) * length
    scale = _scale(scale_ptr, head, UNIT)
    q = _vectors(qkv_ptr, row, here, scale, floor, HEADS, WIDTH, LANES, UNIT)
    dout = _rows(dout_ptr + to_image, row, here, HEADS * WIDTH, WIDTH, LANES)
    out = _rows(out_ptr + to_image, row, here, HEADS * WIDTH, WIDTH, LANES)
    inner = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(inner_ptr + per_token + row, inner, mask=here)
    log_sum = tl.load(log_sums_ptr + per_token + row, mask=here, other=0.0)
    dq = tl.zeros((TILE, LANES), tl.float32)
    end = tl.max(high, 0)
    for start in tl.range(tl.min(low, 0), end, TILE):
        column = start + tl.arange(0, TILE)
        k = _vectors(qkv_ptr + HEADS * WIDTH, column, column < end, 1.0, floor, HEADS, WIDTH, LANES, UNIT)
        v = _rows(qkv_ptr + 2 * HEADS * WIDTH, column, column < end, 3 * HEADS * WIDTH, WIDTH, LANES)
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale - log_sum[:, None]
        weights = tl.exp2(tl.where(seen, scores, -1e30))
        dscores = weights * (tl.dot(dout, tl.trans(v), input_precision="ieee") - inner[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision="ieee")
    dq *= softmax_scale
    if UNIT:
        raw = _rows(qkv_ptr, row, here, 3 * HEADS * WIDTH, WIDTH, LANES).to(tl.float32)
        dq, along = _through_norm(raw, dq, scale, floor)
        tl.store(dscale_ptr + per_token + row, along, mask=here)
    _store_rows(
        dqkv_ptr + 3 * image * length * (HEADS * WIDTH) + head * WIDTH, dq, row, here, 3 * HEADS * WIDTH, WIDTH, LANES
    )


@triton.jit(do_not_specialize=("length",))
def scale_attention_key_value_gradient_kernel(
    qkv_ptr,
    scale_ptr,
    bounds_ptr,
    dout_ptr,
    log_sums_ptr,
    inner_ptr,
    dqkv_ptr,
    length,
    softmax_scale,
    log_scale,
    floor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile's dk and dv: rows are keys here, columns the queries that see them."""
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = row < length
    low, high = _bounds(bounds_ptr, row, length)
    dout_ptr += image * length * (HEADS * WIDTH) + head * WIDTH
    qkv_ptr += 3 * image * length * (HEADS * WIDTH) + head * WIDTH
    dqkv_ptr += 3 * image * length * (HEADS * WIDTH) + head * WIDTH
    per_token = tl.program_id(1).to(tl.int64) * length
    scale = _scale(scale_ptr, head, UNIT)
    k = _vectors(qkv_ptr + HEADS * WIDTH, row, here, 1.0, floor, HEADS, WIDTH, LANES, UNIT)
    v = _rows(qkv_ptr + 2 * HEADS * WIDTH, row, here, 3 * HEADS * WIDTH, WIDTH, LANES)
    dk = tl.zeros((TILE, LANES), tl.float32)
    dv = tl.zeros((TILE, LANES), tl.float32)
    end = tl.max(high, 0)
    for start in tl.range(tl.min(low, 0), end, TILE):
        column = start + tl.arange(0, TILE)
        q = _vectors(qkv_ptr, column, column < end, scale, floor, HEADS, WIDTH, LANES, UNIT)
        dout = _rows(dout_ptr, column, column < end, HEADS * WIDTH, WIDTH, LANES)
        log_sum = tl.load(log_sums_ptr + per_token + column, mask=column < end, other=0.0)
        inner = tl.load(inner_ptr + per_token + column, mask=column < end, other=0.0)
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * log_scale - log_sum[None, :]
        weights = tl.exp2(tl.where(seen, scores, -1e30))
        dv += tl.dot(weights.to(dout.dtype), dout, input_precision="ieee")
        dscores = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - inner[None, :])
        dk += tl.dot(dscores.to(q.dtype), q, input_precision="ieee")
    dk *= softmax_scale
    if UNIT:
        raw = _rows(qkv_ptr + HEADS * WIDTH, row, here, 3 * HEADS * WIDTH, WIDTH, LANES).to(tl.float32)
        dk, _ = _through_norm(raw, dk, 1.0, floor)
    _store_rows(dqkv_ptr + HEADS * WIDTH, dk, row, here, 3 * HEADS * WIDTH, WIDTH, LANES)
    _store_rows(dqkv_ptr + 2 * HEADS * WIDTH, dv, row, here, 3 * HEADS * WIDTH, WIDTH, LANES)


@triton.jit
def _bounds(bounds_ptr, row, length):
    """Of rows beyond the last token: none."""
    low = tl.load(bounds_ptr + row, mask=row < length, other=2147483647)
    high = tl.load(bounds_ptr + length + row, mask=row < length, other=0)
    return low, high


@triton.jit
def _scale(scale_ptr, head, UNIT: tl.constexpr):
    scale = 1.0
    if UNIT:
        scale = tl.load(scale_ptr + head).to(tl.float32)
    return scale


@triton.jit
def _rows(ptr, row, here, stride, WIDTH: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    return tl.load(ptr + row[:, None] * stride + lane[None, :], mask=here[:, None] & (lane < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, x, row, here, stride, WIDTH: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    at = ptr + row[:, None] * stride + lane[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=here[:, None] & (lane < WIDTH)[None, :])


@triton.jit
def _vectors(
    ptr, row, here, scale, floor, HEADS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr
):
    """q or k as they enter the products, rounded as torch rounds them."""
    x = _rows(ptr, row, here, 3 * HEADS * WIDTH, WIDTH, LANES)
    if UNIT:
        wide = x.to(tl.float32)
        factor = scale / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), floor)
        x = (wide * factor[:, None]).to(x.dtype)
    return x


@triton.jit
def _through_norm(x, dout, scale, floor):
    """Gradient of x in out = scale * x / max(|x|, floor), and of the scale. Below the floor the length is constant."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = 1.0 / tl.maximum(norm, floor)
    along = tl.sum(x * dout, 1) * inverse
    back = tl.where(norm >= floor, along * inverse, 0.0)
    return (scale * inverse)[:, None] * (dout - x * back[:, None]), along
