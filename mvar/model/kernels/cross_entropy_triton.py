"""`cross_entropy` as two Triton kernels: logits are read once forward; read and their gradient written once backward.

Shapes: N tokens of all images, V vocabulary.
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

from mvar.model.kernels.launch import block, on, warps


def fused(logits_NV: Tensor, codes_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and nll, float32, and whether the likeliest word is the right one."""
    out: tuple[Tensor, Tensor, Tensor] = _CrossEntropy.apply(logits_NV, codes_N, smoothing)  # type: ignore[no-untyped-call]
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, codes_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        logits_NV, codes_N = logits_NV.contiguous(), codes_N.contiguous()
        count, words = logits_NV.shape
        total_N, loss_N, nll_N = logits_NV.new_empty(3, count, dtype=torch.float32).unbind()
        correct_N = torch.empty(count, dtype=torch.bool, device=logits_NV.device)
        if count:
            with on(logits_NV):
                cross_entropy_forward_kernel[(count,)](
                    logits_NV, codes_N, total_N, loss_N, nll_N, correct_N, smoothing,
                    WIDTH=words, BLOCK=block(words), SMOOTH=smoothing != 0, num_warps=warps(block(words)),
                )  # fmt: skip
        ctx.save_for_backward(logits_NV, codes_N, total_N)
        ctx.smoothing = smoothing
        ctx.mark_non_differentiable(nll_N, correct_N)
        return loss_N, nll_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_N: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NV, codes_N, total_N = ctx.saved_tensors
        count, words = logits_NV.shape
        dlogits_NV = torch.empty_like(logits_NV)
        if count:
            with on(logits_NV):
                cross_entropy_backward_kernel[(count,)](
                    logits_NV, codes_N, total_N, dloss_N.contiguous(), dlogits_NV, ctx.smoothing,
                    WIDTH=words, BLOCK=block(words), num_warps=warps(block(words)),
                )  # fmt: skip
        return dlogits_NV, None, None


@triton.jit
def cross_entropy_forward_kernel(
    logits_ptr,
    codes_ptr,
    total_ptr,
    loss_ptr,
    nll_ptr,
    correct_ptr,
    smoothing,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """One token. `total`: the logarithm of the sum of all words' exponentials."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < WIDTH
    code = tl.load(codes_ptr + row)
    known = (code >= 0) & (code < WIDTH)
    logits = tl.load(logits_ptr + row * WIDTH + c, mask=inside, other=float("-inf")).to(tl.float32)
    most, likeliest = tl.max(logits, 0, return_indices=True)
    total = most + tl.log(tl.sum(tl.exp(logits - most), 0))
    right = tl.load(logits_ptr + row * WIDTH + code, mask=known, other=float("nan")).to(tl.float32)
    nll = total - right
    loss = nll
    if SMOOTH:
        mean = tl.sum(tl.where(inside, logits, 0.0), 0) / WIDTH
        loss = (1.0 - smoothing) * nll + smoothing * (total - mean)
    tl.store(total_ptr + row, total)
    tl.store(loss_ptr + row, loss)
    tl.store(nll_ptr + row, nll)
    tl.store(correct_ptr + row, likeliest == code)


@triton.jit
def cross_entropy_backward_kernel(
    logits_ptr,
    codes_ptr,
    total_ptr,
    dloss_ptr,
    dlogits_ptr,
    smoothing,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: probabilities minus targets, times the loss's gradient."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < WIDTH
    at = row * WIDTH + c
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    target = tl.where(c == tl.load(codes_ptr + row), 1.0 - smoothing, 0.0) + smoothing / WIDTH
    dlogits = (tl.exp(logits - tl.load(total_ptr + row)) - target) * tl.load(dloss_ptr + row)
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)
