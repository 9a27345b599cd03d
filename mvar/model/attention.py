"""Attention inside each scale (M-VAR, section 3.3). One path for training, evaluation and sampling.

A token attends to every token of its own scale and to nothing else, so scales are independent and need no cache.
Shapes: B batch, L tokens, T = B*L tokens of the flattened batch, C width, H heads, D head width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.config import AttentionBackend
from mvar.errors import BackendError
from mvar.log import Chosen
from mvar.model.kernels import fused
from mvar.model.kernels.optional import load
from mvar.model.kernels.precision import HALF, Linear, linear, no_autocast, wide

MAX_LOG_SCALE = math.log(100.0)
"""Heads' learned scales stop growing at 100."""
INITIAL_LOG_SCALE = math.log(4.0)
HOPPER = 9
"""Major compute capability that our own kernels are made for and were measured on: before, registers are too few, and
`auto` leaves alone what came after."""


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
        if backend in _KERNELS:
            _kernel(backend)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), INITIAL_LOG_SCALE))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.mat_qkv = BiasedLinear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BLC: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """(B, L, C) -> (B, L, C); `lengths`: tokens of each scale that x holds, in order."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv_BL3HD = self.mat_qkv(x_BLC, bias).view(*x_BLC.shape[:2], 3, self.heads, -1)
        # On a CPU the half-precision attention kernel is slower than the float32 one, backward by a factor of two.
        dtype = qkv_BL3HD.dtype if qkv_BL3HD.is_cuda else wide(qkv_BL3HD.dtype)
        with no_autocast(x_BLC):
            out_BLHD = self._attend(qkv_BL3HD, lengths, dtype).to(qkv_BL3HD.dtype)
        out: Tensor = self.proj(out_BLHD.flatten(2))
        return out

    def _attend(self, qkv_BL3HD: Tensor, lengths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        chosen = choose(self.backend, dtype, qkv_BL3HD.device, qkv_BL3HD.shape[-1]).way
        scale_H: Tensor | None = None
        if self.l2_norm:
            scale_H = self.scale_mul_1H11.to(wide(dtype)).clamp_max(MAX_LOG_SCALE).exp().flatten()
        if chosen == "triton":
            return _kernel(chosen)(qkv_BL3HD, scale_H, lengths, self.softmax_scale, fused.UNIT_FLOOR)
        if scale_H is not None:
            q_BLHD, k_BLHD, v_BLHD = fused.unit_heads(qkv_BL3HD, scale_H.view(-1, 1), dtype)
        else:
            q_BLHD, k_BLHD, v_BLHD = qkv_BL3HD.to(dtype).unbind(2)
        if chosen == "sdpa":
            return _attend_sdpa(q_BLHD, k_BLHD, v_BLHD, lengths, self.softmax_scale)
        return _attend_packed(_kernel(chosen), q_BLHD, k_BLHD, v_BLHD, lengths, self.softmax_scale)


@lru_cache(maxsize=64)
def choose(backend: AttentionBackend, dtype: torch.dtype, device: torch.device, head_width: int) -> Chosen:
    """The kernels for q, k and v of that kind: `auto` takes one call for all scales where it can, the fastest first.

    Raises BackendError where kernels are asked for by name that cannot take these tensors.
    """
    if backend == "sdpa":
        return Chosen("attention", "sdpa")
    if backend != "auto":
        if unfit := _unfit(backend, dtype, device, head_width):
            raise BackendError(
                f"model.attention_backend={backend}: {unfit}. Use engine.precision=bf16 on a GPU, or"
                " model.attention_backend=auto."
            )
        _kernel(backend)
        return Chosen("attention", backend)
    problems = []
    for name, importer in _KERNELS.items():
        problem = _unfit(name, dtype, device, head_width) or _unmeasured(name, device) or load(importer).problem
        if not problem:
            return Chosen("attention", name)
        problems.append(problem)
    return Chosen("attention", "sdpa", " and ".join(dict.fromkeys(problems)), slow=device.type == "cuda")


def _unfit(name: str, dtype: torch.dtype, device: torch.device, head_width: int) -> str:
    """Why kernels that take all scales at once cannot take such tensors; empty if they can."""
    if device.type != "cuda":
        return f"kernels for all scales at once need a GPU, and tensors are on {device}"
    if dtype not in HALF:
        return f"kernels for all scales at once need bf16 or fp16, and tensors are {dtype}".replace("torch.", "")
    if head_width % 8 or head_width > 256:
        return f"kernels for all scales at once need heads of a multiple of 8 up to 256 channels, got {head_width}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"kernels for all scales at once need compute capability 8.0, and {device} has less"
    if name == "triton" and capability[0] < HOPPER:
        return f"our own kernels are made for compute capability {HOPPER} (Hopper), and {device} has less"
    return ""


def _unmeasured(name: str, device: torch.device) -> str:
    """Why `auto` does not take kernels that would run."""
    if name == "triton" and torch.cuda.get_device_capability(device)[0] > HOPPER:
        return f"our own kernels were measured on compute capability {HOPPER} (Hopper) alone, and {device} has more"
    return ""


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


PackedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
"""q, k and v (T, H, D), the segments' boundaries (int32), the longest segment, the softmax's scale -> (T, H, D)."""


def _attend_packed(
    attend: PackedAttention, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """All scales of all images in one call, as segments of one long sequence."""
    bounds, longest = _varlen_on(lengths, q_BLHD.shape[0], q_BLHD.device)
    q_THD, k_THD, v_THD = (t.flatten(0, 1) for t in (q_BLHD, k_BLHD, v_BLHD))
    return attend(q_THD, k_THD, v_THD, bounds, longest, scale).view(q_BLHD.shape)


@lru_cache(maxsize=64)
def _varlen_on(lengths: tuple[int, ...], batch: int, device: torch.device) -> tuple[Tensor, int]:
    bounds, longest = varlen_layout(lengths, batch)
    return torch.tensor(bounds, dtype=torch.int32, device=device), longest


def _torch_varlen() -> PackedAttention:
    """torch's own flash attention over packed sequences (torch 2.11; before, it took no scale)."""
    from torch.nn.attention.varlen import varlen_attn

    if "scale" not in inspect.signature(varlen_attn).parameters:
        raise ImportError(f"torch {torch.__version__} has no varlen_attn with a scale")

    def attend(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
        out_THD: Any = varlen_attn(q_THD, k_THD, v_THD, bounds, bounds, longest, longest, scale=scale)
        return cast(Tensor, out_THD)

    return attend


def _flash_attn() -> PackedAttention:
    from flash_attn import flash_attn_varlen_func

    def attend(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
        # Unlike torch's own, it does not ask torch whether its backward pass may add in any order.
        exact = torch.are_deterministic_algorithms_enabled()
        out_THD: Any = flash_attn_varlen_func(
            q_THD, k_THD, v_THD, bounds, bounds, longest, longest, softmax_scale=scale, deterministic=exact
        )
        return cast(Tensor, out_THD)

    return attend


def _triton() -> Callable[..., Tensor]:
    """Our own kernels: q/k norm and attention in one."""
    from mvar.model.kernels.scale_attention_triton import attend

    return attend


_KERNELS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "triton": _triton,
    "varlen": _torch_varlen,
    "flash": _flash_attn,
}
"""In the order in which `auto` tries them. With q/k norm, forward and backward for 64 images of 680 tokens and 16 heads
in bf16 on an H200: 1.4 ms, 2.3 ms, not measured; one call a scale 2.5 ms."""
_ADVICE = {
    "triton": "Install triton",
    "varlen": "It needs torch 2.11 or newer",
    "flash": "Install flash-attn as requirements-gpu.txt says",
}


def _kernel(name: str) -> Callable[..., Tensor]:
    found = load(_KERNELS[name]).require(
        f"model.attention_backend={name}", f"{_ADVICE[name]}, or use model.attention_backend=auto."
    )
    return cast(Callable[..., Tensor], found)
