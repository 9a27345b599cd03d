"""Training without an engine: the loop of the baselines, and M-VAR in plain torch.

Where ours has code of its own, the plain model has what a direct port of the paper has: one attention over all tokens
with a block-diagonal mask, Mamba-2's chunked sum as einsums under autograd ("Transformers are SSMs", Dao and Gu 2024,
section 6), conv1d and the gated norm written out, all logits at once. Weights, linear layers and dtypes are ours.

Shapes: B images, L tokens, H heads, D head width, P Mamba's head width, N state, K channels of the convolution, E rows
of the input projection, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.checkpoint import made_up_batch
from mvar.config import TrainConfig
from mvar.model.attention import MAX_LOG_SCALE, ScaleAttention
from mvar.model.init import init_weights_
from mvar.model.kernels.precision import product_dtype, wide
from mvar.model.mamba2 import NORM_EPS, STATE, Mamba2, MambaState
from mvar.model.token_loss import TokenLosses
from mvar.model.transformer import MVAR
from mvar.training.objective import Objective

PLAIN_CHUNK = 64
"""Tokens of a chunk in the paper's listing."""


def dense_attention(
    attention: ScaleAttention, qkv_BL3HD: Tensor, lengths: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """All tokens at once; the mask lets a token see those of its own scale. Unit queries and keys as published."""
    scale_L = torch.repeat_interleave(torch.tensor(lengths, device=qkv_BL3HD.device))
    mask_LL = scale_L.unsqueeze(0) == scale_L.unsqueeze(1)
    q, k, v = (t.transpose(1, 2) for t in qkv_BL3HD.to(dtype).unbind(2))
    strength_1H11 = attention.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
    q, k = F.normalize(q, dim=-1) * strength_1H11.to(dtype), F.normalize(k, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=1.0).transpose(1, 2)


def plain_ssd(x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_H: Tensor) -> Tensor:
    """Mamba-2's sum in chunks, everything left to autograd: b images, k chunks, i and j tokens of one, h, p, n."""
    length = x_BLHP.shape[1]
    pad = -length % PLAIN_CHUNK
    x, dt, B, C = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)).unflatten(1, (-1, PLAIN_CHUNK))
        for t in (x_BLHP, dt_BLH, B_BLN, C_BLN)
    )
    s = (dt * A_H).cumsum(2)
    sent = x * dt.unsqueeze(-1).to(x.dtype)
    differences = s.unsqueeze(3) - s.unsqueeze(2)
    below = torch.ones(PLAIN_CHUNK, PLAIN_CHUNK, dtype=torch.bool, device=x.device).tril()[..., None]
    decay = differences.masked_fill(~below, -torch.inf).exp().to(x.dtype)
    scores = torch.einsum("bkin,bkjn->bkij", C, B)
    inside = torch.einsum("bkij,bkijh,bkjhp->bkihp", scores, decay, sent)
    gains = torch.einsum("bkjn,bkjh,bkjhp->bkhpn", B, (s[:, :, -1:] - s).exp().to(x.dtype), sent)
    state = torch.zeros_like(gains[:, 0])
    before = []
    for k in range(gains.shape[1]):
        before.append(state)
        state = state * s[:, k, -1].exp()[..., None, None].to(x.dtype) + gains[:, k]
    seen = torch.einsum("bkin,bkhpn,bkih->bkihp", C, torch.stack(before, 1), s.exp().to(x.dtype))
    y_BLHP = (inside + seen).flatten(1, 2)[:, :length]
    return y_BLHP + x_BLHP * D_H.to(x.dtype).unsqueeze(-1)


def plain_mix(mamba: Mamba2, zxbcdt_BLE: Tensor, state: MambaState | None) -> Tensor:
    """What lies between Mamba-2's two linear layers."""
    assert state is None
    dtype, length = zxbcdt_BLE.dtype, zxbcdt_BLE.shape[1]
    z, xBC_BLK, dt_BLH = torch.split(zxbcdt_BLE, [mamba.inner, mamba.inner + 2 * STATE, mamba.heads], dim=-1)
    weight, bias = mamba.conv1d.weight.to(dtype), mamba.conv1d.bias.to(dtype)
    conv_BKL = F.conv1d(xBC_BLK.transpose(1, 2), weight, bias, padding=weight.shape[-1] - 1, groups=len(weight))
    conv_BLK = F.silu(conv_BKL[..., :length].transpose(1, 2)).to(product_dtype(dtype, zxbcdt_BLE.device))
    x, B_BLN, C_BLN = torch.split(conv_BLK, [mamba.inner, STATE, STATE], dim=-1)
    dt_BLH = F.softplus(dt_BLH.to(wide(dtype)) + mamba.dt_bias)
    y_BLHP = plain_ssd(x.unflatten(-1, (mamba.heads, -1)), dt_BLH, -mamba.A_log.exp(), B_BLN, C_BLN, mamba.D)
    gated = y_BLHP.flatten(2).float() * F.silu(z.float())
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + NORM_EPS)
    return (normed * mamba.norm.weight).to(dtype)


def plain_mvar(config: TrainConfig) -> MVAR:
    """Our weights as a training begins with them, computed in the plain way."""
    assert config.model.num_classes is not None
    model = MVAR.from_config(config.model, num_classes=config.model.num_classes)
    init_weights_(model, config.seed)
    for module in model.modules():
        if isinstance(module, ScaleAttention):
            module._attend = partial(dense_attention, module)  # type: ignore[method-assign]
        if isinstance(module, Mamba2):
            module.backend = "torch"
            module._mix_torch = partial(plain_mix, module)  # type: ignore[method-assign]
    return model


class Loop:
    """A training loop on the batches that `Run` sees: autocast in bf16, loss of all logits, clipping, AdamW."""

    def __init__(
        self, config: TrainConfig, objective: Objective, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config, self.objective, self.model, self.optimizer = config, objective, model, optimizer
        self.bf16, self.done = config.engine.precision == "bf16", 0

    def step(self) -> float:
        """The loss before it."""
        batch = made_up_batch(self.config, self.done)
        with torch.autocast(self.objective.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.objective(self._losses, batch.codes_BL, batch.labels_B).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.item()

    def _losses(self, labels_B: Tensor, x_BLC: Tensor, *, codes_BL: Tensor, **_: Any) -> TokenLosses:
        logits_BLV = self.model(labels_B, x_BLC)
        loss_BL = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten(), reduction="none").view_as(codes_BL)
        return TokenLosses(loss_BL, loss_BL.detach(), logits_BLV.argmax(-1) == codes_BL)
