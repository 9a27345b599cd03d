"""`gated_norm` as two Triton kernels. A program owns a run of tokens and adds up the weight's gradient in registers.

`forward` and `backward` work without autograd, for a caller that has the mixer's whole backward pass in hand.
Shapes: B batch, L tokens, I inner channels, T = B*L tokens, R runs of tokens.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads annotations of kernels as names of its own types.

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvar.model.kernels.launch import block, cut, on, rows, warps

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4096, 1024
FORWARD_STAGES, BACKWARD_STAGES = 2, 2


def fused(y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """RMS norm of y * SiLU(z) times `weight`, in y's dtype."""
    out: Tensor = _GatedNorm.apply(y_BLI, z_BLI, weight_I, eps)  # type: ignore[no-untyped-call]
    return out


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
        out_BLI, rstd_T = forward(y_BLI, z_BLI, weight_I, eps)
        ctx.save_for_backward(y_BLI, z_BLI, weight_I, rstd_T)
        return out_BLI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLI: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dout_BLI, *ctx.saved_tensors), None


def forward(y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result (B, L, I), and what each token was multiplied with (B*L), float32."""
    y_TI, z_TI, weight_I = rows(y_BLI), rows(z_BLI), weight_I.contiguous()
    count, width = y_TI.shape
    out_BLI = torch.empty(y_BLI.shape, dtype=y_BLI.dtype, device=y_BLI.device)
    rstd_T = out_BLI.new_empty(count, dtype=torch.float32)
    runs, each = cut(count, FORWARD_PROGRAMS)
    if count:
        with on(y_BLI):
            gated_norm_forward_kernel[(runs,)](
                y_TI, z_TI, weight_I, out_BLI, rstd_T, count, each, y_TI.stride(0), z_TI.stride(0), eps,
                WIDTH=width, BLOCK=block(width), Z_ALIGNED=_aligned(z_TI), STAGES=FORWARD_STAGES,
                num_warps=warps(block(width)),
            )  # fmt: skip
    return out_BLI, rstd_T


def backward(
    dout_BLI: Tensor, y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, rstd_T: Tensor, dz_BLI: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and the weight. `dz_BLI`: where z's shall be written, a slice of evenly spaced rows."""
    dout_TI, y_TI, z_TI, weight_I = rows(dout_BLI), rows(y_BLI), rows(z_BLI), weight_I.contiguous()
    count, width = y_TI.shape
    dy_BLI = torch.empty(y_BLI.shape, dtype=y_BLI.dtype, device=y_BLI.device)
    dz_BLI = torch.empty(z_BLI.shape, dtype=z_BLI.dtype, device=z_BLI.device) if dz_BLI is None else dz_BLI
    dz_TI = dz_BLI.view(-1, width)
    runs, each = cut(count, BACKWARD_PROGRAMS)
    partial_RI = dy_BLI.new_empty(runs, width, dtype=torch.float32)
    if count:
        with on(y_BLI):
            gated_norm_backward_kernel[(runs,)](
                dout_TI, y_TI, z_TI, weight_I, rstd_T, dy_BLI, dz_TI, partial_RI,
                count, each, dout_TI.stride(0), y_TI.stride(0), z_TI.stride(0), dz_TI.stride(0),
                WIDTH=width, BLOCK=block(width), Z_ALIGNED=_aligned(z_TI), DZ_ALIGNED=_aligned(dz_TI),
                STAGES=BACKWARD_STAGES, num_warps=warps(block(width)),
            )  # fmt: skip
    return dy_BLI, dz_BLI, partial_RI.sum(0).to(weight_I.dtype)


def _aligned(x_TI: Tensor) -> int:
    """What the distance of rows is a multiple of, up to 16. Triton itself asks for 16 or believes in 1."""
    return math.gcd(x_TI.stride(0), 16)


@triton.jit(do_not_specialize=("count", "each"))
def gated_norm_forward_kernel(
    y_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    rstd_ptr,
    count,
    each,
    y_stride,
    z_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    Z_ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows [run * each, ...)."""
    c = tl.arange(0, BLOCK)
    inside = c < WIDTH
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * each
    last = tl.minimum(first + each, count)
    for row in tl.range(first, last, num_stages=STAGES):
        y = tl.load(y_ptr + row * y_stride + c, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + tl.multiple_of(row * z_stride, Z_ALIGNED) + c, mask=inside, other=0.0).to(tl.float32)
        gated = y * z * tl.sigmoid(z)
        rstd = tl.rsqrt(tl.sum(gated * gated, 0) / WIDTH + eps)
        out = gated * rstd * weight
        tl.store(out_ptr + row * WIDTH + c, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=("count", "each"))
def gated_norm_backward_kernel(
    dout_ptr,
    y_ptr,
    z_ptr,
    weight_ptr,
    rstd_ptr,
    dy_ptr,
    dz_ptr,
    dweight_ptr,
    count,
    each,
    dout_stride,
    y_stride,
    z_stride,
    dz_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    Z_ALIGNED: tl.constexpr,
    DZ_ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows as in the forward pass."""
    c = tl.arange(0, BLOCK)
    inside = c < WIDTH
    KEEP: tl.constexpr = BLOCK <= 4096  # of wider rows there would be more than the registers hold
    if KEEP:
        weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * each
    last = tl.minimum(first + each, count)
    for row in tl.range(first, last, num_stages=STAGES):
        dout = tl.load(dout_ptr + row * dout_stride + c, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_stride + c, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + tl.multiple_of(row * z_stride, Z_ALIGNED) + c, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        sigmoid = tl.sigmoid(z)
        gate = z * sigmoid
        unit = y * gate * rstd
        dweight += dout * unit
        if not KEEP:
            weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
        dunit = dout * weight
        along = tl.sum(dunit * unit, 0) / WIDTH
        dgated = rstd * (dunit - unit * along)
        dy = dgated * gate
        dz = dgated * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(dy_ptr + row * WIDTH + c, dy.to(dy_ptr.dtype.element_ty), mask=inside)
        tl.store(dz_ptr + tl.multiple_of(row * dz_stride, DZ_ALIGNED) + c, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * WIDTH + c, dweight, mask=inside)
