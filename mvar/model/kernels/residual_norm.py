"""What stands between two branches of a block: a gated residual, then the next branch's modulated layer norm.

    x' = x + gate * h          y = LN(x') * (1 + scale) + shift

One pass over the tokens on a GPU, plain torch elsewhere; both sides compute wide and take pure tensors.
Shapes: B batch, L tokens, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.model.kernels.launch import usable

NORM_EPS = 1e-6


def residual_norm(
    x_BLC: Tensor,
    h_BLC: Tensor | None,
    gate_BC: Tensor | None,
    scale_BC: Tensor,
    shift_BC: Tensor,
    dtype: torch.dtype,
    eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor]:
    """x' in x's dtype and y in `dtype`. Without h and gate x' is x.

    Whoever goes on from x' instead of x spares the backward pass an addition of whole activations.
    """
    if usable(x_BLC, h_BLC, width=x_BLC.shape[-1]) and x_BLC.dtype == torch.float32 and dtype != torch.float64:
        from mvar.model.kernels.residual_norm_triton import fused

        new_BLC, y_BLC = fused(x_BLC, h_BLC, gate_BC, scale_BC, shift_BC, dtype, eps)
        assert y_BLC is not None
        return new_BLC, y_BLC
    return plain_residual_norm(x_BLC, h_BLC, gate_BC, scale_BC, shift_BC, dtype, eps)


def residual(x_BLC: Tensor, h_BLC: Tensor, gate_BC: Tensor) -> Tensor:
    """x' alone, after the last branch."""
    if usable(x_BLC, h_BLC, width=x_BLC.shape[-1]) and x_BLC.dtype == torch.float32:
        from mvar.model.kernels.residual_norm_triton import fused

        return fused(x_BLC, h_BLC, gate_BC, None, None, x_BLC.dtype, NORM_EPS)[0]
    return plain_residual(x_BLC, h_BLC, gate_BC)


def plain_residual_norm(
    x_BLC: Tensor,
    h_BLC: Tensor | None,
    gate_BC: Tensor | None,
    scale_BC: Tensor,
    shift_BC: Tensor,
    dtype: torch.dtype,
    eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor]:
    """`residual_norm` in torch's own operations."""
    if h_BLC is not None and gate_BC is not None:
        x_BLC = plain_residual(x_BLC, h_BLC, gate_BC)
    normed_BLC = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=eps)
    return x_BLC, torch.addcmul(shift_BC.unsqueeze(1), normed_BLC, 1 + scale_BC.unsqueeze(1)).to(dtype)


def plain_residual(x_BLC: Tensor, h_BLC: Tensor, gate_BC: Tensor) -> Tensor:
    """`residual` in torch's own operations."""
    return torch.addcmul(x_BLC, h_BLC.to(x_BLC.dtype), gate_BC.unsqueeze(1))
