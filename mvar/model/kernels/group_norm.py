"""Group norm of a map, and the SiLU behind it: torch's, or our kernels where a GPU has the map channels_last.

Shapes: B images, C channels, H x W pixels of a map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.model.kernels.launch import usable


def group_norm(norm: nn.GroupNorm, x_BCHW: Tensor, *, silu: bool = False) -> Tensor:
    """norm(x), or silu(norm(x)), in x's layout. Without gradients SiLU needs no map of its own."""
    if _ours(x_BCHW):
        from mvar.model.kernels import group_norm_triton

        return group_norm_triton.fused(x_BCHW, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu)
    y_BCHW: Tensor = norm(x_BCHW)
    return F.silu(y_BCHW, inplace=not torch.is_grad_enabled()) if silu else y_BCHW


def _ours(x_BCHW: Tensor) -> bool:
    """Whether our kernels take such a map; they have no backward pass."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and usable(x_BCHW, width=x_BCHW.shape[1])
        and x_BCHW.is_contiguous(memory_format=torch.channels_last)
        and not x_BCHW.is_contiguous()
    )
