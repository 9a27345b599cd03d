"""The CUDA and Triton kernels of mamba-ssm and causal-conv1d behind the interface of `mamba2`. Imported on first use.

The packages' own `Mamba2` module can neither start from a state nor take several tokens at once, so the functional
kernels are called instead. Shapes: B batch, L tokens, C width, H heads, P head width, N state, K convolved channels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from mvar.errors import BackendError

CHUNK = 256
"""Chunk length of the official kernels' default."""
STRIDE_MULTIPLE = 8
"""causal_conv1d wants rows that begin at multiples of 8 elements."""


@dataclass(frozen=True)
class Kernels:
    """The three entry points, resolved once."""

    conv: Any
    scan: Any
    split_conv_scan: Any


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """The installed kernels. Raises BackendError, naming what to install, where they are missing."""
    try:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
    except ImportError as error:
        raise BackendError(
            f"mamba_backend=mamba_ssm: mamba-ssm or causal-conv1d cannot be imported ({error}). Install both, built "
            "for CUDA, as requirements-gpu.txt says, or use model.mamba_backend=torch."
        ) from None
    return Kernels(causal_conv1d_fn, mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether the kernels can be imported."""
    try:
        kernels()
    except BackendError:
        return False
    return True


def check_device(tensor: Tensor) -> None:
    """Raise BackendError unless the kernels can run where `tensor` lives (CUDA, or Triton's interpreter)."""
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            f"mamba_backend=mamba_ssm: the kernels need a CUDA device, got tensors on {tensor.device}. "
            "Use model.mamba_backend=torch or auto."
        )


def fusable(zxbcdt_BLE: Tensor) -> bool:
    """Whether rows of the input projection begin where causal_conv1d wants them. They don't at depth 30."""
    return zxbcdt_BLE.shape[-1] % STRIDE_MULTIPLE == 0


def fused_mixer(
    zxbcdt_BLE: Tensor,
    conv_weight_KW: Tensor,
    conv_bias_K: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    head_width: int,
) -> Tensor:
    """Convolution, scan, gate and norm in one autograd node that recomputes instead of storing: (B, L, 2C)."""
    out: Tensor = kernels().split_conv_scan(
        zxbcdt_BLE,
        conv_weight_KW,
        conv_bias_K,
        dt_bias_H,
        A_H,
        D=D_H,
        chunk_size=CHUNK,
        activation="silu",
        rmsnorm_weight=norm_weight,
        rmsnorm_eps=norm_eps,
        headdim=head_width,
        ngroups=1,
        norm_before_gate=False,
    )
    return out


def convolve(x_BLK: Tensor, weight_KW: Tensor, bias_K: Tensor, tail_BVK: Tensor | None) -> Tensor:
    """Causal depthwise convolution and SiLU. `tail`: the rows before x (zeros if None)."""
    x_BKL = x_BLK.contiguous().transpose(1, 2)
    initial = None if tail_BVK is None else tail_BVK.to(x_BLK.dtype).contiguous().transpose(1, 2)
    out_BKL: Tensor = kernels().conv(x_BKL, weight_KW, bias_K, initial_states=initial, activation="silu")
    return out_BKL.transpose(1, 2)


def scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The state-space sum with softplus(dt + dt_bias): (B, L, H, P) and the float32 state after the last token."""
    y_BLHP, final_BHPN = kernels().scan(
        x_BLHP,
        dt_BLH,
        A_H,
        B_BLN.unsqueeze(2),
        C_BLN.unsqueeze(2),
        chunk_size=CHUNK,
        D=D_H,
        dt_bias=dt_bias_H,
        initial_states=state_BHPN,
        dt_softplus=True,
        return_final_states=True,
    )
    return y_BLHP, final_BHPN
