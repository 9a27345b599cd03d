"""Sampling with Mamba's state carried from scale to scale, against recomputing Mamba's prefix at every scale.

The baseline, `recompute`, is the published algorithm on the same model and kernels: at each scale attention and
feed-forward see the new tokens, Mamba-2 sees all tokens so far (1,710 instead of 680 at 256 px; counted in operations,
1.5 times the work). Both draw the same images; in fp32 that is checked. Weights are random, guidance is on.

Figures end with precision and batch, as in transformer_vs_recompute_bf16_b8, one for each of --precision and --batch:

transformer_vs_recompute_*   seconds of the baseline divided by ours: transformer, guidance, filters, quantizer
end_to_end_vs_recompute_*    the same with the decoder to pixels (published size) on both sides; at the smallest batch.
                             On a CPU without 16-bit matrix instructions the decoder runs in fp32
peak_share_*                 operations of the model's weights a second, divided by the best that this machine reaches
                             in matrix products of that precision (`benchmarks/roofline.py`, peak)
imgs_per_s_*                 of ours, without the decoder

A table of milliseconds by scale follows, of ours, guidance, filters and quantizer included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import DTYPES, SIZES, Report, add_model, parser, precisions, seconds_of, side_by_side
from benchmarks.page import by_scale
from benchmarks.roofline import peak
from mvar.config import ModelConfig
from mvar.machine.allocator import keep_freed_memory
from mvar.model.block import Block
from mvar.model.init import init_weights_
from mvar.model.kernels.precision import product_dtype
from mvar.model.mamba2 import Mamba2, MambaState
from mvar.model.transformer import MVAR
from mvar.sampling.sampler import generate, generate_latent, generate_scales
from mvar.tokenizer.vqvae import VQVAE

GOAL = ">= 1.5"


class RecomputingMamba(nn.Module):
    """Mamba-2 without a state: keeps its inputs (B, L, C) so far, and goes over all of them again."""

    def __init__(self, mamba: Mamba2) -> None:
        super().__init__()
        self.mamba = mamba

    def forward(self, u_BLC: Tensor, state: MambaState) -> Tensor:
        so_far_BLC = u_BLC if state.tail_BVK is None else torch.cat((state.tail_BVK, u_BLC), dim=1)
        state.tail_BVK = so_far_BLC
        out_BLC: Tensor = self.mamba(so_far_BLC)[:, -u_BLC.shape[1] :]
        return out_BLC


def recomputing(model: MVAR) -> MVAR:
    """A model with the same weights that recomputes Mamba's prefix."""
    with torch.device("meta"):
        twin = MVAR(model.depth, model.num_classes, model.pyramid.patch_nums, model.vocab_size, model.latent_channels)
    twin.load_state_dict(model.state_dict(), assign=True)
    for block in twin.blocks:
        assert isinstance(block, Block)
        block.mamba = RecomputingMamba(block.mamba)  # type: ignore[assignment]
    return twin


def flops_per_token(model: MVAR) -> int:
    """Two operations for every weight that each token is multiplied with; conditioning works once an image."""
    per_token = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "ada_lin" not in name and "_emb" not in name:
            per_token += 2 * parameter.numel()
    return per_token


def fresh_model(depth: int, size: str, precision: str, device: torch.device) -> MVAR:
    """Random weights that draw codes of all kinds, stored as sampling in that precision stores them."""
    model = MVAR(depth, patch_nums=SIZES[size])
    init_weights_(model, 0, ModelConfig(init_gamma=0.1, init_head=1.0))
    return model.to(device).store_matmuls_(DTYPES[precision]).eval()


@torch.no_grad()
def measure(report: Report, args: argparse.Namespace, precision: str, tokenizer: VQVAE, device: torch.device) -> None:
    """Add the figures of one precision."""
    model = fresh_model(args.depth, args.size, precision, device)
    models = {"ours": model, "recompute": recomputing(model)}
    gflops, way = peak(precision, device, args.rounds)
    report.context[f"peak_{precision}"] = {"gflops": gflops, "multiplied_in": way}

    decoding = product_dtype(DTYPES[precision], device)

    def drawing(name: str, batch: int, decode: bool) -> Callable[[], object]:
        labels_B = torch.arange(batch, device=device)

        def run() -> object:
            latent_BChw = generate_latent(models[name], tokenizer, labels_B, seeds=range(batch))
            if not decode:
                return latent_BChw
            with torch.autocast(device.type, decoding, enabled=decoding != torch.float32):
                return tokenizer.decode_latent(latent_BChw)

        return run

    if precision == "fp32":
        require_equal_codes(report, models, tokenizer, max(args.batch), device)
    for batch in args.batch:
        name = f"{precision}_b{batch}"
        seconds = side_by_side({who: drawing(who, batch, False) for who in models}, args.rounds)
        report.compare(f"transformer_vs_recompute_{name}", seconds, "recompute", GOAL)
        at_peak_s = 2e-9 * batch * model.pyramid.total * flops_per_token(model) / gflops
        wanted = ">= 0.4" if precision == "bf16" and batch >= 8 else None
        report.median(f"peak_share_{name}", [at_peak_s / own_s for own_s in seconds["ours"]], wanted)
        report.median(f"imgs_per_s_{name}", [batch / own_s for own_s in seconds["ours"]])
        by_scale_ms = milliseconds_by_scale(model, tokenizer, torch.arange(batch, device=device), args.rounds)
        report.context["by_scale_ms"][name] = by_scale_ms
        if batch == min(args.batch):
            seconds = side_by_side({who: drawing(who, batch, True) for who in models}, args.rounds)
            report.compare(f"end_to_end_vs_recompute_{name}", seconds, "recompute")


def milliseconds_by_scale(model: MVAR, tokenizer: VQVAE, labels_B: Tensor, rounds: int) -> list[float]:
    """Coarse to fine, medians of the rounds."""
    taken_ms: list[list[float]] = []
    for _ in range(rounds):
        steps = generate_scales(model, tokenizer, labels_B)
        taken_ms.append([1e3 * seconds_of(partial(next, steps)) for _ in model.pyramid.patch_nums])
    return [statistics.median(of_scale) for of_scale in zip(*taken_ms, strict=True)]


def require_equal_codes(
    report: Report, models: dict[str, MVAR], tokenizer: VQVAE, batch: int, device: torch.device
) -> None:
    """Leave the program unless both draw the same images."""
    labels_B = torch.arange(batch, device=device)
    ours, baseline = (generate(model, tokenizer, labels_B, seeds=range(batch)) for model in models.values())
    agreement = float((ours == baseline).double().mean())
    report.context["codes_equal_fp32"] = agreement
    if agreement < 0.99:
        raise SystemExit(f"ours and the baseline draw different images: only {agreement:.1%} of the codes agree")


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    add_model(options, batch=(1, 2, 8))
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options.add_argument("--decoder-channels", type=int, default=160, help="width of the decoder (default 160)")
    args = options.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    report = Report("sample")
    report.context["sides"], report.context["by_scale_ms"] = list(SIZES[args.size]), {}
    torch.manual_seed(0)
    tokenizer = VQVAE(args.decoder_channels, patch_nums=SIZES[args.size]).eval().to(device)
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for precision in precisions(args.precision):
        measure(report, args, precision, tokenizer, device)
        gc.collect()
    report.finish(args)
    print("\n".join(by_scale(report.context)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
