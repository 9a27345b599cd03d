"""Class conditioning: a class vector becomes gates, scales and shifts around a layer norm without parameters.

Shapes: B batch, L tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvar.config import NormBackend
from mvar.model.kernels import fused
from mvar.model.kernels.optional import load
from mvar.model.kernels.precision import Linear, wide


def projection(width: int, vectors: int) -> nn.Sequential:
    """SiLU, then a linear layer from the class vector to `vectors` vectors of `width`."""
    return nn.Sequential(nn.SiLU(), Linear(width, vectors * width))


def project(layers: nn.Sequential, cond_BC: Tensor, vectors: int, dtype: torch.dtype) -> Tensor:
    """Conditioning vectors, wide: (B, vectors, C). `dtype`: the compute dtype."""
    out: Tensor = layers(cond_BC.to(dtype))
    return out.to(wide(out.dtype)).view(len(out), vectors, -1)


@dataclass(frozen=True)
class Norms:
    """A layer norm without parameters, modulated by a scale and a shift for each image; see `kernels.fused`."""

    first: Callable[[Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
    """x, scale, shift, dtype -> x to go on from, and LN(x) * (1 + scale) + shift in dtype."""
    after: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
    """x, out, gate, scale, shift, dtype -> x + gate * out, and the modulated norm of that."""


def norms(width: int, backend: NormBackend) -> Norms:
    """`torch`: chains that can be compiled; `apex`: NVIDIA's fused kernel for the norm itself.

    Raises BackendError where NVIDIA apex is asked for and not installed.
    """
    if backend == "torch":
        return Norms(fused.modulated_norm, fused.residual_norm)
    norm = load(_apex).require(
        "model.norm_backend=apex",
        "Build NVIDIA apex with its CUDA extensions (requirements-gpu.txt), or use model.norm_backend=torch.",
    )(width, eps=fused.NORM_EPS, elementwise_affine=False)

    def first(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return x_BLC, torch.addcmul(shift_BC.unsqueeze(1), norm(x_BLC), 1 + scale_BC.unsqueeze(1)).to(dtype)

    def after(
        x_BLC: Tensor, out_BLC: Tensor, gate_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return first(fused.residual(x_BLC, out_BLC, gate_BC), scale_BC, shift_BC, dtype)

    return Norms(first, after)


def _apex() -> Any:
    from apex.normalization import FusedLayerNorm

    return FusedLayerNorm


class ConditionedNorm(nn.Module):
    """The norm before the head: LN(x) * (1 + scale) + shift with scale and shift from the class vector."""

    def __init__(self, width: int, norm_backend: NormBackend = "torch") -> None:
        super().__init__()
        self.ada_lin = projection(width, 2)
        self.norms = norms(width, norm_backend)

    def forward(self, x_BLC: Tensor, cond_BC: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, C) wide and (B, C) -> (B, L, C) wide. `dtype`: the compute dtype."""
        scale_BC, shift_BC = project(self.ada_lin, cond_BC, 2, dtype).unbind(1)
        return self.norms.first(x_BLC, scale_BC, shift_BC, wide(x_BLC.dtype))[1]
