"""M-VAR against VAR of 1.25 times the depth: the comparison that M-VAR's argument is about.

VAR (`benchmarks/var.py`, written from its paper) attends over all coarser scales, has no Mamba, and is 64 x its own
depth wide. It trains in a plain loop, under autocast in bf16, with clipping and torch's fused AdamW; it samples with a
key-value cache, with the same guidance, filters, random numbers and quantizer. Ours: a step of the engine with ZeRO 2,
and `mvar.sampling`. Chains of our step are compiled whatever the depth, as `engine.compile=auto` has it for large
models. Weights are random. Both take turns.

Figures end with precision and batch, as in tokens_vs_var_bf16_b4, one for each of --precision and --batch:

tokens_vs_var_*        training: seconds of VAR's step (forward, backward, clipping, AdamW) divided by ours
transformer_vs_var_*   sampling without decoder: seconds of VAR divided by ours
step_s_*, var_step_s_*           seconds of a step
sampling_s_*, var_sampling_s_*   seconds of drawing the batch
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from benchmarks.checkpoint import Run
from benchmarks.harness import DTYPES, SIZES, Report, add_model, parser, side_by_side
from benchmarks.plain import Loop
from benchmarks.sample import fresh_model
from benchmarks.train_step import add_compile, configurations
from benchmarks.var import VAR, draw_latent
from mvar.config import TrainConfig
from mvar.model.kernels import fused
from mvar.run import world as worlds
from mvar.run.world import World
from mvar.sampling.sampler import generate_latent
from mvar.tokenizer.quantizer import Quantizer

GOALS = {("tokens", "fp32"): ">= 1.4", ("tokens", "bf16"): ">= 1.8", ("transformer", "fp32"): ">= 2"}
GOALS["transformer", "bf16"] = ">= 2"


def deeper(depth: int) -> int:
    """1.25 times the depth, rounded down where it is no whole number: never to our advantage."""
    return 5 * depth // 4


def add(report: Report, args: tuple[str, int, str], what: str, noun: str, seconds: dict[str, list[float]]) -> None:
    """The ratio and both times of one comparison. `args`: precision, batch and size."""
    precision, batch, size = args
    goal = GOALS[what, precision] if size == "256" and batch >= 4 else None
    report.compare(f"{what}_vs_var_{precision}_b{batch}", seconds, "var", goal)
    report.median(f"{noun}_s_{precision}_b{batch}", seconds["ours"])
    report.median(f"var_{noun}_s_{precision}_b{batch}", seconds["var"])


def training(config: TrainConfig, world: World, rounds: int) -> dict[str, list[float]]:
    """Seconds of steps of both."""
    ours = Run(config, world)
    torch.manual_seed(0)
    model = VAR(deeper(config.model.depth), patch_nums=config.model.patch_nums).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.base_lr, fused=True)
    var = Loop(config, ours.engine.objective, model, optimizer)
    seconds = side_by_side({"ours": ours.step, "var": var.step}, rounds)
    ours.close()
    return seconds


@torch.no_grad()
def sampling(
    depth: int, size: str, precision: str, batch: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of drawing a batch of both, ours as `mvar sample` draws many."""
    fused.switch(device.type == "cuda")
    ours = fresh_model(depth, size, precision, device)
    torch.manual_seed(0)
    var = VAR(deeper(depth), patch_nums=SIZES[size]).to(device, DTYPES[precision]).eval()
    quantizer = Quantizer(ours.vocab_size, ours.latent_channels, SIZES[size]).to(device)
    labels_B, seeds = torch.arange(batch, device=device), range(batch)
    contestants = {
        "ours": lambda: generate_latent(ours, quantizer, labels_B, seeds=seeds),
        "var": lambda: draw_latent(var, quantizer, labels_B, seeds=seeds),
    }
    return side_by_side(contestants, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    add_model(options, batch=(4,))
    add_compile(options)
    args = options.parse_args(argv)
    report = Report(f"against_var_{args.size}", context={"var_depth": deeper(args.depth)})
    world = worlds.start()
    for config in configurations(args):
        precision, batch = config.engine.precision, config.global_batch
        where = (precision, batch, args.size)
        add(report, where, "tokens", "step", training(config, world, args.rounds))
        gc.collect()
        drawn = sampling(args.depth, args.size, precision, batch, args.rounds, world.device)
        add(report, where, "transformer", "sampling", drawn)
    worlds.finish()
    report.finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
