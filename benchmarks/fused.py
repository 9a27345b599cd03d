"""Our Triton kernels between a block's matrix products, against the same formulas in torch, eager and compiled.

Needs a CUDA device and Triton. Of each chain, forward and backward, bf16 with float32 inside, at --images x --tokens x
--width (default: a training step of d16):

NAME_ms             our kernels
NAME_copy_share     bytes that the chain cannot avoid moving, a second, divided by what copying reaches in this run
NAME_vs_eager       eager torch's time divided by ours
NAME_vs_compiled    torch.compile's time divided by ours

residual_norm       gated residual, then the next branch's modulated layer norm
unit_heads          unit vectors of q and k out of the projection's output; v's gradient joins theirs in one buffer
gated_norm          RMS norm of y * SiLU(z) after Mamba-2's scan
token_losses        loss of as many tokens as exist together (token_loss.CHUNK), float32
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, parser, side_by_side, spread
from benchmarks.roofline import copy_gib_s
from mvar.model.kernels import fused
from mvar.model.kernels.launch import obstacle
from mvar.model.token_loss import CHUNK

HEAD_WIDTH, VOCABULARY = 64, 4096
REPEATS = 20
"""Calls between two looks at the clock, so that starting them costs nothing."""
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Chain:
    """One function in two forms, its inputs, and the bytes that it must move, forward and backward together."""

    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Sequence[Tensor]
    bytes_moved: int

    def contestants(self) -> dict[str, Callable[[], None]]:
        forms = {"ours": self.ours, "eager": self.plain, "compiled": torch.compile(self.plain)}
        return {name: partial(self._repeat, form) for name, form in forms.items()}

    def _repeat(self, form: Callable[..., Any]) -> None:
        for _ in range(REPEATS):
            results = form(*self.inputs)
            results = [results] if isinstance(results, Tensor) else list(results)
            torch.autograd.grad(results, self.inputs, results)


def plain_residual_norm(
    x_BLC: Tensor, h_BLC: Tensor, gate_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The formula of `fused.residual_norm`."""
    x_BLC = x_BLC + h_BLC.float() * gate_BC.unsqueeze(1)
    normed_BLC = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=fused.NORM_EPS)
    return x_BLC, torch.addcmul(shift_BC.unsqueeze(1), normed_BLC, 1 + scale_BC.unsqueeze(1)).to(dtype)


def plain_unit_heads(qkv_BL3HD: Tensor, scale_H1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of `fused.unit_heads`, computed wide."""
    q_BLHD, k_BLHD, v_BLHD = qkv_BL3HD.unbind(2)
    q_BLHD, k_BLHD = (F.normalize(part.float(), dim=-1) for part in (q_BLHD, k_BLHD))
    return (q_BLHD * scale_H1).to(dtype), k_BLHD.to(dtype), v_BLHD.to(dtype)


def plain_gated_norm(y_BLI: Tensor, z_BLI: Tensor, weight_I: Tensor) -> Tensor:
    """The formula of `fused.gated_norm`, computed wide."""
    gated_BLI = y_BLI.float() * F.silu(z_BLI.float())
    return (gated_BLI * torch.rsqrt(gated_BLI.square().mean(-1, keepdim=True) + 1e-5) * weight_I).to(y_BLI.dtype)


def loss_of(form: Callable[..., Sequence[Tensor]], codes_N: Tensor, logits_NV: Tensor) -> Tensor:
    return form(logits_NV, codes_N, 0.0)[0]


def plain_token_losses(logits_NV: Tensor, codes_N: Tensor, _smoothing: float) -> tuple[Tensor, Tensor]:
    """The formula of `fused.token_losses` without label smoothing."""
    return F.cross_entropy(logits_NV, codes_N, reduction="none"), logits_NV.argmax(dim=-1) == codes_N


def chains(images: int, tokens: int, width: int, device: torch.device) -> list[Chain]:
    """Those of a block, with the strides that the model has, and the loss."""
    elements, heads = images * tokens * width, width // HEAD_WIDTH

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x_BLC, h_BLC = random(images, tokens, width), random(images, tokens, width, dtype=DTYPE)
    vectors_B9C = random(images, 9, width)
    qkv_BL3HD = random(images, tokens, 3, heads, HEAD_WIDTH, dtype=DTYPE)
    y_BLI = random(images, tokens, 2 * width, dtype=DTYPE)
    z_BLI = random(images, tokens, 4 * width + 128 + 2 * heads, dtype=DTYPE)[..., : 2 * width]
    codes_N = torch.randint(VOCABULARY, (min(CHUNK, images * tokens),), device=device)
    made = [
        # x and h in, x' and y out; x', h and both gradients in, dx and dh out.
        Chain(
            "residual_norm",
            partial(fused.residual_norm, dtype=DTYPE),
            partial(plain_residual_norm, dtype=DTYPE),
            (x_BLC, h_BLC, vectors_B9C[:, 0], vectors_B9C[:, 3], vectors_B9C[:, 6]),
            (4 + 2 + 4 + 2 + 4 + 2 + 4 + 2 + 4 + 2) * elements,
        ),
        # q and k in and out; q, k and three gradients in, three out.
        Chain(
            "unit_heads",
            partial(fused.unit_heads, dtype=DTYPE),
            partial(plain_unit_heads, dtype=DTYPE),
            (qkv_BL3HD, random(heads, 1).exp()),
            2 * (4 + 8) * elements,
        ),
        # y and z in, one out; both and the gradient in, two out. Rows are twice as wide.
        Chain(
            "gated_norm",
            partial(fused.gated_norm, eps=1e-5),
            plain_gated_norm,
            (y_BLI, z_BLI, random(2 * width)),
            2 * (3 + 5) * 2 * elements,
        ),
        # Logits in; in again, their gradient out.
        Chain(
            "token_losses",
            partial(loss_of, fused.token_losses, codes_N),
            partial(loss_of, plain_token_losses, codes_N),
            (random(len(codes_N), VOCABULARY),),
            4 * 3 * len(codes_N) * VOCABULARY,
        ),
    ]
    for chain in made:
        for tensor in chain.inputs:
            tensor.requires_grad_()
    return made


def measure(report: Report, made: Sequence[Chain], device: torch.device, rounds: int) -> None:
    """Add the figures of all chains."""
    copied = copy_gib_s(device)
    report.add("copy_gib_s", spread(copied)["max"], how=spread(copied))
    for chain in made:
        taken_s = side_by_side(chain.contestants(), rounds)
        medians_s = {name: statistics.median(values) / REPEATS for name, values in taken_s.items()}
        ours_s = medians_s["ours"]
        how = {name: {"ms": 1e3 * seconds} for name, seconds in medians_s.items()}
        report.add(f"{chain.name}_ms", 1e3 * ours_s, how=how)
        report.add(f"{chain.name}_copy_share", chain.bytes_moved / ours_s / 2**30 / max(copied))
        report.add(f"{chain.name}_vs_eager", medians_s["eager"] / ours_s)
        report.add(f"{chain.name}_vs_compiled", medians_s["compiled"] / ours_s)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=64, help="images of a batch (default 64)")
    options.add_argument("--tokens", type=int, default=680, help="tokens of an image (default 680)")
    options.add_argument("--width", type=int, default=1024, help="width of the model (default 1024)")
    options.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (default 5)")
    args = options.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if problem := obstacle(torch.empty(0, device=device), width=2 * args.width):
        print(f"fused: nothing measured, this benchmark needs a GPU and Triton ({problem})")
        return 0
    fused.switch(True)
    report = Report("fused")
    report.context |= {"images": args.images, "tokens": args.tokens, "width": args.width}
    measure(report, chains(args.images, args.tokens, args.width, device), device, args.rounds)
    report.finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
