"""Attention inside each scale (M-VAR, section 3.3). One path for training, evaluation and sampling.

A token attends to every token of its own scale and to nothing else, so scales are independent and need no cache.
Shapes: B batch, L tokens, T = B*L tokens of the flattened batch, C width, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.config import AttentionBackend
from mvar.errors import BackendError
from mvar.model.kernels.precision import HALF, Linear, linear, no_autocast, wide

MAX_LOG_SCALE = math.log(100.0)
"""Heads' learned scales stop growing at 100."""
INITIAL_LOG_SCALE = math.log(4.0)
NORM_FLOOR = 1e-12


def varlen_layout(lengths: Sequence[int], batch: int) -> tuple[list[int], int]:
    """Boundaries of the segments of a flattened batch, and the longest segment, as flash-attn's varlen call wants them.

    `lengths`: tokens of each scale of one image. The boundaries count batch * len(lengths) + 1 entries from 0.
    """
    return [0, *accumulate(list(lengths) * batch)], max(lengths)


class BiasedLinear(Linear):
    """A linear layer whose bias is handed in, so that one weight serves q, k and v, of which k has no bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, bias)


class ScaleAttention(nn.Module):
    """Multi-head attention inside each scale.

    With `l2_norm`, q and k are unit vectors and each head learns its own temperature (published default); without it
    the softmax scale is 0.25 / sqrt(D). Raises BackendError if `backend` names kernels that are not installed.
    """

    def __init__(self, width: int, heads: int, *, l2_norm: bool = True, backend: AttentionBackend = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.l2_norm = l2_norm
        self.backend = backend
        self.softmax_scale = 1.0 if l2_norm else 0.25 / math.sqrt(width // heads)
        if backend == "flash":
            _flash_attention()
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), INITIAL_LOG_SCALE))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.mat_qkv = BiasedLinear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BLC: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """(B, L, C) -> (B, L, C); `lengths`: tokens of each scale that x holds, in order."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q_BLHD, k_BLHD, v_BLHD = self.mat_qkv(x_BLC, bias).view(*x_BLC.shape[:2], 3, self.heads, -1).unbind(2)
        # On a CPU the half-precision attention kernel is slower than the float32 one, backward by a factor of two.
        dtype = q_BLHD.dtype if q_BLHD.is_cuda else wide(q_BLHD.dtype)
        with no_autocast(x_BLC):
            if self.l2_norm:
                scale_H1 = self.scale_mul_1H11.to(wide(q_BLHD.dtype)).clamp_max(MAX_LOG_SCALE).exp().view(-1, 1)
                q_BLHD, k_BLHD = _unit(q_BLHD, dtype, scale_H1), _unit(k_BLHD, dtype)
            out_BLHD = self._attend(q_BLHD.to(dtype), k_BLHD.to(dtype), v_BLHD.to(dtype), lengths).to(v_BLHD.dtype)
        out: Tensor = self.proj(out_BLHD.flatten(2))
        return out

    def _attend(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        if self._use_flash(q_BLHD):
            return _attend_flash(q_BLHD, k_BLHD, v_BLHD, lengths, self.softmax_scale)
        return _attend_sdpa(q_BLHD, k_BLHD, v_BLHD, lengths, self.softmax_scale)

    def _use_flash(self, q: Tensor) -> bool:
        usable = q.is_cuda and q.dtype in HALF
        if self.backend == "flash" and not usable:
            raise BackendError(
                f"attention_backend=flash: flash-attn needs fp16 or bf16 on a CUDA device, got {q.dtype} on {q.device}."
                " Use engine.precision=bf16, or model.attention_backend=auto."
            )
        return usable and self.backend != "sdpa" and _flash_installed()


def _unit(x_BLHD: Tensor, dtype: torch.dtype, scale_H1: Tensor | None = None) -> Tensor:
    """Unit vectors (times `scale`) in `dtype`; the norm is taken wide."""
    norm: Tensor = torch.linalg.vector_norm(x_BLHD, dim=-1, keepdim=True, dtype=wide(x_BLHD.dtype))
    norm = norm.clamp_min(NORM_FLOOR)
    factor = norm.reciprocal() if scale_H1 is None else scale_H1 / norm
    return (x_BLHD * factor).to(dtype)


def _attend_sdpa(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    # split, not slices: its backward is one concatenation instead of one zero-filled gradient for each scale.
    outs = []
    for q, k, v in zip(*(torch.split(t, list(lengths), dim=1) for t in (q_BLHD, k_BLHD, v_BLHD)), strict=True):
        if q.shape[1] == 1:
            outs.append(v)  # the softmax over one token is 1
            continue
        q_BHLD, k_BHLD, v_BHLD = (t.transpose(1, 2) for t in (q, k, v))
        outs.append(F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, scale=scale).transpose(1, 2))
    return torch.cat(outs, dim=1)


def _attend_flash(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    batch = q_BLHD.shape[0]
    bounds, longest = _varlen_on(lengths, batch, q_BLHD.device)
    q_THD, k_THD, v_THD = (t.flatten(0, 1) for t in (q_BLHD, k_BLHD, v_BLHD))
    out_THD: Tensor = _flash_attention()(
        q_THD, k_THD, v_THD, bounds, bounds, longest, longest, softmax_scale=scale, causal=False
    )
    return out_THD.view(q_BLHD.shape)


@lru_cache(maxsize=64)
def _varlen_on(lengths: tuple[int, ...], batch: int, device: torch.device) -> tuple[Tensor, int]:
    bounds, longest = varlen_layout(lengths, batch)
    return torch.tensor(bounds, dtype=torch.int32, device=device), longest


@lru_cache(maxsize=1)
def _flash_installed() -> bool:
    return find_spec("flash_attn") is not None


def _flash_attention() -> Callable[..., Tensor]:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise BackendError(
            f"attention_backend=flash: the package flash-attn cannot be imported ({error}). Install it as "
            "requirements-gpu.txt says, or use model.attention_backend=auto."
        ) from None
    function: Callable[..., Tensor] = flash_attn_varlen_func
    return function
