"""A whole training step against the same model written in plain torch, and the memory that it keeps against the plan.

The baseline (`benchmarks/plain.py`) has the same weights, linear layers, dtypes and batch, a dense mask, and torch's
default AdamW. Ours is a step of the engine as `mvar train` takes it, on one process with ZeRO 2. In fp32 both begin
with the same loss, which is checked.

Chains between matrix products are compiled, as `engine.compile=auto` has it for large models, whatever the depth here.
Figures end with precision and batch, as in tokens_vs_baseline_bf16_b8, one for each of --precision and --batch:

tokens_vs_baseline_*   tokens a second of ours divided by the baseline's; bf16: engine.precision=bf16, the baseline
                       under bf16 autocast
tokens_per_s_*         of ours
peak_share_*           operations of a step (as for MFU) a second, divided by the best that this machine reaches in
                       matrix products of that precision (`benchmarks/roofline.py`, peak)
memory_vs_plan_fp32_*  bytes kept for the backward pass (GPU: peak of the step) divided by the plan's
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch

from benchmarks.checkpoint import Run
from benchmarks.harness import SIZES, Report, add_model, parser, precisions, side_by_side
from benchmarks.plain import Loop, plain_mvar
from benchmarks.roofline import peak
from mvar.config import Switch, TrainConfig
from mvar.plan.flops import flops
from mvar.plan.memory import Kernels, Setup, memory, saved_for_backward
from mvar.plan.sizes import Sizes
from mvar.run import world as worlds
from mvar.run.world import World
from mvar.testing.engine_bytes import kept_by_autograd
from mvar.training.optimizer import parameter_groups


def goals(precision: str, batch: int) -> dict[str, str]:
    """What figures should reach at that precision and batch."""
    if precision == "fp32" and batch >= 4:
        return {"tokens_vs_baseline": ">= 1.6", "peak_share": ">= 0.7"}
    if precision == "bf16" and batch >= 8:
        return {"tokens_vs_baseline": ">= 2.5", "peak_share": ">= 0.25"}
    return {}


def configuration(folder: Path, depth: int, batch: int, precision: str, size: str, compiling: Switch) -> TrainConfig:
    """Without random dropping, so that both see the same numbers."""
    model = {"depth": depth, "num_classes": 1000, "patch_nums": SIZES[size], "drop_path": 0.0, "label_drop": 0.0}
    return TrainConfig.model_validate(
        {
            "run": str(folder),
            "global_batch": batch,
            "data": {"store": "none"},
            "model": model,
            "engine": {"precision": precision, "ds_config": "ds_configs/zero2.json", "compile": compiling},
        }
    )


def add_compile(options: argparse.ArgumentParser) -> None:
    """The option of that name."""
    options.add_argument("--compile", choices=get_args(Switch), default="on", help="engine.compile (default on)")


def configurations(args: argparse.Namespace) -> Iterator[TrainConfig]:
    """One for each precision and batch of the command line (`add_model`). What the one before held is freed first."""
    with tempfile.TemporaryDirectory() as folder:
        for precision in precisions(args.precision):
            for batch in args.batch:
                yield configuration(Path(folder), args.depth, batch, precision, args.size, args.compile)
                gc.collect()


def measure(report: Report, config: TrainConfig, world: World, rounds: int, peak_gflops: float) -> None:
    """Add the figures of one precision and batch."""
    precision, batch = config.engine.precision, config.global_batch
    wanted, name = goals(precision, batch), f"{precision}_b{batch}"
    ours = Run(config, world)
    model = plain_mvar(config).to(world.device)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=config.optim.base_lr)
    plain = Loop(config, ours.engine.objective, model, optimizer)
    report.context["parameters"] = ours.engine.parameters
    if precision == "fp32":
        difference = abs(plain.step() - ours.loss().item())
        report.context[f"loss_difference_{name}"] = difference
        if difference > 1e-4:
            raise SystemExit(f"ours and the baseline are different models: their first losses differ by {difference:g}")
        report.add(f"memory_vs_plan_{name}", memory_against_plan(ours, world))
    seconds = side_by_side({"ours": ours.step, "plain": plain.step}, rounds)
    ours.close()
    report.compare(f"tokens_vs_baseline_{name}", seconds, "plain", wanted.get("tokens_vs_baseline"))
    sizes = Sizes.of(config.model)
    report.median(f"tokens_per_s_{name}", [batch * sizes.tokens / step_s for step_s in seconds["ours"]])
    at_peak_s = batch * flops(sizes).training / 1e9 / peak_gflops
    report.median(f"peak_share_{name}", [at_peak_s / step_s for step_s in seconds["ours"]], wanted.get("peak_share"))


def memory_against_plan(run: Run, world: World) -> float:
    """What a step keeps, divided by the plan's figure. On a GPU the peak, else what autograd keeps."""
    config = run.config
    kernels: Kernels = "cpu"
    if world.device.type == "cuda":
        kernels = "gpu" if all(find_spec(name) for name in ("flash_attn", "mamba_ssm")) else "gpu_torch"
    setup = Setup(2, config.engine.precision, 1, kernels=kernels)
    sizes = Sizes.of(config.model)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run.step()
        return torch.cuda.max_memory_allocated() / memory(sizes, setup, config.global_batch).peak
    with kept_by_autograd(run.engine.model.parameters()) as kept:
        run.loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / saved_for_backward(
        sizes, setup, config.global_batch
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    add_model(options, batch=(2, 8))
    add_compile(options)
    args = options.parse_args(argv)
    report = Report("train_step")
    world = worlds.start()
    for config in configurations(args):
        precision = config.engine.precision
        if f"peak_{precision}" not in report.context:
            gflops, way = peak(precision, world.device, args.rounds)
            report.context[f"peak_{precision}"] = {"gflops": gflops, "multiplied_in": way}
        measure(report, config, world, args.rounds, report.context[f"peak_{precision}"]["gflops"])
    worlds.finish()
    report.finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
