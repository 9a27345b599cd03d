"""Class conditioning: a class vector becomes gates, scales and shifts around a layer norm without parameters.

Shapes: B batch, L tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.config import NormBackend
from mvar.errors import BackendError
from mvar.model.kernels.precision import Linear, wide

Norm = Callable[[Tensor], Tensor]

NORM_EPS = 1e-6


def projection(width: int, vectors: int) -> nn.Sequential:
    """SiLU, then a linear layer from the class vector to `vectors` vectors of `width`."""
    return nn.Sequential(nn.SiLU(), Linear(width, vectors * width))


def project(layers: nn.Sequential, cond_BC: Tensor, vectors: int, dtype: torch.dtype) -> Tensor:
    """Conditioning vectors, wide: (B, vectors, C). `dtype`: the compute dtype."""
    out: Tensor = layers(cond_BC.to(dtype))
    return out.to(wide(out.dtype)).view(len(out), vectors, -1)


def layer_norm(width: int, backend: NormBackend) -> Norm:
    """LN over the last dimension, without parameters; `apex`: NVIDIA's fused kernel.

    Raises BackendError where NVIDIA apex is asked for and not installed.
    """
    if backend == "torch":
        return partial(F.layer_norm, normalized_shape=(width,), eps=NORM_EPS)
    try:
        from apex.normalization import FusedLayerNorm
    except ImportError as error:
        raise BackendError(
            f"norm_backend=apex: NVIDIA apex is not installed here ({error}). Build it with its CUDA extensions"
            " (requirements-gpu.txt), or use model.norm_backend=torch."
        ) from None
    norm: Norm = FusedLayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
    return norm


def modulated_norm(norm: Norm, x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype) -> Tensor:
    """LN(x) * (1 + scale) + shift, with wide statistics, in `dtype`."""
    out: Tensor = torch.addcmul(shift_BC.unsqueeze(1), norm(x_BLC), 1 + scale_BC.unsqueeze(1))
    return out.to(dtype)


class ConditionedNorm(nn.Module):
    """The norm before the head: LN(x) * (1 + scale) + shift with scale and shift from the class vector."""

    def __init__(self, width: int, norm_backend: NormBackend = "torch") -> None:
        super().__init__()
        self.ada_lin = projection(width, 2)
        self.norm = layer_norm(width, norm_backend)

    def forward(self, x_BLC: Tensor, cond_BC: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, C) wide and (B, C) -> (B, L, C) wide. `dtype`: the compute dtype."""
        scale_BC, shift_BC = project(self.ada_lin, cond_BC, 2, dtype).unbind(1)
        return modulated_norm(self.norm, x_BLC, scale_BC, shift_BC, wide(x_BLC.dtype))
