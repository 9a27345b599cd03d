"""`fused.unit_heads` as two Triton kernels. Backward writes the gradient of the whole projection, v's part included.

A program owns a run of tokens and a group of heads: the largest power of two that divides their number, so that no lane
is idle, whatever the depth. A head is at least one whole line of memory.
Shapes: B batch, L tokens, H heads, D head width, T = B*L tokens, R runs of tokens, G heads of a group.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads annotations of kernels as names of its own types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvar.model.kernels.launch import cut, on

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4096, 2048
FORWARD_STAGES, BACKWARD_STAGES = 2, 2
TILE = 2048
"""Elements of each tensor that a program holds at once."""
WARPS = 8


def fused(qkv_BL3HD: Tensor, scale_H: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in qkv's dtype; v is a view of qkv."""
    out: tuple[Tensor, Tensor, Tensor] = _QKNorm.apply(qkv_BL3HD, scale_H, floor)  # type: ignore[no-untyped-call]
    return out


class _QKNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BL3HD: Tensor, scale_H: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
        qkv_BL3HD, scale_H = qkv_BL3HD.contiguous(), scale_H.contiguous()
        batch, length, _, heads, head_width = qkv_BL3HD.shape
        q_BLHD = qkv_BL3HD.new_empty(batch, length, heads, head_width)
        k_BLHD = torch.empty_like(q_BLHD)
        group, tile = grouping(heads, head_width)
        runs, tokens = cut(batch * length, FORWARD_PROGRAMS * group // heads, tile)
        if q_BLHD.numel():
            with on(qkv_BL3HD):
                qk_norm_forward_kernel[(runs * (heads // group),)](
                    qkv_BL3HD, scale_H, q_BLHD, k_BLHD, batch * length, tokens, floor,
                    HEADS=heads, WIDTH=head_width, GROUP=group, TILE=tile, STAGES=FORWARD_STAGES, num_warps=WARPS,
                )  # fmt: skip
        ctx.save_for_backward(qkv_BL3HD, scale_H)
        ctx.floor = floor
        return q_BLHD, k_BLHD, qkv_BL3HD[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BLHD: Tensor, dk_BLHD: Tensor, dv_BLHD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BL3HD, scale_H = ctx.saved_tensors
        batch, length, _, heads, head_width = qkv_BL3HD.shape
        dq_THD, dk_THD, dv_THD = (_tokens(t) for t in (dq_BLHD, dk_BLHD, dv_BLHD))
        dqkv_BL3HD = torch.empty_like(qkv_BL3HD)
        group, tile = grouping(heads, head_width)
        runs, tokens = cut(batch * length, BACKWARD_PROGRAMS * group // heads, tile)
        partial = qkv_BL3HD.new_empty(runs, heads // group, tile, group, dtype=torch.float32)
        if qkv_BL3HD.numel():
            with on(qkv_BL3HD):
                qk_norm_backward_kernel[(runs * (heads // group),)](
                    qkv_BL3HD, scale_H, dq_THD, dk_THD, dv_THD, dqkv_BL3HD, partial,
                    batch * length, tokens, dq_THD.stride(0), dk_THD.stride(0), dv_THD.stride(0), ctx.floor,
                    HEADS=heads, WIDTH=head_width, GROUP=group, TILE=tile, STAGES=BACKWARD_STAGES, num_warps=WARPS,
                )  # fmt: skip
        return dqkv_BL3HD, partial.sum((0, 2)).flatten().to(scale_H.dtype), None


def grouping(heads: int, head_width: int) -> tuple[int, int]:
    """Heads of a group, and how many tokens a program takes at once."""
    most = max(1, TILE // head_width)
    group = min(heads & -heads, most)
    return group, most // group


def _tokens(x_BLHD: Tensor) -> Tensor:
    """(B*L, H, D) whose heads lie side by side; a copy only where the strides demand it."""
    batch, length, _, head_width = x_BLHD.shape
    if x_BLHD.stride()[2:] == (head_width, 1) and (batch == 1 or x_BLHD.stride(0) == length * x_BLHD.stride(1)):
        return x_BLHD.flatten(0, 1)
    return x_BLHD.contiguous().flatten(0, 1)


@triton.jit(do_not_specialize=("tokens", "each"))
def qk_norm_forward_kernel(
    qkv_ptr,
    scale_ptr,
    q_ptr,
    k_ptr,
    tokens,
    each,
    floor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`each` tokens from the run's first, TILE of them at once; rows of a tile are (token, head)."""
    run = tl.program_id(0) // (HEADS // GROUP)
    rows = tl.arange(0, TILE * GROUP)
    head = (tl.program_id(0) % (HEADS // GROUP)) * GROUP + rows % GROUP
    inside_row = head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    scale = tl.load(scale_ptr + head).to(tl.float32)
    first = run * each
    last = tl.minimum(first + each, tokens)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        token = start + rows // GROUP
        here = (token < last)[:, None]
        token = token.to(tl.int64)[:, None]
        at = token * (3 * HEADS * WIDTH) + inside_row
        to = token * (HEADS * WIDTH) + inside_row
        q = tl.load(qkv_ptr + at, mask=here, other=0.0).to(tl.float32)
        k = tl.load(qkv_ptr + HEADS * WIDTH + at, mask=here, other=0.0).to(tl.float32)
        q *= (scale / tl.maximum(tl.sqrt(tl.sum(q * q, 1)), floor))[:, None]
        k *= (1.0 / tl.maximum(tl.sqrt(tl.sum(k * k, 1)), floor))[:, None]
        tl.store(q_ptr + to, q.to(q_ptr.dtype.element_ty), mask=here)
        tl.store(k_ptr + to, k.to(k_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=("tokens", "each"))
def qk_norm_backward_kernel(
    qkv_ptr,
    scale_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dqkv_ptr,
    dscale_ptr,
    tokens,
    each,
    dq_stride,
    dk_stride,
    dv_stride,
    floor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As the forward pass. Strides: elements from token to token of the gradients that come in."""
    run = tl.program_id(0) // (HEADS // GROUP)
    rows = tl.arange(0, TILE * GROUP)
    head = (tl.program_id(0) % (HEADS // GROUP)) * GROUP + rows % GROUP
    inside_row = head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    scale = tl.load(scale_ptr + head).to(tl.float32)
    dscale = tl.zeros((TILE * GROUP,), tl.float32)
    first = run * each
    last = tl.minimum(first + each, tokens)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        token = start + rows // GROUP
        here = (token < last)[:, None]
        token = token.to(tl.int64)[:, None]
        at = token * (3 * HEADS * WIDTH) + inside_row
        q = tl.load(qkv_ptr + at, mask=here, other=0.0).to(tl.float32)
        dq = tl.load(dq_ptr + token * dq_stride + inside_row, mask=here, other=0.0).to(tl.float32)
        dq, along = _project(q, dq, floor, scale)
        dscale += along
        tl.store(dqkv_ptr + at, dq.to(dqkv_ptr.dtype.element_ty), mask=here)
        k = tl.load(qkv_ptr + HEADS * WIDTH + at, mask=here, other=0.0).to(tl.float32)
        dk = tl.load(dk_ptr + token * dk_stride + inside_row, mask=here, other=0.0).to(tl.float32)
        dk, _ = _project(k, dk, floor, 1.0)
        tl.store(dqkv_ptr + HEADS * WIDTH + at, dk.to(dqkv_ptr.dtype.element_ty), mask=here)
        dv = tl.load(dv_ptr + token * dv_stride + inside_row, mask=here, other=0.0)
        tl.store(dqkv_ptr + 2 * HEADS * WIDTH + at, dv.to(dqkv_ptr.dtype.element_ty), mask=here)
    tl.store(dscale_ptr + tl.program_id(0).to(tl.int64) * (TILE * GROUP) + rows, dscale)


@triton.jit
def _project(x, dout, floor, scale):
    """Gradient of x in out = scale * x / max(|x|, floor), and of the scale. Below the floor the length is constant."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = 1.0 / tl.maximum(norm, floor)
    along = tl.sum(x * dout, 1) * inverse
    back = tl.where(norm >= floor, along * inverse, 0.0)
    return (scale * inverse)[:, None] * (dout - x * back[:, None]), along
