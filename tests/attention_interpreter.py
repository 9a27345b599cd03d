"""Runs the Triton kernels of attention inside scales on a CPU, in Triton's interpreter, against float64 autograd.

`python -m tests.attention_interpreter` prints one JSON object: for each case, of each result and gradient, the largest
difference relative to the largest value. The interpreter is chosen at Triton's import, so this is a process of its own.
Legend: B images, L tokens, H heads, D head width.
"""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor

FLOOR = 1e-12
CASES: dict[str, tuple[tuple[int, ...], int, int, int, bool]] = {
    # scales' tokens, images, heads, head width, unit vectors
    "pyramid": ((1, 4, 9, 16, 25, 36), 2, 2, 64, True),
    "plain": ((1, 4, 9, 16, 25, 36), 1, 1, 64, False),
    "long": ((64, 100), 1, 1, 64, True),
    "one scale": ((100,), 1, 1, 32, True),
    "one token": ((1,), 2, 1, 64, True),
    "narrow": ((4, 9), 1, 3, 24, True),
}


def by_definition(qkv_BL3HD: Tensor, scale_H: Tensor | None, lengths: tuple[int, ...], softmax_scale: float) -> Tensor:
    """(B, L, H, D): masked softmax attention, written out."""
    q, k, v = (t.transpose(1, 2) for t in qkv_BL3HD.unbind(2))
    if scale_H is not None:
        q, k = (t / t.norm(dim=-1, keepdim=True).clamp_min(FLOOR) for t in (q, k))
        q = q * scale_H.view(-1, 1, 1)
    scale_L = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scores = q @ k.transpose(-1, -2) * softmax_scale
    scores = scores.masked_fill(scale_L[:, None] != scale_L[None, :], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def difference(found: Tensor, expected: Tensor) -> float:
    """NaN counts as infinite."""
    worst = float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())
    return worst if worst == worst else float("inf")


def compare(name: str, dtype: torch.dtype) -> dict[str, float]:
    from mvar.model.kernels.scale_attention_triton import attend

    lengths, images, heads, width, unit = CASES[name]
    torch.manual_seed(0)
    softmax_scale = 1.0 if unit else 0.25 / width**0.5
    qkv_BL3HD = torch.randn(images, sum(lengths), 3, heads, width).to(dtype)
    cotangent_BLHD = torch.randn(images, sum(lengths), heads, width).to(dtype)
    outs, gradients = [], []
    for exact in (False, True):
        qkv = (qkv_BL3HD.double() if exact else qkv_BL3HD).clone().requires_grad_()
        scale_H = torch.linspace(1, 9, heads).to(torch.float64 if exact else torch.float32).requires_grad_()
        leaves = [qkv, scale_H] if unit else [qkv]
        given = scale_H if unit else None
        if exact:
            out = by_definition(qkv, given, lengths, softmax_scale)
        else:
            out = attend(qkv, given, lengths, softmax_scale, FLOOR)
        outs.append(out)
        gradients.append(torch.autograd.grad(out, leaves, cotangent_BLHD.to(out.dtype)))
    found = {"out": difference(*outs)}
    for part, number in (("dq", 0), ("dk", 1), ("dv", 2)):
        found[part] = (
            difference(gradients[0][0][:, :, number], gradients[1][0][:, :, number]) if sum(lengths) > 1 else 0.0
        )
    if sum(lengths) == 1:  # one token sees itself alone: dq and dk are zero
        found["dq"] = float(gradients[0][0][:, :, :2].abs().max())
        found["dv"] = difference(gradients[0][0][:, :, 2], gradients[1][0][:, :, 2])
    elif unit:
        found["dscale"] = difference(gradients[0][1], gradients[1][1])
    return found


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    every = {f"{name} fp32": compare(name, torch.float32) for name in CASES}
    every["pyramid fp16"] = compare("pyramid", torch.float16)
    print(json.dumps(every))
