"""What happens between matrix products: chains of small operations that become one kernel each, way and back.

On a GPU the chains of a block have Triton kernels of our own; `torch.compile` makes the others' and those of a CPU. A
chain is a pure function of tensors. It holds no parameter, so that DeepSpeed's hooks, recomputation and autocast see
the same thing however it runs. `switch` says for the whole process whether chains are fused.

Shapes: B batch, L tokens, C width, H heads, D head width, I inner channels, N tokens of all images, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.config import Switch
from mvar.errors import BackendError
from mvar.log import Chosen
from mvar.model.kernels import mamba_ops
from mvar.model.kernels.launch import usable
from mvar.model.kernels.optional import load
from mvar.model.kernels.precision import wide

P = ParamSpec("P")
T = TypeVar("T")

NORM_EPS = 1e-6
UNIT_FLOOR = 1e-12
LARGE = (8, 512)
"""Depth and width from which compiling (a minute) pays on a CPU."""
VARIANTS = 64
"""Compiled forms a chain may have, by shapes, dtypes and what needs a gradient. torch gives up at 8."""

_fused = False
_compiling = True


def chain(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a pure function of tensors as worth compiling."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        form: Callable[P, T] = _compiled_form(function) if compiled() else function
        return form(*args, **options)

    return call


@lru_cache(maxsize=32)
def _compiled_form(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    # Fixed shapes at first, symbols for what changes later: training has one shape, sampling one for each scale.
    return torch.compile(function)


def choose(setting: Switch, device: torch.device, depth: int, width: int) -> Chosen:
    """Whether chains are to be compiled, "on" or "off": `auto` does where it pays and works.

    Raises BackendError where compiling is asked for and does not work here.
    """
    if setting == "off":
        return Chosen("compile", "off")
    if setting == "auto" and device.type == "cpu" and (depth < LARGE[0] or width < LARGE[1]):
        return Chosen("compile", "off", "the model is small for a CPU")
    if problem := load(_try_on_gpu if device.type == "cuda" else _try_on_cpu).problem:
        if setting == "on":
            raise BackendError(
                f"engine.compile=on: torch.compile does not work here ({problem}). It needs a C++ compiler, and Triton"
                " on GPUs. Install them, or set engine.compile=auto."
            )
        reason = f"torch.compile does not work here ({problem})"
        return Chosen("compile", "off", reason, slow=device.type == "cuda")
    return Chosen("compile", "on")


def switch(on: bool) -> None:
    """Fuse chains in this process from now on, or not."""
    global _fused
    _fused = on


def compiled() -> bool:
    """Whether `torch.compile` makes the kernels of chains that have none of our own."""
    return _fused and _compiling


@contextmanager
def eager() -> Iterator[None]:
    """Nothing is compiled while this lasts: for a few calls in shapes that do not come again."""
    global _compiling
    before, _compiling = _compiling, False
    try:
        yield
    finally:
        _compiling = before


def _ours(x: Tensor, *others: Tensor) -> bool:
    """Whether our own kernels take these tensors, rows of x's width."""
    return _fused and usable(x, *others, width=x.shape[-1])


def _ours_wide(x: Tensor, *others: Tensor) -> bool:
    """The same for the residual stream, which our kernels take in float32 alone."""
    return x.dtype == torch.float32 and _ours(x, *others)


def _norm_kernel(
    x_BLC: Tensor,
    out_BLC: Tensor | None,
    gate_BC: Tensor | None,
    scale_BC: Tensor,
    shift_BC: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from mvar.model.kernels import residual_norm_triton

    x_BLC, y_BLC = residual_norm_triton.fused(x_BLC, out_BLC, gate_BC, scale_BC, shift_BC, dtype, NORM_EPS)
    assert y_BLC is not None
    return x_BLC, y_BLC


def _try_on_cpu() -> None:
    _try(torch.device("cpu"))


def _try_on_gpu() -> None:
    _try(torch.device("cuda"))


def _try(device: torch.device) -> None:
    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(_three_x)(x).sum().backward()


def _three_x(x: Tensor) -> Tensor:
    return x.exp().log() + 2 * x


# ---- the chains


def modulated_norm(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, and LN(x) * (1 + scale) + shift in `dtype`, with wide statistics.

    Whoever goes on from the x that is returned spares the backward pass an addition of whole activations.
    """
    if dtype != torch.float64 and _ours_wide(x_BLC):
        return _norm_kernel(x_BLC, None, None, scale_BC, shift_BC, dtype)
    return x_BLC, _modulated_chain(x_BLC, scale_BC, shift_BC, dtype)


def residual(x_BLC: Tensor, out_BLC: Tensor, gate_BC: Tensor) -> Tensor:
    """x + gate * out, wide."""
    if _ours_wide(x_BLC, out_BLC):
        from mvar.model.kernels import residual_norm_triton

        return residual_norm_triton.fused(x_BLC, out_BLC, gate_BC, None, None, x_BLC.dtype, NORM_EPS)[0]
    return _residual_chain(x_BLC, out_BLC, gate_BC)


def residual_norm(
    x_BLC: Tensor, out_BLC: Tensor, gate_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual`, and the modulated norm of that."""
    if dtype != torch.float64 and _ours_wide(x_BLC, out_BLC):
        return _norm_kernel(x_BLC, out_BLC, gate_BC, scale_BC, shift_BC, dtype)
    return _residual_norm_chain(x_BLC, out_BLC, gate_BC, scale_BC, shift_BC, dtype)


def unit_heads(qkv_BL3HD: Tensor, scale_H1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, L, H, D) in `dtype`: q and k as unit vectors, q times the heads' scales. Norms are wide."""
    head_width = qkv_BL3HD.shape[-1]
    whole_blocks = head_width & (head_width - 1) == 0 and 16 <= head_width <= 256
    if whole_blocks and dtype == qkv_BL3HD.dtype and _ours(qkv_BL3HD):
        from mvar.model.kernels import qk_norm_triton

        return qk_norm_triton.fused(qkv_BL3HD, scale_H1.flatten(), UNIT_FLOOR)
    return _unit_heads_chain(qkv_BL3HD, scale_H1, dtype)


def gated_norm(y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """RMS norm of y * SiLU(z) times `weight`, computed wide, in y's dtype. `z_BLI` may be a slice of wider rows."""
    if _ours(y_BLI, z_BLI, weight_I):
        from mvar.model.kernels import gated_norm_triton

        return gated_norm_triton.fused(y_BLI, z_BLI, weight_I, eps)
    if compiled():
        return _gated_norm_chain(y_BLI, z_BLI, weight_I, eps)
    return mamba_ops.gated_norm(y_BLI, z_BLI, weight_I, eps)


@chain
def _modulated_chain(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype) -> Tensor:
    return _modulated(x_BLC, scale_BC, shift_BC, dtype)


@chain
def _residual_chain(x_BLC: Tensor, out_BLC: Tensor, gate_BC: Tensor) -> Tensor:
    return _residual(x_BLC, out_BLC, gate_BC)


@chain
def _residual_norm_chain(
    x_BLC: Tensor, out_BLC: Tensor, gate_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x_BLC = _residual(x_BLC, out_BLC, gate_BC)
    return x_BLC, _modulated(x_BLC, scale_BC, shift_BC, dtype)


def _residual(x_BLC: Tensor, out_BLC: Tensor, gate_BC: Tensor) -> Tensor:
    return torch.addcmul(x_BLC, out_BLC.to(x_BLC.dtype), gate_BC.unsqueeze(1))


def _modulated(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype) -> Tensor:
    normed_BLC = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift_BC.unsqueeze(1), normed_BLC, 1 + scale_BC.unsqueeze(1)).to(dtype)


@chain
def _unit_heads_chain(qkv_BL3HD: Tensor, scale_H1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q_BLHD, k_BLHD, v_BLHD = qkv_BL3HD.unbind(2)
    if torch.compiler.is_compiling():
        v_BLHD = v_BLHD.clone()  # As a view of qkv, its gradient would be an addition of its own.
    return _unit(q_BLHD, dtype, scale_H1), _unit(k_BLHD, dtype), v_BLHD.to(dtype)


def _unit(x_BLHD: Tensor, dtype: torch.dtype, scale_H1: Tensor | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x_BLHD, dim=-1, keepdim=True, dtype=wide(x_BLHD.dtype))
    norm = norm.clamp_min(UNIT_FLOOR)
    factor = norm.reciprocal() if scale_H1 is None else scale_H1 / norm
    return (x_BLHD * factor).to(dtype)


@chain
def _gated_norm_chain(y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    dtype = wide(y_BLI.dtype)
    gated_BLI = y_BLI.to(dtype) * F.silu(z_BLI.to(dtype))
    inverse_BL1 = (gated_BLI.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (gated_BLI * inverse_BL1 * weight_I.to(dtype)).to(y_BLI.dtype)


def token_losses(logits_NV: Tensor, codes_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: the loss, with label smoothing; the plain cross entropy in nats, detached; whether the likeliest
    word is the right one. `codes_N`: int64 in [0, V); on a GPU any other gives NaN."""
    if _ours(logits_NV):
        from mvar.model.kernels import cross_entropy_triton

        return cross_entropy_triton.fused(logits_NV, codes_N, smoothing)
    return _token_losses_chain(logits_NV, codes_N, smoothing)


@chain
def _token_losses_chain(logits_NV: Tensor, codes_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    loss_N = F.cross_entropy(logits_NV, codes_N, reduction="none", label_smoothing=smoothing)
    with torch.no_grad():
        nll_N = F.cross_entropy(logits_NV, codes_N, reduction="none") if smoothing else loss_N.detach()
        correct_N = logits_NV.argmax(dim=-1) == codes_N
    return loss_N, nll_N, correct_N
