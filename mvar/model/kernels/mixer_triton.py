"""What Mamba-2 does between its two linear layers, in our own Triton kernels: convolution, scan, gate and norm.

One autograd node. Forward four kernels; kept are the input, the scan's output and the norm's factors. Backward the
convolution is done again, and every part writes its share of the one gradient of the input.
Shapes: B images, L tokens, I inner channels, H heads, K = I + 2N convolved channels, W taps, V = W - 1, N state,
E = I + K + H channels of a row: the gate z, [x, B, C], the step sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvar.model.kernels import causal_conv_triton, gated_norm_triton, ssd_triton
from mvar.model.kernels.ssd_triton import Decays


@dataclass(frozen=True)
class Layout:
    """How a row of the input is divided, and how it is computed with."""

    inner: int
    head_width: int
    norm_eps: float
    precision: str
    """Of float32 products: "ieee" or "tf32"."""

    def split(self, zxbcdt_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, [x, B, C], and the step sizes: views."""
        heads = self.inner // self.head_width
        sizes = [self.inner, zxbcdt_BLE.shape[-1] - self.inner - heads, heads]
        z_BLI, xBC_BLK, dt_BLH = torch.split(zxbcdt_BLE, sizes, dim=-1)
        return z_BLI, xBC_BLK, dt_BLH


def mix(
    zxbcdt_BLE: Tensor,
    conv_weight_KW: Tensor,
    conv_bias_K: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    layout: Layout,
    exact_3H: Tensor | None = None,
) -> Tensor:
    """(B, L, I) in the input's dtype. `exact_3H`: float32 values of dt_bias, A_log and D, which get the gradients."""
    out: Tensor = _Mixer.apply(  # type: ignore[no-untyped-call]
        zxbcdt_BLE.contiguous(), conv_weight_KW, conv_bias_K, dt_bias_H, A_log_H, D_H, norm_weight_I, layout, exact_3H
    )
    return out


@torch.no_grad()
def carry(
    zxbcdt_BLE: Tensor,
    conv_weight_KW: Tensor,
    conv_bias_K: Tensor,
    decays: Decays,
    norm_weight_I: Tensor,
    layout: Layout,
    tail_BVK: Tensor | None,
    state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`mix` from a state, without gradients, and the float32 state after the last token."""
    z_BLI, xBC_BLK, dt_BLH = layout.split(zxbcdt_BLE)
    conv_BLK = causal_conv_triton.forward(xBC_BLK, tail_BVK, conv_weight_KW, conv_bias_K)
    y_BLI, final_BHPN = ssd_triton.forward(
        conv_BLK, dt_BLH, decays, layout.head_width, layout.precision, state_BHPN, final=True
    )
    assert final_BHPN is not None
    return gated_norm_triton.forward(y_BLI, z_BLI, norm_weight_I, layout.norm_eps)[0], final_BHPN


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt_BLE: Tensor,
        conv_weight_KW: Tensor,
        conv_bias_K: Tensor,
        dt_bias_H: Tensor,
        A_log_H: Tensor,
        D_H: Tensor,
        norm_weight_I: Tensor,
        layout: Layout,
        exact_3H: Tensor | None,
    ) -> Tensor:
        z_BLI, xBC_BLK, dt_BLH = layout.split(zxbcdt_BLE)
        conv_BLK = causal_conv_triton.forward(xBC_BLK, None, conv_weight_KW, conv_bias_K)
        decays = Decays.of((dt_bias_H, A_log_H, D_H), exact_3H)
        y_BLI, _ = ssd_triton.forward(conv_BLK, dt_BLH, decays, layout.head_width, layout.precision)
        out_BLI, rstd_T = gated_norm_triton.forward(y_BLI, z_BLI, norm_weight_I, layout.norm_eps)
        ctx.save_for_backward(
            zxbcdt_BLE, conv_weight_KW, conv_bias_K, dt_bias_H, A_log_H, D_H, norm_weight_I, exact_3H, y_BLI, rstd_T
        )
        ctx.layout = layout
        return out_BLI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLI: Tensor) -> tuple[Tensor | None, ...]:
        zxbcdt_BLE, weight_KW, bias_K, *decays, norm_weight_I, exact_3H, y_BLI, rstd_T = ctx.saved_tensors
        layout: Layout = ctx.layout
        dzxbcdt_BLE = torch.empty(zxbcdt_BLE.shape, dtype=zxbcdt_BLE.dtype, device=zxbcdt_BLE.device)
        z_BLI, xBC_BLK, dt_BLH = layout.split(zxbcdt_BLE)
        dz_BLI, dxBC_BLK, ddt_BLH = layout.split(dzxbcdt_BLE)
        dy_BLI, _, dnorm_weight_I = gated_norm_triton.backward(
            dout_BLI, y_BLI, z_BLI, norm_weight_I, rstd_T, dz_BLI=dz_BLI
        )
        conv_BLK = causal_conv_triton.forward(xBC_BLK, None, weight_KW, bias_K)
        dconv_BLK, ddecays = ssd_triton.backward(
            dy_BLI, conv_BLK, dt_BLH, Decays.of(decays, exact_3H), layout.head_width, layout.precision, ddt_BLH
        )
        dweight_KW, dbias_K = causal_conv_triton.backward(dconv_BLK, xBC_BLK, weight_KW, bias_K, dxBC_BLK)
        of_decays = (ddecays.dt_bias_H, ddecays.A_log_H, ddecays.D_H)
        return (
            dzxbcdt_BLE,
            dweight_KW.to(weight_KW.dtype),
            dbias_K.to(bias_K.dtype),
            *(gradient.to(given.dtype) for gradient, given in zip(of_decays, decays, strict=True)),
            dnorm_weight_I,
            None,
            None,
        )
