"""Which arithmetic each part of the model runs in.

The big matmuls run in the *compute* dtype: autocast's, or that of the weights when an engine has cast them. The parts
that half precision would spoil run *wide*: float32, or float64 for a model in float64.

A CPU without matrix instructions for a 16-bit dtype multiplies such matrices in float32 and rounds the result. That is
what the instructions compute, and here it is up to hundreds of times faster than torch's own 16-bit matmul.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the matmuls that use `weight`: autocast's where it is on, else the weight's own."""
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which autocast leaves dtypes alone on the tensor's device."""
    kind = tensor.device.type
    return torch.autocast("cpu" if kind == "meta" else kind, enabled=False)


@lru_cache(maxsize=2)
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU, through oneDNN, has matrix products of a 16-bit dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    asked = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, asked)())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what matrices of `dtype` are multiplied: `dtype` where the device can do that, else float32."""
    return torch.float32 if lacking(dtype, device) else dtype


def lacking(dtype: torch.dtype, device: torch.device) -> str:
    """Why matrices of `dtype` are not multiplied as such on that device; empty where they are."""
    if device.type != "cpu" or dtype not in HALF or _cpu_multiplies(dtype):
        return ""
    return f"this CPU has no instructions for {dtype}".replace("torch.", "")


@torch.library.custom_op("mvar::linear_by_fp32", mutates_args=())
def linear_by_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of 16-bit tensors: products and sums in float32, the result rounded once.

    One operation to autograd and to selective recomputation, so that no float32 copy outlives it.
    """
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


@linear_by_fp32.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dy_RO = dy.float().flatten(0, -2)
    dx = (dy_RO @ weight.float()).view(x.shape).to(x.dtype) if wanted[0] else None
    dweight = (dy_RO.t() @ x.float().flatten(0, -2)).to(weight.dtype) if wanted[1] else None
    dbias = dy_RO.sum(0).to(dy.dtype) if ctx.has_bias and wanted[2] else None
    return dx, dweight, dbias


linear_by_fp32.register_autograd(_linear_backward, setup_context=_save_operands)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the compute dtype, the fastest way that the device has."""
    dtype = compute_dtype(weight)
    if product_dtype(dtype, x.device) == dtype:
        return F.linear(x, weight, bias)
    with no_autocast(x):
        result: Tensor = linear_by_fp32(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return result


class Linear(nn.Linear):
    """The linear layer of the big matmuls."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class WideLinear(nn.Linear):
    """A linear layer that computes wide, whatever its weights are stored in and whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        with no_autocast(x):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class Embedding(nn.Embedding):
    """An embedding that is quick to make on the meta device: drawing no values there loads torch's compiler."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class WideEmbedding(Embedding):
    """An embedding whose rows come out wide."""

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index).to(wide(self.weight.dtype))
