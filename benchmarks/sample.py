"""Sampling with Mamba's state carried from scale to scale, against recomputing Mamba's prefix at every scale.

The baseline, `recompute`, is the published algorithm on the same model and kernels: at each scale attention and
feed-forward see the new tokens, Mamba-2 sees all tokens so far (1,710 instead of 680 at 256 px; counted in operations,
1.5 times the work). Both draw the same images; in fp32 that is checked. Weights are random, guidance is on.

transformer_vs_recompute_fp32    seconds of the baseline divided by ours: transformer, guidance, filters, quantizer
transformer_vs_recompute_bf16    the same in bf16
end_to_end_vs_recompute_fp32     the same with the decoder to pixels (published size) on both sides
end_to_end_vs_recompute_bf16     the same in bf16
peak_share_bf16                  operations of the model's weights a second, divided by what torch.matmul reaches here
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, parser, side_by_side, spread
from benchmarks.roofline import matmul_gflops
from mvar.config import ModelConfig
from mvar.model.block import Block
from mvar.model.init import init_weights_
from mvar.model.mamba2 import Mamba2, MambaState
from mvar.model.transformer import MVAR
from mvar.sampling.sampler import generate, generate_latent
from mvar.tokenizer.vqvae import VQVAE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {"transformer_vs_recompute_fp32": ">= 1.4", "transformer_vs_recompute_bf16": ">= 1.4"}


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


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--depth", type=int, default=12, help="depth of the model (default 12)")
    options.add_argument("--batch", type=int, default=4, help="images drawn together (default 4)")
    options.add_argument("--runs", type=int, default=3, help="rounds after the warm-up (default 3)")
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options.add_argument("--decoder-channels", type=int, default=160, help="width of the decoder (default 160)")
    options.add_argument("--precision", choices=[*DTYPES, "both"], default="both", help="arithmetic (default both)")
    args = options.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("sample")
    report.context |= {"depth": args.depth, "batch": args.batch, "decoder_channels": args.decoder_channels}
    for precision in DTYPES if args.precision == "both" else (args.precision,):
        measure(report, precision, args.depth, args.batch, args.runs, args.decoder_channels, device)
    report.finish(args.json)
    return 0


@torch.no_grad()
def measure(
    report: Report, precision: str, depth: int, batch: int, runs: int, decoder_channels: int, device: torch.device
) -> None:
    """Add the figures of one precision."""
    dtype = DTYPES[precision]
    model = MVAR(depth)
    init_weights_(model, 0, ModelConfig(init_gamma=0.1, init_head=1.0))
    model.to(device).store_matmuls_(dtype).eval()
    torch.manual_seed(0)
    tokenizer = VQVAE(decoder_channels).eval().to(device)
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    models = {"ours": model, "recompute": recomputing(model)}
    labels_B = torch.arange(batch, device=device)

    if precision == "fp32":
        ours, baseline = (generate(models[name], tokenizer, labels_B, seeds=range(batch)) for name in models)
        agreement = float((ours == baseline).double().mean())
        report.context["codes_equal_fp32"] = agreement
        if agreement < 0.99:
            raise SystemExit(f"ours and the baseline draw different images: only {agreement:.1%} of the codes agree")

    def sampling(name: str, decode: bool) -> Callable[[], object]:
        def run() -> object:
            latent_BChw = generate_latent(models[name], tokenizer, labels_B, seeds=range(batch))
            if not decode:
                return latent_BChw
            with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                return tokenizer.decode_latent(latent_BChw)

        return run

    for key, decode in (("transformer_vs_recompute", False), ("end_to_end_vs_recompute", True)):
        seconds = side_by_side({name: sampling(name, decode) for name in models}, rounds=runs)
        ratio = statistics.median(seconds["recompute"]) / statistics.median(seconds["ours"])
        how = {f"{name}_s": spread(values) for name, values in seconds.items()}
        name = f"{key}_{precision}"
        report.add(name, ratio, goal=GOALS.get(name), how=how)
        if precision == "bf16" and not decode:
            gflops = 2e-9 * batch * model.pyramid.total * flops_per_token(model) / min(seconds["ours"])
            report.add("peak_share_bf16", gflops / matmul_gflops(dtype, device))


if __name__ == "__main__":
    raise SystemExit(main())
