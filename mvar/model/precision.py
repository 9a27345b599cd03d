"""Which arithmetic each part of the model runs in.

The big matmuls run in the *compute* dtype: autocast's, or that of the weights when an engine has cast them. The parts
that half precision would spoil run *wide*: float32, or float64 for a model in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class WideLinear(nn.Linear):
    """A linear layer that computes wide, whatever its weights are stored in and whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        with no_autocast(x):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class WideEmbedding(nn.Embedding):
    """An embedding whose rows come out wide."""

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index).to(wide(self.weight.dtype))
