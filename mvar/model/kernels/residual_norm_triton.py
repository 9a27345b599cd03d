"""`fused.residual_norm` as two Triton kernels: one pass over the tokens forward, one backward.

A program owns a run of rows of one image, so that the image's vectors are read once for many rows and their gradients
add up in registers. Programs write what they have added up side by side; one more sum in a fixed order ends it.
Shapes: B batch, L tokens, C width, P runs of an image.
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

from mvar.model.kernels.launch import block, cut, on, warps

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4096, 1024
"""About how many programs share the rows: several for each place that the largest card has."""
FORWARD_STAGES, BACKWARD_STAGES = 2, 2
"""Rows on their way at once: while one is worked on, the next is loaded."""


def fused(
    x_BLC: Tensor,
    h_BLC: Tensor | None,
    gate_BC: Tensor | None,
    scale_BC: Tensor | None,
    shift_BC: Tensor | None,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """x' (float32) and y (`dtype`); without h x' is x, without scale and shift y is None."""
    out: tuple[Tensor, Tensor | None] = _ResidualNorm.apply(  # type: ignore[no-untyped-call]
        x_BLC, h_BLC, gate_BC, scale_BC, shift_BC, dtype, eps
    )
    return out


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLC: Tensor,
        h_BLC: Tensor | None,
        gate_BC: Tensor | None,
        scale_BC: Tensor | None,
        shift_BC: Tensor | None,
        dtype: torch.dtype,
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, width = x_BLC.shape
        row_x_BLC = x_BLC.contiguous()
        h_BLC = None if h_BLC is None else h_BLC.contiguous()
        gate_BC, scale_BC, shift_BC = (_vectors(t) for t in (gate_BC, scale_BC, shift_BC))
        new_BLC = None if h_BLC is None else torch.empty_like(row_x_BLC)
        y_BLC = mean_BL = rstd_BL = None
        if scale_BC is not None:
            y_BLC = torch.empty_like(row_x_BLC, dtype=dtype)
            mean_BL, rstd_BL = row_x_BLC.new_empty(2, batch, length).unbind()
        parts, rows = cut(length, max(1, FORWARD_PROGRAMS // max(batch, 1)))
        if x_BLC.numel():
            with on(x_BLC):
                residual_norm_forward_kernel[(batch * parts,)](
                    row_x_BLC, h_BLC, gate_BC, scale_BC, shift_BC, new_BLC, y_BLC, mean_BL, rstd_BL,
                    length, parts, rows, _stride(gate_BC), _stride(scale_BC), _stride(shift_BC), eps,
                    WIDTH=width, BLOCK=block(width), STAGES=FORWARD_STAGES, num_warps=warps(block(width)),
                )  # fmt: skip
        kept_BLC = row_x_BLC if new_BLC is None else new_BLC
        ctx.save_for_backward(
            None if scale_BC is None else kept_BLC, h_BLC, gate_BC, scale_BC, shift_BC, mean_BL, rstd_BL
        )
        ctx.set_materialize_grads(False)
        return x_BLC if new_BLC is None else new_BLC, y_BLC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnew_BLC: Tensor | None, dy_BLC: Tensor | None) -> tuple[Tensor | None, ...]:
        new_BLC, h_BLC, gate_BC, scale_BC, shift_BC, mean_BL, rstd_BL = ctx.saved_tensors
        if dy_BLC is None and scale_BC is not None:  # as if there were no norm
            new_BLC = scale_BC = None
        if dnew_BLC is None and scale_BC is None:
            return (None,) * 7
        if scale_BC is None and h_BLC is None:
            return dnew_BLC, *(None,) * 6
        dnew_BLC, dy_BLC = (None if t is None else t.contiguous() for t in (dnew_BLC, dy_BLC))
        some_BLC = dnew_BLC if dnew_BLC is not None else dy_BLC
        assert some_BLC is not None
        batch, length, width = some_BLC.shape
        dx_BLC = dnew_BLC if scale_BC is None else torch.empty_like(some_BLC, dtype=torch.float32)
        dh_BLC = None if h_BLC is None else torch.empty_like(h_BLC)
        parts, rows = cut(length, max(1, BACKWARD_PROGRAMS // max(batch, 1)))
        partial_3BPC = some_BLC.new_empty(3, batch, parts, width, dtype=torch.float32)
        dgate, dscale, dshift = partial_3BPC.unbind()
        if some_BLC.numel():
            with on(some_BLC):
                residual_norm_backward_kernel[(batch * parts,)](
                    new_BLC, h_BLC, gate_BC, scale_BC, mean_BL, rstd_BL, dnew_BLC, dy_BLC,
                    None if scale_BC is None else dx_BLC, dh_BLC, dgate, dscale, dshift,
                    length, parts, rows, _stride(gate_BC), _stride(scale_BC),
                    WIDTH=width, BLOCK=block(width), STAGES=BACKWARD_STAGES, num_warps=warps(block(width)),
                )  # fmt: skip
        used = slice(0 if h_BLC is not None else 1, 3 if scale_BC is not None else 1)
        sums_BC: list[Tensor | None] = [None] * 3
        sums_BC[used] = partial_3BPC[used].sum(2).unbind()
        dgate_BC, dscale_BC, dshift_BC = (
            None if total is None else total.to(vectors.dtype)
            for total, vectors in zip(sums_BC, (gate_BC, scale_BC, shift_BC), strict=True)
        )
        return dx_BLC, dh_BLC, dgate_BC, dscale_BC, dshift_BC, None, None


def _vectors(vector_BC: Tensor | None) -> Tensor | None:
    """With contiguous rows; a slice of all conditioning vectors has them."""
    return vector_BC if vector_BC is None or vector_BC.stride(-1) == 1 else vector_BC.contiguous()


def _stride(vector_BC: Tensor | None) -> int:
    return 0 if vector_BC is None else vector_BC.stride(0)


@triton.jit(do_not_specialize=("length", "parts", "rows"))
def residual_norm_forward_kernel(
    x_ptr,
    h_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    new_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    length,
    parts,
    rows,
    gate_stride,
    scale_stride,
    shift_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows [run * rows, ...) of one image. No h: nothing is added; no scale: nothing is normed."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts) * rows
    last = tl.minimum(first + rows, length)
    c = tl.arange(0, BLOCK)
    inside = c < WIDTH
    if h_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = 1.0 + tl.load(scale_ptr + image * scale_stride + c, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + image * shift_stride + c, mask=inside, other=0.0).to(tl.float32)
    for token in tl.range(first, last, num_stages=STAGES):
        row = image * length + token
        at = row * WIDTH + c
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        if h_ptr is not None:
            x += tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32) * gate
            tl.store(new_ptr + at, x, mask=inside)
        if scale_ptr is not None:
            mean = tl.sum(x, 0) / WIDTH
            centred = tl.where(inside, x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
            y = centred * rstd * scale + shift
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
            tl.store(mean_ptr + row, mean)
            tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=("length", "parts", "rows"))
def residual_norm_backward_kernel(
    new_ptr,
    h_ptr,
    gate_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dnew_ptr,
    dy_ptr,
    dx_ptr,
    dh_ptr,
    dgate_ptr,
    dscale_ptr,
    dshift_ptr,
    length,
    parts,
    rows,
    gate_stride,
    scale_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows as in the forward pass. No scale: dx is dnew and not written; no dnew: x' was not used further."""
    program = tl.program_id(0)
    image = (program // parts).to(tl.int64)
    first = (program % parts) * rows
    last = tl.minimum(first + rows, length)
    c = tl.arange(0, BLOCK)
    inside = c < WIDTH
    if h_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
        dgate = tl.zeros((BLOCK,), tl.float32)
    if scale_ptr is not None:
        scale = 1.0 + tl.load(scale_ptr + image * scale_stride + c, mask=inside, other=0.0).to(tl.float32)
        dscale = tl.zeros((BLOCK,), tl.float32)
        dshift = tl.zeros((BLOCK,), tl.float32)
    for token in tl.range(first, last, num_stages=STAGES):
        row = image * length + token
        at = row * WIDTH + c
        if scale_ptr is not None:
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            unit = (tl.load(new_ptr + at, mask=inside, other=0.0) - tl.load(mean_ptr + row)) * rstd
            dunit = dy * scale
            # Lanes beyond the width hold dunit = 0, so they add nothing to either sum.
            along, level = tl.reduce((dunit * unit, dunit), 0, _add_pairs)
            dx = rstd * (dunit - level / WIDTH - unit * (along / WIDTH))
            dscale += dy * unit
            dshift += dy
            if dnew_ptr is not None:
                dx += tl.load(dnew_ptr + at, mask=inside, other=0.0)
            tl.store(dx_ptr + at, dx, mask=inside)
        else:
            dx = tl.load(dnew_ptr + at, mask=inside, other=0.0)
        if h_ptr is not None:
            dgate += dx * tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dh_ptr + at, (dx * gate).to(dh_ptr.dtype.element_ty), mask=inside)
    part = program.to(tl.int64) * WIDTH + c
    if h_ptr is not None:
        tl.store(dgate_ptr + part, dgate, mask=inside)
    if scale_ptr is not None:
        tl.store(dscale_ptr + part, dscale, mask=inside)
        tl.store(dshift_ptr + part, dshift, mask=inside)


@triton.jit
def _add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b
