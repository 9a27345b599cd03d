"""Class conditioning: a class vector becomes gates, scales and shifts around a layer norm without parameters.

Shapes: B batch, L tokens, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.model.precision import wide

NORM_EPS = 1e-6


def projection(width: int, vectors: int) -> nn.Sequential:
    """SiLU, then a linear layer from the class vector to `vectors` vectors of `width`."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))


def project(layers: nn.Sequential, cond_BC: Tensor, vectors: int, dtype: torch.dtype) -> Tensor:
    """Conditioning vectors, wide: (B, vectors, C). `dtype`: the compute dtype."""
    out: Tensor = layers(cond_BC.to(dtype))
    return out.to(wide(out.dtype)).view(len(out), vectors, -1)


def modulated_norm(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype) -> Tensor:
    """LN(x) * (1 + scale) + shift, with wide statistics, in `dtype`."""
    normed = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=NORM_EPS)
    out: Tensor = torch.addcmul(shift_BC.unsqueeze(1), normed, 1 + scale_BC.unsqueeze(1))
    return out.to(dtype)


class ConditionedNorm(nn.Module):
    """The norm before the head: LN(x) * (1 + scale) + shift with scale and shift from the class vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = projection(width, 2)

    def forward(self, x_BLC: Tensor, cond_BC: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, C) wide and (B, C) -> (B, L, C) wide. `dtype`: the compute dtype."""
        scale_BC, shift_BC = project(self.ada_lin, cond_BC, 2, dtype).unbind(1)
        return modulated_norm(x_BLC, scale_BC, shift_BC, wide(x_BLC.dtype))
