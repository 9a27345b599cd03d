"""How cost grows: time with the number of tokens, and bytes sent with the number of ranks, against their theories.

exponent_step          slope of log(seconds) over log(tokens) of a model's forward and backward pass, depth 4
exponent_tokens        slope of log(seconds) over log(tokens) of a block's token mixing, forward and backward: attention
                       inside each scale, then Mamba-2; 1 is linear
exponent_tokens_dense  the same for attention over all tokens at once
zero2_bytes_vs_theory  bytes that a rank sends in a step under ZeRO 2, divided by those of the ZeRO paper: 2 P elements
                       times (N - 1) / N (Rajbhandari et al. 2020, section 7). DeepSpeed all-reduces gradients where
                       the paper reduce-scatters them, so 1.5 is expected
zero3_bytes_vs_theory  the same under ZeRO 3 with weights gathered twice: 3 P elements
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Report, parser, side_by_side
from mvar.config import TrainConfig
from mvar.model.attention import ScaleAttention
from mvar.model.mamba2 import Mamba2
from mvar.model.token_loss import TokenLosses
from mvar.model.transformer import MVAR
from mvar.plan.links import Kind
from mvar.plan.memory import Setup, model_state
from mvar.plan.sizes import Sizes
from mvar.plan.traffic import Collective, Traffic, traffic
from mvar.scales import PATCH_NUMS_256, PATCH_NUMS_512
from mvar.testing.code_stores import make_store
from mvar.testing.engine_bytes import measure
from mvar.testing.ranks import run_ranks
from mvar.testing.tiny_runs import settings

Pyramids = Sequence[tuple[int, ...]]
PYRAMIDS: Pyramids = (PATCH_NUMS_256, PATCH_NUMS_512, (*PATCH_NUMS_512, 48))
TINY: Pyramids = ((1, 2), (1, 2, 3), (1, 2, 3, 4))
DEPTH = 4
WIDTH = 64 * DEPTH
BUCKET = 1_000_000


def slope(points: Mapping[int, float]) -> float:
    """Least-squares slope of log(value) over log(key)."""
    xs, ys = [math.log(key) for key in points], [math.log(value) for value in points.values()]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


def exponents(pyramids: Pyramids, rounds: int) -> dict[str, list[float]]:
    """Of a model's forward and backward pass ("step"), of its token mixing, and of dense attention; of each round."""
    attention, mamba = ScaleAttention(WIDTH, WIDTH // 64), Mamba2(WIDTH)
    points: dict[str, dict[int, list[float]]] = {"step": {}, "tokens": {}, "tokens_dense": {}}
    for sides in pyramids:
        lengths = tuple(side * side for side in sides)
        tokens = sum(lengths)
        x_BLC = torch.randn(1, tokens, WIDTH, requires_grad=True)
        model = MVAR(DEPTH, patch_nums=sides)
        codes_BL = torch.randint(model.vocab_size, (1, tokens))
        inputs_BLC = torch.randn(1, tokens - 1, model.latent_channels)

        def step(model: MVAR = model, x: Tensor = inputs_BLC, codes: Tensor = codes_BL) -> None:
            TokenLosses(*model(torch.tensor([0]), x, codes_BL=codes)).loss_BL.mean().backward()

        def both(x: Tensor = x_BLC, lengths: tuple[int, ...] = lengths) -> None:
            mamba(attention(x, lengths)).sum().backward()

        def whole(x: Tensor = x_BLC, tokens: int = tokens) -> None:
            attention(x, (tokens,)).sum().backward()

        contestants: dict[str, Callable[[], object]] = {"step": step, "tokens": both, "tokens_dense": whole}
        for name, taken in side_by_side(contestants, rounds).items():
            points[name][tokens] = taken
    return {
        name: [slope({tokens: taken[i] for tokens, taken in own.items()}) for i in range(rounds)]
        for name, own in points.items()
    }


def planned(tree: TrainConfig, world: int) -> tuple[Sizes, Setup]:
    zero = json.loads(tree.engine.ds_config.read_text())["zero_optimization"]
    sizes = Sizes.of(tree.model.model_copy(update={"num_classes": 3}))
    return sizes, Setup(zero["stage"], tree.engine.precision, world, zero, accumulation=tree.global_batch // world)


def bytes_of_stages(report: Report, world: int, precision: str) -> None:
    """Measure a step of a small model on `world` ranks under every stage, and add what the plan says beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        store = make_store(folder / "store")
        trees: dict[str, TrainConfig] = {}
        for number in (1, 2, 3):
            zero = {"stage": number, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
            zero |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
            template = folder / f"zero{number}.json"
            template.write_text(json.dumps({"zero_optimization": zero}))
            tree = settings(folder, store, global_batch=world)
            tree["model"] |= {"depth": 3, "width": 192, "heads": 3}
            tree["engine"] |= {"ds_config": str(template), "precision": precision}
            trees[str(number)] = TrainConfig.model_validate(tree)
        found: dict[str, list[dict[str, dict[str, int]]]] = {}
        jobs: tuple[tuple[str, ...], ...] = (("1", "2"), ("3",))
        for stages in jobs:
            plain = {stage: trees[stage].model_dump(mode="json") for stage in stages}
            ranks = run_ranks(measure, world, folder / f"ranks{stages[0]}", trees=plain)
            found |= {stage: [rank[stage] for rank in ranks] for stage in stages}
        for stage, ranks_found in found.items():
            sizes, setup = planned(trees[stage], world)
            held, sent = ranks_found[0]["held"], ranks_found[0]["sent"]
            state = held["weights"] + held["gradients"] + held["optimizer"]
            gathered = sent["all_gather_into_tensor"] + sent["all_gather"]
            summed, scattered = sent["all_reduce"], sent["reduce_scatter_tensor"]
            handed: dict[Kind, int] = {"all_reduce": summed, "reduce_scatter": scattered, "all_gather": gathered}
            real = Traffic(world, after=tuple(Collective(kind, count, 1) for kind, count in handed.items()))
            theory = traffic(sizes, setup)
            report.context[f"zero{stage}"] = {
                "parameters": sizes.parameters,
                "world": world,
                "state_measured": state,
                "state_planned": model_state(sizes, setup).total,
                "sent_measured": real.on_the_wire,
                "sent_planned": theory.on_the_wire,
            }
            if stage in ("2", "3"):
                ideal = (2 if stage == "2" else 3) * setup.weight_bytes * sizes.parameters * (world - 1) / world
                report.add(f"zero{stage}_bytes_vs_theory", real.on_the_wire / ideal)
                report.add(f"zero{stage}_bytes_vs_plan", real.on_the_wire / theory.on_the_wire, "0.95 to 1.05")
            report.add(f"zero{stage}_state_vs_plan", state / model_state(sizes, setup).total, "0.98 to 1.02")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--world", type=int, default=2, help="ranks of the messages (default 2)")
    arguments.add_argument("--precision", default="bf16", help="of the weights: bf16 or fp32 (default bf16)")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of each timing (default 5)")
    arguments.add_argument("--tiny", action="store_true", help="a few tokens, for tests")
    args = arguments.parse_args(argv)
    report = Report("scaling")
    for name, exponent in exponents(TINY if args.tiny else PYRAMIDS, args.rounds).items():
        report.median(f"exponent_{name}", exponent, "<= 1.05" if name == "step" else None)
    bytes_of_stages(report, args.world, args.precision)
    report.finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
