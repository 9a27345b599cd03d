"""The CUDA and Triton kernels of mamba-ssm and causal-conv1d behind the interface of `mamba2`. Imported on first use.

The packages' own `Mamba2` module can neither start from a state nor take several tokens at once, so the functional
kernels are called instead. Shapes: B batch, L tokens, C width, H heads, P head width, N state, K convolved channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

CHUNK = 128
"""Tokens of a chunk. Forward and backward of the fused mixer on an H200 (64 images of 680 tokens, C 1024, bf16): 5.1 ms
with 64, 4.6 with 128, 5.4 with 256, the packages' default."""
STRIDE_MULTIPLE = 8
"""causal_conv1d wants rows that begin at multiples of 8 elements."""


@dataclass(frozen=True)
class Kernels:
    """The three entry points, resolved once."""

    conv: Any
    scan: Any
    split_conv_scan: Any
    any_stride: bool
    """Whether `split_conv_scan` copies rows that do not begin where causal_conv1d wants them (mamba-ssm 2.3)."""


@lru_cache(maxsize=1)
def entry_points() -> Kernels:
    """Raises whatever their import raises."""
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.triton import ssd_combined

    return Kernels(
        causal_conv1d_fn,
        ssd_combined.mamba_chunk_scan_combined,
        ssd_combined.mamba_split_conv1d_scan_combined,
        hasattr(ssd_combined, "ensure_stride"),
    )


def fusable(zxbcdt_BLE: Tensor) -> bool:
    """Whether `fused_mixer` takes rows of the input projection as they are. At depth 30 their stride is odd."""
    return entry_points().any_stride or zxbcdt_BLE.shape[-1] % STRIDE_MULTIPLE == 0


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
    out: Tensor = entry_points().split_conv_scan(
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
    strides_fit = all(stride % STRIDE_MULTIPLE == 0 for stride in x_BLK.stride()[:2])
    # Not `contiguous`, which leaves the strides of one token of one image as they are: one row has no next one.
    x_BKL = (x_BLK if strides_fit else x_BLK.clone(memory_format=torch.contiguous_format)).transpose(1, 2)
    initial = None if tail_BVK is None else tail_BVK.to(x_BLK.dtype).contiguous().transpose(1, 2)
    out_BKL: Tensor = entry_points().conv(x_BKL, weight_KW, bias_K, initial_states=initial, activation="silu")
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
    y_BLHP, final_BHPN = entry_points().scan(
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
