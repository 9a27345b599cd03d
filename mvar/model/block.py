"""One M-VAR block: attention inside each scale, Mamba-2 across scales, a feed-forward layer (M-VAR, figure 2).

Shapes: B batch, L tokens, C width, G = 3 residual branches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.config import AttentionBackend, MambaBackend, NormBackend
from mvar.model.attention import ScaleAttention
from mvar.model.conditioning import norms, project, projection
from mvar.model.kernels import fused
from mvar.model.kernels.precision import Linear, wide
from mvar.model.mamba2 import Mamba2, MambaState

BRANCHES = 3
"""Residual branches of a block, in order: attention, Mamba-2, feed-forward."""
VECTORS = 3 * BRANCHES
"""Conditioning vectors of a block: gates 1-3, scales 1-3, shifts 1-3."""


@dataclass
class BlockState:
    """What a block remembers between the scales of an image."""

    mamba: MambaState = field(default_factory=MambaState)
    vectors_B9C: Tensor | None = None
    """Conditioning: it depends on the class alone, so that one scale's serves the others."""

    def keep_first(self, count: int) -> None:
        """Forget all but the first `count` images of the batch."""
        self.mamba.keep_first(count)
        self.vectors_B9C = None if self.vectors_B9C is None else self.vectors_B9C[:count]


class FeedForward(nn.Module):
    """Linear to 4C, GELU (tanh), linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BLC), approximate="tanh"))
        return out


class Block(nn.Module):
    """x += gate * branch(LN(x) * (1 + scale) + shift), for each of the three branches in turn."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        l2_norm: bool,
        shared_conditioning: bool,
        attention_backend: AttentionBackend,
        mamba_backend: MambaBackend,
        norm_backend: NormBackend,
    ) -> None:
        super().__init__()
        self.norms = norms(width, norm_backend)
        self.attn = ScaleAttention(width, heads, l2_norm=l2_norm, backend=attention_backend)
        self.mamba = Mamba2(width, backend=mamba_backend)
        self.ffn = FeedForward(width)
        if shared_conditioning:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, VECTORS, width).div_(width**0.5))
        else:
            self.ada_lin = projection(width, VECTORS)
        self.shared_conditioning = shared_conditioning

    def forward(
        self,
        x_BLC: Tensor,
        cond: Tensor,
        lengths: tuple[int, ...],
        dtype: torch.dtype,
        drop_path_GB: Tensor | None = None,
        state: BlockState | None = None,
    ) -> Tensor:
        """(B, L, C) wide -> the same.

        `cond`: the class vector (B, C), or with shared conditioning the nine shared vectors (B, 9, C).
        `lengths`: tokens of each scale that x holds. `dtype`: the compute dtype. `drop_path_GB`: multipliers of the
        branches' output. `state`: of the scales before x, with the same `cond`.
        """
        vectors_B9C = None if state is None else state.vectors_B9C
        if vectors_B9C is None:
            vectors_B9C = self._condition(cond, dtype).to(wide(x_BLC.dtype))
        if state is not None:
            state.vectors_B9C = vectors_B9C
        gates_GBC, scales_GBC, shifts_GBC = (part.unbind(1) for part in vectors_B9C.chunk(3, dim=1))
        if drop_path_GB is not None:
            gates_GBC = tuple(g * kept.to(g).unsqueeze(-1) for g, kept in zip(gates_GBC, drop_path_GB, strict=True))
        x_BLC, h_BLC = self.norms.first(x_BLC, scales_GBC[0], shifts_GBC[0], dtype)
        out_BLC = self.attn(h_BLC, lengths)
        x_BLC, h_BLC = self.norms.after(x_BLC, out_BLC, gates_GBC[0], scales_GBC[1], shifts_GBC[1], dtype)
        out_BLC = self.mamba(h_BLC, None if state is None else state.mamba)
        x_BLC, h_BLC = self.norms.after(x_BLC, out_BLC, gates_GBC[1], scales_GBC[2], shifts_GBC[2], dtype)
        return fused.residual(x_BLC, self.ffn(h_BLC), gates_GBC[2])

    def _condition(self, cond: Tensor, dtype: torch.dtype) -> Tensor:
        if self.shared_conditioning:
            return cond + self.ada_gss.to(cond.dtype).squeeze(0)
        return project(self.ada_lin, cond, VECTORS, dtype)
