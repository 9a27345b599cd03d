"""Mamba-2 over the whole sequence, coarse scales to fine, with its state handed in and out.

Parameter names and shapes are those of mamba-ssm's `Mamba2`. Three backends compute the same: mamba-ssm's kernels and
our own on a GPU, plain torch anywhere.
Shapes: B batch, L tokens, C width, H heads, P head width, N state, K = 2C + 2N convolved channels, W convolution width,
E = 4C + 2N + H rows of the input projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.config import MambaBackend
from mvar.model.kernels import fused, mamba_ssm
from mvar.model.kernels.arithmetic import tf32_allowed
from mvar.model.kernels.mamba_ops import causal_conv
from mvar.model.kernels.precision import Linear, no_autocast, wide
from mvar.model.kernels.ssd import ssd
from mvar.model.mamba_backend import choose, require

STATE = 64
HEAD_WIDTH = 64
EXPAND = 2
CONV_WIDTH = 4
NORM_EPS = 1e-5
DECAYS = ("dt_bias", "A_log", "D")
"""Parameters of the recurrence, one number a head. They stay fp32 in every precision."""


@dataclass
class MambaState:
    """What a Mamba-2 layer remembers of the tokens before. Empty at the start; the layer's forward replaces both.

    `tail_BVK`: last CONV_WIDTH - 1 rows of [x, B, C] before the convolution. `ssm_BHPN`: the recurrence's state.
    Both wide (float32, or float64 for a model in float64).
    """

    tail_BVK: Tensor | None = None
    ssm_BHPN: Tensor | None = None

    def keep_first(self, count: int) -> None:
        """Forget all but the first `count` images of the batch."""
        self.tail_BVK = None if self.tail_BVK is None else self.tail_BVK[:count]
        self.ssm_BHPN = None if self.ssm_BHPN is None else self.ssm_BHPN[:count]


class CausalConv(nn.Module):
    """Depthwise causal convolution of width CONV_WIDTH, then SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(CONV_WIDTH)
        self.weight = nn.Parameter(torch.empty(channels, 1, CONV_WIDTH).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x_BLK: Tensor, tail_BVK: Tensor | None) -> Tensor:
        """(B, L, K) -> (B, L, K); `tail`: the rows before x, zeros if None."""
        return causal_conv(x_BLK, tail_BVK, self.weight.squeeze(1), self.bias)


class GatedNorm(nn.Module):
    """RMS norm of y * SiLU(z): the gate comes before the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y_BLI: Tensor, z_BLI: Tensor) -> Tensor:
        """(B, L, 2C) -> the same."""
        return fused.gated_norm(y_BLI, z_BLI, self.weight.view_as(self.weight), NORM_EPS)


class Mamba2(nn.Module):
    """One Mamba-2 mixer. Raises BackendError if `backend` names kernels that are not installed."""

    def __init__(self, width: int, *, backend: MambaBackend = "auto") -> None:
        super().__init__()
        inner = EXPAND * width
        heads = inner // HEAD_WIDTH
        self.inner, self.heads, self.backend = inner, heads, backend
        require(backend)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.exact_3H: Tensor | None = None
        """fp32 values of dt_bias, A_log and D for an engine that keeps all parameters in 16 bits; not saved."""
        self.in_proj = Linear(width, 2 * inner + 2 * STATE + heads, bias=False)
        self.conv1d = CausalConv(inner + 2 * STATE)
        self.norm = GatedNorm(inner)
        self.out_proj = Linear(inner, width, bias=False)

    def forward(self, u_BLC: Tensor, state: MambaState | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C). With `state`, goes on from it and leaves in it the state after the last token."""
        zxbcdt_BLE = self.in_proj(u_BLC)
        with no_autocast(u_BLC):
            chosen = choose(self.backend, zxbcdt_BLE.dtype, zxbcdt_BLE.device, tf32_allowed())
            mix = {"torch": self._mix_torch, "mamba_ssm": self._mix_mamba_ssm, "triton": self._mix_triton}[chosen.way]
            mixed = mix(zxbcdt_BLE, state)
        out: Tensor = self.out_proj(mixed)
        return out

    def _decays(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """dt_bias, A and D, wide. With `exact_3H`, its values and the parameters' gradients."""
        values = [parameter.to(dtype) for parameter in (self.dt_bias, self.A_log, self.D)]
        if self.exact_3H is not None:
            values = [exact + (v - v.detach()) for exact, v in zip(self.exact_3H, values, strict=True)]
        dt_bias_H, A_log_H, D_H = values
        return dt_bias_H, -A_log_H.exp(), D_H

    def _mix_torch(self, zxbcdt_BLE: Tensor, state: MambaState | None) -> Tensor:
        z, xBC_BLK, dt_BLH = torch.split(zxbcdt_BLE, [self.inner, self.inner + 2 * STATE, self.heads], dim=-1)
        dtype = wide(zxbcdt_BLE.dtype)
        tail = state.tail_BVK if state is not None else None
        conv_BLK = self.conv1d(xBC_BLK, tail)
        x, B_BLN, C_BLN = torch.split(conv_BLK, [self.inner, STATE, STATE], dim=-1)
        x_BLHP = x.view(*x.shape[:2], self.heads, HEAD_WIDTH)
        dt_bias_H, A_H, D_H = self._decays(dtype)
        dt_BLH = F.softplus(dt_BLH.to(dtype) + dt_bias_H)
        memory_BHPN = state.ssm_BHPN if state is not None else None
        y_BLHP, ssm_BHPN = ssd(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, memory_BHPN, final=state is not None)
        if state is not None:
            state.tail_BVK, state.ssm_BHPN = _tail(xBC_BLK, tail), ssm_BHPN
        mixed: Tensor = self.norm(y_BLHP.flatten(2), z)
        return mixed

    def _mix_triton(self, zxbcdt_BLE: Tensor, state: MambaState | None) -> Tensor:
        from mvar.model.kernels import mixer_triton
        from mvar.model.kernels.ssd_triton import Decays

        if state is not None and torch.is_grad_enabled():  # Our kernels do not differentiate through a state.
            return self._mix_torch(zxbcdt_BLE, state)
        layout = mixer_triton.Layout(self.inner, HEAD_WIDTH, NORM_EPS, "tf32" if tf32_allowed() else "ieee")
        weight_KW, bias_K, norm_I = self.conv1d.weight.squeeze(1), self.conv1d.bias, self.norm.weight
        decays = self.dt_bias, self.A_log, self.D
        if state is None:
            return mixer_triton.mix(zxbcdt_BLE, weight_KW, bias_K, *decays, norm_I, layout, self.exact_3H)
        kept, before = Decays.of(decays, self.exact_3H), (state.tail_BVK, state.ssm_BHPN)
        mixed_BLI, ssm_BHPN = mixer_triton.carry(zxbcdt_BLE, weight_KW, bias_K, kept, norm_I, layout, *before)
        _, xBC_BLK, _ = layout.split(zxbcdt_BLE)
        state.tail_BVK, state.ssm_BHPN = _tail(xBC_BLK, state.tail_BVK), ssm_BHPN
        return mixed_BLI

    def _mix_mamba_ssm(self, zxbcdt_BLE: Tensor, state: MambaState | None) -> Tensor:
        dt_bias_H, A_H, D_H = self._decays(wide(zxbcdt_BLE.dtype))
        weight_KW, bias_K = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if state is None and mamba_ssm.fusable(zxbcdt_BLE):
            return mamba_ssm.fused_mixer(
                zxbcdt_BLE, weight_KW, bias_K, dt_bias_H, A_H, D_H, self.norm.weight, NORM_EPS, HEAD_WIDTH
            )
        z, xBC_BLK, dt_BLH = torch.split(zxbcdt_BLE, [self.inner, self.inner + 2 * STATE, self.heads], dim=-1)
        tail, ssm_BHPN = (None, None) if state is None else (state.tail_BVK, state.ssm_BHPN)
        conv_BLK = mamba_ssm.convolve(xBC_BLK, weight_KW, bias_K, tail)
        x, B_BLN, C_BLN = torch.split(conv_BLK, [self.inner, STATE, STATE], dim=-1)
        x_BLHP = x.view(*x.shape[:2], self.heads, HEAD_WIDTH)
        y_BLHP, ssm_BHPN = mamba_ssm.scan(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, dt_bias_H, ssm_BHPN)
        if state is not None:
            state.tail_BVK, state.ssm_BHPN = _tail(xBC_BLK, tail), ssm_BHPN
        mixed: Tensor = self.norm(y_BLHP.flatten(2), z)
        return mixed


def _tail(xBC_BLK: Tensor, before_BWK: Tensor | None) -> Tensor:
    """The last CONV_WIDTH - 1 rows seen so far, wide; zeros stand for rows before the first token."""
    rows = CONV_WIDTH - 1
    recent = xBC_BLK[:, -rows:].to(wide(xBC_BLK.dtype))
    missing = rows - recent.shape[1]
    if not missing:
        return recent.clone()  # a view would keep the whole projection alive
    if before_BWK is None:
        return F.pad(recent, (0, 0, missing, 0))
    return torch.cat((before_BWK[:, -missing:], recent), dim=1)
