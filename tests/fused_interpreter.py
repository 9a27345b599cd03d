"""Runs our Triton kernels on a CPU, in Triton's interpreter, against float64 autograd of the formulas in plain torch.

`python -m tests.fused_interpreter [long]` prints one JSON object: case -> name of a result -> largest difference,
relative to the largest value. It is a process of its own, because Triton looks at TRITON_INTERPRET while imported.
Legend: B batch, L tokens, C width, H heads, D head width, I inner channels.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Differences = dict[str, float]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


def run(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results, and the gradients of the inputs. A cotangent of None: that result is not used further."""
    leaves = [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs
    ]
    found = function(*leaves)
    results = [found] if isinstance(found, Tensor) else list(found)
    used = [(out, ct.to(out.dtype)) for out, ct in zip(results, cotangents, strict=True) if ct is not None]
    torch.autograd.backward([out for out, _ in used], [ct for _, ct in used])
    return results, [None if leaf is None else leaf.grad for leaf in leaves]


def compare(
    names: Sequence[str],
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> Differences:
    """Of `ours` as it is from `plain` in float64. `names`: of the results, then of the inputs' gradients."""
    results, gradients = run(ours, inputs, cotangents)
    wide = [None if t is None else t.double() for t in inputs]
    expected_results, expected_gradients = run(plain, wide, cotangents)
    differences = {}
    for name, found, expected in zip(
        names, [*results, *gradients], [*expected_results, *expected_gradients], strict=True
    ):
        if expected is None or (isinstance(found, Tensor) and not expected.abs().max()):
            assert found is None or not found.abs().max(), f"{name}: a gradient where there is none"
            continue
        assert found is not None, f"{name}: no gradient"
        differences[name] = difference(found, expected)
    return differences


# ---- residual and norm

RESIDUAL_NAMES = ("new", "y", "dx", "dh", "dgate", "dscale", "dshift")
NORM_NAMES = ("new", "y", "dx", "dscale", "dshift")


def residual_inputs(batch: int, length: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """x, h, gate, scale, shift; the vectors are slices, as in the model."""
    torch.manual_seed(0)
    vectors_B9C = torch.randn(batch, 9, width)
    x_BLC, h_BLC = torch.randn(batch, length, width) + 0.5, torch.randn(batch, length, width).to(dtype)
    return [x_BLC, h_BLC, vectors_B9C[:, 0], vectors_B9C[:, 3], vectors_B9C[:, 6]]


def residual_case(batch: int, length: int, width: int, dtype: torch.dtype, kind: str = "whole") -> Differences:
    """`kind`: which inputs or uses are left out."""
    from mvar.model.kernels import fused

    x, h, gate, scale, shift = residual_inputs(batch, length, width, dtype)
    dnew, dy = torch.randn(2, batch, length, width).unbind()
    dy = dy.to(dtype)
    if kind == "residual only":
        return compare(("new", "dx", "dh", "dgate"), fused.residual, fused.residual, (x, h, gate), (dnew,))
    if kind == "strided":
        x, h = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, h))
    cotangents = (None if kind == "new unused" else dnew, None if kind == "y unused" else dy)
    if kind == "norm only":
        names, function, inputs = NORM_NAMES, fused.modulated_norm, [x, scale, shift]
    else:
        names, function, inputs = RESIDUAL_NAMES, fused.residual_norm, [x, h, gate, scale, shift]
    return compare(names, partial(function, dtype=dtype), partial(function, dtype=torch.float64), inputs, cotangents)


# ---- q and k


def qk_case(batch: int, length: int, heads: int, width: int, dtype: torch.dtype, kind: str = "whole") -> Differences:
    from mvar.model.kernels import fused

    torch.manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, width)
    if kind == "zeros":
        qkv[0, 0, 0, 0] = qkv[0, -1, 1, -1] = 0.0
    cotangents: list[Tensor] = [torch.randn(batch, length, heads, width).to(dtype) for _ in range(3)]
    if kind == "zeros":
        cotangents[0][0, 0, 0] = cotangents[1][0, -1, -1] = 1e-12
    if kind == "strided":
        cotangents = list(torch.randn(batch, length, 3, heads, width).to(dtype).unbind(2))
    return compare(
        ("q", "k", "v", "dqkv", "dscale"),
        partial(fused.unit_heads, dtype=dtype),
        partial(fused.unit_heads, dtype=torch.float64),
        (qkv.to(dtype), torch.rand(heads, 1) * 10),
        cotangents,
    )


# ---- gated norm


def gated_formula(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    gated = y * F.silu(z)
    return gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5) * weight


def gated_case(batch: int, length: int, width: int, dtype: torch.dtype, kind: str = "whole") -> Differences:
    from mvar.model.kernels.fused import gated_norm

    torch.manual_seed(0)
    rows = torch.randn(batch, length, width + (14 if kind == "strided" else 0)).to(dtype)
    inputs = (torch.randn(batch, length, width).to(dtype), rows, torch.rand(width) + 0.5)
    return compare(
        ("out", "dy", "dz", "dweight"),
        lambda y, z, weight: gated_norm(y, z[..., :width], weight, 1e-5),
        lambda y, z, weight: gated_formula(y, z[..., :width], weight),
        inputs,
        (torch.randn(batch, length, width).to(dtype),),
    )


# ---- cross entropy


def entropy_case(count: int, words: int, dtype: torch.dtype, smoothing: float) -> Differences:
    """Half of the tokens have their likeliest word for the right one."""
    from mvar.model.kernels.fused import token_losses

    torch.manual_seed(0)
    logits = (torch.randn(count, words) * 4).to(dtype)
    codes = logits.argmax(-1)
    codes[::2] = torch.arange(len(codes[::2])) % words
    dloss = torch.rand(count)
    (loss, nll, correct), (dlogits,) = run(
        lambda leaf: token_losses(leaf, codes, smoothing), [logits], [dloss, None, None]
    )
    (expected, expected_nll, expected_correct), (expected_dlogits,) = run(
        lambda leaf: token_losses(leaf, codes, smoothing), [logits.double()], [dloss, None, None]
    )
    assert dlogits is not None and expected_dlogits is not None
    assert not nll.requires_grad and not correct.requires_grad
    return {
        "loss": difference(loss, expected),
        "nll": difference(nll, expected_nll),
        "dlogits": difference(dlogits, expected_dlogits),
        "correct": float((correct != expected_correct).sum()),
    }


def unknown_words() -> dict[str, float]:
    """Losses of codes beyond the vocabulary: how many of two are NaN."""
    from mvar.model.kernels.fused import token_losses

    loss, nll, _ = token_losses(torch.zeros(3, 8), torch.tensor([8, 7, -1]), 0.1)
    return {"nan": float(loss.isnan().sum()), "nll_nan": float(nll.isnan().sum())}


# ---- as the model uses them


def chained(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """All three in a row, with a matrix product between."""
    from mvar.model.kernels.fused import gated_norm, residual, residual_norm, unit_heads

    x, y = residual_norm(x, h, gate, scale, shift, h.dtype)
    q, k, v = unit_heads((y @ weight).unflatten(-1, (3, -1, 16)), scale[0, :2].exp(), h.dtype)
    y = gated_norm(v.flatten(2), (q * k).flatten(2), shift[0, :32], 1e-5)
    return residual(x, torch.cat((y, y), -1), gate)


def recomputation() -> Differences:
    """Gradients under both kinds of recomputation, against those without."""
    from mvar.model.recompute import keeping_linears

    inputs = [*residual_inputs(2, 3, 64, torch.float32), torch.randn(64, 96) / 8]
    cotangent = torch.randn(2, 3, 64)
    _, expected = run(chained, inputs, [cotangent])
    differences: Differences = {}
    for name, options in (("every", {}), ("selective", {"context_fn": keeping_linears})):
        again = partial(checkpoint, chained, use_reentrant=False, preserve_rng_state=False, **options)
        results, found = run(again, inputs, [cotangent])
        for i, (gradient, other) in enumerate(zip(found, expected, strict=True)):
            assert gradient is not None and other is not None
            differences[f"{name}_{i}"] = difference(gradient, other.double())
    with torch.no_grad():
        differences["no_grad"] = difference(chained(*inputs), results[0].double())
    return differences


def kept() -> dict[str, float]:
    """Bytes kept for the backward pass, divided by what is needed anyway: x', h, and two numbers a row; qkv."""
    from mvar.model.kernels.fused import residual_norm, unit_heads

    def bytes_of(function: Callable[..., Any], *inputs: Tensor) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() > 2 or tensor.dtype == torch.bfloat16:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(*(t.requires_grad_() for t in inputs))
        return sum(seen.values())

    x, h, gate, scale, shift = residual_inputs(2, 3, 192, torch.bfloat16)
    gate, scale, shift = (t.clone() for t in (gate, scale, shift))
    qkv = torch.randn(2, 3, 3, 2, 64).bfloat16()
    return {
        "residual": bytes_of(partial(residual_norm, dtype=torch.bfloat16), x, h, gate, scale, shift)
        / (x.nbytes + h.nbytes),
        "qk": bytes_of(partial(unit_heads, dtype=torch.bfloat16), qkv, torch.ones(2)) / qkv.nbytes,
    }


def few_programs() -> AbstractContextManager[object]:
    """Each works on several rows in turn, the last on fewer."""
    from mvar.model.kernels import gated_norm_triton, qk_norm_triton, residual_norm_triton

    stack = ExitStack()
    for module in (gated_norm_triton, qk_norm_triton, residual_norm_triton):
        stack.enter_context(mock.patch.multiple(module, FORWARD_PROGRAMS=6, BACKWARD_PROGRAMS=4))
    stack.enter_context(mock.patch.object(qk_norm_triton, "TILE", 128))
    return stack


def short_cases() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, dtype in DTYPES.items():
        found[f"residual {name} 192"] = residual_case(2, 5, 192, dtype)
        found[f"residual {name} 832 one token"] = residual_case(2, 1, 832, dtype)
        found[f"qk {name} 3 heads"] = qk_case(2, 5, 3, 64, dtype)
        found[f"qk {name} 12 heads"] = qk_case(1, 3, 12, 32, dtype)
        found[f"gated {name} 192"] = gated_case(2, 5, 192, dtype)
        found[f"gated {name} 832 one token"] = gated_case(1, 1, 832, dtype)
        found[f"entropy {name} 4096"] = entropy_case(6, 4096, dtype, 0.0)
        found[f"entropy {name} 100 smoothed"] = entropy_case(6, 100, dtype, 0.1)
    found["unknown words"] = unknown_words()
    for kind in ("norm only", "residual only", "new unused", "y unused", "strided"):
        found[f"residual fp32 {kind}"] = residual_case(3, 4, 96, torch.float32, kind)
    found["qk fp32 zeros"] = qk_case(1, 3, 5, 16, torch.float32, "zeros")
    found["qk fp32 strided"] = qk_case(2, 9, 2, 64, torch.float32, "strided")
    found["gated fp32 strided"] = gated_case(2, 3, 96, torch.float32, "strided")
    with few_programs():
        found["residual fp32 runs"] = residual_case(2, 11, 48, torch.float32)
        found["qk fp32 runs"] = qk_case(2, 11, 6, 32, torch.float32)
        found["gated fp32 runs"] = gated_case(2, 11, 48, torch.float32)
    found["recomputation"] = recomputation()
    found["kept"] = kept()
    return found


def long_cases() -> dict[str, dict[str, float]]:
    return {
        "residual fp32 680 tokens": residual_case(2, 680, 64, torch.float32),
        "qk fp32 680 tokens": qk_case(2, 680, 3, 64, torch.float32),
        "gated fp32 680 tokens": gated_case(2, 680, 64, torch.float32),
    }


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from mvar.model.kernels import fused as chains

    chains.switch(True)
    with chains.eager():  # What our kernels do not take, float64, is computed plainly.
        found = long_cases() if "long" in sys.argv else short_cases()
    print(json.dumps(found))
