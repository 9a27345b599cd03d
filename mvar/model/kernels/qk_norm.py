"""Unit vectors for attention: q and k of each head divided by their length, q times the head's learned scale.

One pass over the projection's output on a GPU, plain torch elsewhere; both sides compute wide and take pure tensors.
Shapes: B batch, L tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar.model.kernels.launch import usable
from mvar.model.kernels.precision import wide

UNIT_FLOOR = 1e-12
"""Vectors shorter than this are divided by it."""


def qk_norm(qkv_BL3HD: Tensor, scale_H: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, L, H, D) in `dtype`. In qkv's own dtype v is a view of it.

    `scale_H`: the heads' scales themselves, wide, not their logarithms.
    """
    head_width = qkv_BL3HD.shape[-1]
    whole_blocks = head_width & (head_width - 1) == 0 and 16 <= head_width <= 256
    if usable(qkv_BL3HD) and whole_blocks and dtype == qkv_BL3HD.dtype:
        from mvar.model.kernels.qk_norm_triton import fused

        return fused(qkv_BL3HD, scale_H, UNIT_FLOOR)
    return plain_qk_norm(qkv_BL3HD, scale_H, dtype)


def plain_qk_norm(qkv_BL3HD: Tensor, scale_H: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm` in torch's own operations."""
    q_BLHD, k_BLHD, v_BLHD = qkv_BL3HD.unbind(2)
    return _unit(q_BLHD, dtype, scale_H.view(-1, 1)), _unit(k_BLHD, dtype), v_BLHD.to(dtype)


def _unit(x_BLHD: Tensor, dtype: torch.dtype, scale_H1: Tensor | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x_BLHD, dim=-1, keepdim=True, dtype=wide(x_BLHD.dtype))
    norm = norm.clamp_min(UNIT_FLOOR)
    factor = norm.reciprocal() if scale_H1 is None else scale_H1 / norm
    return (x_BLHD * factor).to(dtype)
