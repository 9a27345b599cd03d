"""Short trainings on DeepSpeed, many in one process: `python -m tests.gpu.engine_runs GROUP FOLDER` (see test_engine).

Writes FOLDER/GROUP.json after each case, so that one that fails, or ends the process, does not hide the others.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from mvar.config import TrainConfig
from mvar.plan.memory import Setup, memory
from mvar.plan.sizes import Sizes
from mvar.run.world import World, finish, start
from mvar.scales import PATCH_NUMS_256
from mvar.testing.code_stores import make_store
from mvar.testing.tiny_runs import settings
from mvar.training.engine import Engine
from mvar.training.job import TrainingJob, prepare
from mvar.training.objective import Objective

PATCH_NUMS = (1, 2, 3, 4, 6)
STEPS = 4
RECOMPUTE: tuple[Any, ...] = ("selective", "off", "every", 2)
"""Selective comes first: at stage 3 DeepSpeed replaces torch's linear layer for the rest of the process."""
FIRST_SCALE_POWER, OVERFLOWS = 24, 14
"""fp16's loss scale at the start, far too large for fp16's range, and how many steps it gets to come down."""

Case = dict[str, Any]
"""Overrides of the configuration by dotted key with `__`, and `zero` and `fp16`: sections of the template."""


def cases_of(group: str) -> dict[str, Case]:
    """By name."""
    if group == "reference":
        return {"fp32": {"stage": 2, "engine__precision": "fp32"}}
    if group == "zero012":
        exact = {"zero0 fp32": {"stage": 0}, "zero1 fp32": {"stage": 1}, "zero2 fp32": {"stage": 2}}
        for case in exact.values():
            case["engine__precision"] = "fp32"
        mixed = {"zero0 bf16_autocast": {"stage": 0, "engine__precision": "bf16_autocast"}}
        return mixed | exact | {f"zero{stage} bf16 {how}": bf16(stage, how) for stage in (1, 2) for how in RECOMPUTE}
    if group == "zero3":
        threshold = {"stage3_param_persistence_threshold": 0}
        found = {f"zero3 bf16 {how} threshold 0": bf16(3, how) | {"zero": threshold} for how in RECOMPUTE}
        return found | {"zero3 fp32 threshold 0": {"stage": 3, "engine__precision": "fp32", "zero": threshold}}
    if group == "zero3_default":
        return {f"zero3 bf16 {how} default threshold": bf16(3, how) for how in RECOMPUTE}
    if group == "fp16":
        scaling = {"initial_scale_power": FIRST_SCALE_POWER}
        return {
            f"zero{stage} fp16": {"stage": stage, "engine__precision": "fp16", "fp16": scaling} for stage in (1, 2, 3)
        }
    if group == "memory":
        size: Case = {"model__depth": 4, "model__width": 768, "model__heads": 12, "global_batch": 16}
        size |= {"model__patch_nums": list(PATCH_NUMS_256)}
        return {f"memory {how}": bf16(2, how) | size for how in ("selective", "off", "every")}
    raise SystemExit(f"unknown group {group}")


def bf16(stage: int, recompute: Any) -> Case:
    return {"stage": stage, "engine__precision": "bf16", "engine__activation_checkpointing": recompute}


def configuration(folder: Path, store: Path, case: Case) -> TrainConfig:
    case = dict(case)
    stage, zero, fp16 = case.pop("stage"), case.pop("zero", {}), case.pop("fp16", None)
    template = folder / "template.json"
    template.write_text(json.dumps({"zero_optimization": {"stage": stage} | zero} | ({"fp16": fp16} if fp16 else {})))
    tree = settings(folder, store, "run", stage=stage, engine__ds_config=str(template), engine__threads=2)
    model = {"depth": 2, "width": 128, "heads": 2, "patch_nums": list(PATCH_NUMS), "vocab_size": 64}
    tree["model"] |= model | {"init_gamma": 0.3, "init_head": 1.0}
    for key, value in case.items():
        section, _, leaf = key.rpartition("__")
        (tree[section] if section else tree)[leaf] = value
    return TrainConfig.model_validate(tree)


def build(config: TrainConfig, world: World) -> tuple[Engine, TrainingJob]:
    job = prepare(config, world.size)
    objective = Objective(job.store.quantizer(), world.device)
    engine = Engine(job.config, job.model, job.plan, job.split, objective, world)
    engine.initialise()
    return engine, job


def train(config: TrainConfig, world: World, steps: int) -> dict[str, Any]:
    """What each step says, always of the same batches."""
    engine, job = build(config, world)
    stream = job.stream.rank_batches(0, world.rank, world.size, job.split.micro_batch)
    found: dict[str, list[Any]] = {"losses": [], "norms": [], "skipped": [], "scales": []}
    for step in range(steps):
        result = engine.step(step, [next(stream) for _ in range(job.split.accumulation)])
        found["losses"].append(result.averages.loss)
        found["norms"].append(result.grad_norm)
        found["skipped"].append(result.skipped)
        found["scales"].append(result.loss_scale)
    stream.close()
    return {**found, "skipped_steps": engine.skipped_steps}


def remember(config: TrainConfig, world: World) -> dict[str, Any]:
    """Peak bytes of a training step, as measured and as planned. On a CPU nothing is measured."""
    engine, job = build(config, world)
    batch = job.stream.batch(0, 0, job.split.micro_batch)
    engine.step(0, [batch])
    peak = None
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine.step(1, [batch])
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    setup = Setup(2, "bf16", 1, recompute=config.engine.activation_checkpointing, kernels="gpu")
    return {"peak": peak, "planned": memory(Sizes.of(job.model), setup, config.global_batch).peak}


def allow_fp16_on_cpu() -> None:
    """DeepSpeed asks for instructions that some CPUs lack. For a rehearsal they need not be fast."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def main(group: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    measured = group == "memory"
    store = make_store(folder / "store", train=64, patch_nums=PATCH_NUMS_256 if measured else PATCH_NUMS, vocab=64)
    world = start(threads=2)
    rehearsal = world.device.type == "cpu"
    if rehearsal:
        allow_fp16_on_cpu()
    results: dict[str, Any] = {}
    for name, case in cases_of(group).items():
        began_s = time.monotonic()
        try:
            if measured and rehearsal:
                case |= {"model__width": 64, "model__heads": 1, "global_batch": 1}
            config = configuration(folder, store, case)
            if measured:
                results[name] = remember(config, world)
            else:
                results[name] = train(config, world, OVERFLOWS if group == "fp16" else STEPS)
        except Exception as error:
            text = traceback.format_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}\n{text[-3000:]}"}
        results[name]["seconds"] = time.monotonic() - began_s
        (folder / f"{group}.json").write_text(json.dumps(results))
        gc.collect()
        if not rehearsal:
            torch.cuda.empty_cache()
    finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
