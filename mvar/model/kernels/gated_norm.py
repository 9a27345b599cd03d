"""The norm after Mamba-2's scan: RMS norm of y * SiLU(z), times a weight.

One pass over the tokens on a GPU, torch in tiles that stay in the cache elsewhere (`mamba_ops`).
Shapes: B batch, L tokens, I inner channels.
"""

from __future__ import annotations

from torch import Tensor

from mvar.model.kernels import mamba_ops
from mvar.model.kernels.launch import usable


def gated_norm(y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """(B, L, I) in y's dtype, computed wide. `z_BLI` may be a slice of wider rows."""
    if usable(y_BLI, z_BLI, weight_I, width=y_BLI.shape[-1]):
        from mvar.model.kernels.gated_norm_triton import fused

        return fused(y_BLI, z_BLI, weight_I, eps)
    return mamba_ops.gated_norm(y_BLI, z_BLI, weight_I, eps)
