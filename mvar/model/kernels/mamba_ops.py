"""Mamba-2's convolution and gated norm in plain torch, with backward passes written by hand.

Autograd would chain a dozen operations that each read and write whole activations, and would store most of them. Here
only the inputs are kept, and the backward pass goes over tiles that stay in the cache.
Shapes: B batch, L tokens, K convolved channels, W convolution width, I inner channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvar.model.kernels.blocking import tiles
from mvar.model.kernels.precision import product_dtype, wide


def causal_conv(x_BLK: Tensor, tail_BVK: Tensor | None, weight_KW: Tensor, bias_K: Tensor) -> Tensor:
    """SiLU of the depthwise causal convolution, (B, L, K). `tail_BVK`: the W - 1 rows before x, zeros if None."""
    out: Tensor = _CausalConv.apply(x_BLK, tail_BVK, weight_KW, bias_K)  # type: ignore[no-untyped-call]
    return out


def gated_norm(y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """RMS norm of y * SiLU(z) times `weight`, computed wide, in y's dtype."""
    out: Tensor = _GatedNorm.apply(y_BLI, z_BLI, weight_I, eps)  # type: ignore[no-untyped-call]
    return out


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLK: Tensor, tail_BVK: Tensor | None, weight_KW: Tensor, bias_K: Tensor) -> Tensor:
        ctx.save_for_backward(x_BLK, tail_BVK, weight_KW, bias_K)
        long_BLK = _prefixed(x_BLK, tail_BVK, weight_KW)
        return F.silu(_depthwise(long_BLK, weight_KW, bias_K), inplace=True).to(x_BLK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLK: Tensor) -> tuple[Tensor | None, ...]:
        x_BLK, tail_BVK, weight_KW, bias_K = ctx.saved_tensors
        length, rows_before = x_BLK.shape[1], weight_KW.shape[1] - 1
        long_BLK = _prefixed(x_BLK, tail_BVK, weight_KW)
        pre_BLK = _depthwise(long_BLK, weight_KW, bias_K)
        dpre_BLK = torch.ops.aten.silu_backward(dout_BLK.to(pre_BLK.dtype), pre_BLK)
        dlong_BLK = _depthwise(dpre_BLK, weight_KW.flip(1), None, pad=rows_before)
        dweight_WK = torch.zeros_like(weight_KW.t(), dtype=wide(weight_KW.dtype))
        dbias_K = torch.zeros_like(bias_K, dtype=wide(bias_K.dtype))
        for images, tokens in tiles(len(x_BLK), length, x_BLK.shape[2], x_BLK.device):
            dpre = dpre_BLK[images, tokens]
            dbias_K += dpre.sum((0, 1), dtype=dbias_K.dtype)
            for tap in range(rows_before + 1):
                seen = long_BLK[images, tokens.start + tap : tokens.stop + tap]
                dweight_WK[tap] += (dpre * seen).sum((0, 1), dtype=dweight_WK.dtype)
        dtail_BVK = None if tail_BVK is None else dlong_BLK[:, :rows_before].to(tail_BVK.dtype)
        dx_BLK = dlong_BLK[:, rows_before:].to(x_BLK.dtype)
        return dx_BLK, dtail_BVK, dweight_WK.t().to(weight_KW.dtype), dbias_K.to(bias_K.dtype)


def _prefixed(x_BLK: Tensor, tail_BVK: Tensor | None, weight_KW: Tensor) -> Tensor:
    """In the dtype to convolve in."""
    x_BLK = x_BLK.to(product_dtype(x_BLK.dtype, x_BLK.device))
    if tail_BVK is None:
        return F.pad(x_BLK, (0, 0, weight_KW.shape[1] - 1, 0))
    return torch.cat((tail_BVK.to(x_BLK.dtype), x_BLK), dim=1)


def _depthwise(x_BLK: Tensor, weight_KW: Tensor, bias_K: Tensor | None, pad: int = 0) -> Tensor:
    # As an image of height 1 in channels-last layout: the memory stays as it is, and oneDNN has a fast kernel for it.
    image_BK1L = x_BLK.transpose(1, 2).unsqueeze(2)
    weight_K11W = weight_KW.to(x_BLK.dtype)[:, None, None, :]
    bias_K = None if bias_K is None else bias_K.to(x_BLK.dtype)
    return F.conv2d(image_BK1L, weight_K11W, bias_K, padding=(0, pad), groups=len(weight_KW)).squeeze(2).transpose(1, 2)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y_BLI, z_BLI, weight_I)
        ctx.eps = eps
        dtype = wide(y_BLI.dtype)
        weight_I = weight_I.to(dtype)
        batch, length, channels = y_BLI.shape
        out_BLI = torch.empty(y_BLI.shape, dtype=y_BLI.dtype, device=y_BLI.device)
        for at in tiles(batch, length, channels, y_BLI.device):
            gated = F.silu(z_BLI[at].to(dtype)).mul_(y_BLI[at])
            out_BLI[at] = gated.mul_(_inverse_rms(gated, eps)).mul_(weight_I)
        return out_BLI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLI: Tensor) -> tuple[Tensor | None, ...]:
        y_BLI, z_BLI, weight_I = ctx.saved_tensors
        dtype = wide(y_BLI.dtype)
        wide_weight_I = weight_I.to(dtype)
        dweight_I = torch.zeros_like(wide_weight_I)
        batch, length, channels = y_BLI.shape
        dy_BLI = torch.empty(y_BLI.shape, dtype=y_BLI.dtype, device=y_BLI.device)
        dz_BLI = torch.empty_like(dy_BLI)
        for at in tiles(batch, length, channels, y_BLI.device):
            y, z = y_BLI[at].to(dtype), z_BLI[at].to(dtype)
            gate = F.silu(z)
            unit = y * gate
            inverse = _inverse_rms(unit, ctx.eps)
            unit.mul_(inverse)
            dunit = dout_BLI[at] * unit
            dweight_I += dunit.sum((0, 1))
            mean = dunit.mul_(wide_weight_I).mean(-1, keepdim=True)
            dgated = torch.mul(dout_BLI[at], wide_weight_I).sub_(unit.mul_(mean)).mul_(inverse)
            dy_BLI[at] = gate.mul_(dgated)
            dz_BLI[at] = torch.ops.aten.silu_backward(dgated.mul_(y), z)
        return dy_BLI, dz_BLI, dweight_I.to(weight_I.dtype), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
