"""`mvar train --dry-run`: everything that a start would decide, for any number of ranks, on any machine.

The model is built on the meta device, so nothing of its size is allocated. What a real start would refuse is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mvar import ds_config
from mvar.checkpoint.record import CheckpointRecord, Progress
from mvar.config import TrainConfig
from mvar.ds_config import BatchSplit
from mvar.errors import ConfigError
from mvar.plan.draw import gib
from mvar.plan.memory import Kernels, Setup, memory
from mvar.plan.sizes import IMAGENET_IMAGES, Sizes
from mvar.randomness import permuted, view_of
from mvar.run.folder import RunFolder
from mvar.run.names import folder_of, newest_step
from mvar.run.world import choose_accelerator
from mvar.schedule import FLAT_SHARE, Plan
from mvar.training.job import going_on, prepare, summary

SHOWN_STEPS, SHOWN_SAMPLES = 2, 6


@dataclass(frozen=True)
class Data:
    """What there is to train on, as far as its order goes."""

    images: int
    views: int
    text: str


def dry_run(config: TrainConfig, ranks: int, rank: int = 0, *, pretended: bool = False) -> None:
    """Resolve everything for rank `rank` of `ranks`, allocate nothing, print what would be run.

    `pretended`: not the ranks that were started, so that a store which is not there may be ImageNet. Raises MvarError.
    """
    if not 0 <= rank < ranks:
        raise ConfigError(f"--pretend-rank {rank}: expected 0 to {ranks - 1}, for {ranks} ranks.")
    choose_accelerator()
    split = BatchSplit.of(config.global_batch, ranks, config.engine.micro_batch)
    tree = ds_config.resolve(config, split)
    zero = tree["zero_optimization"]
    done = newest(config)
    if pretended and not Path(config.data.store).exists():
        sizes, data = Sizes.of(config.model), Data(IMAGENET_IMAGES, 1, "ImageNet's number, for the store is not here")
        plan = Plan.of(config, data.images)
        print(f"dry run: {sizes.parameters:,} parameters, {data.images:,} training images ({data.text})")
    else:
        job = prepare(config, ranks)
        if done is not None:
            job = going_on(job, done)
        sizes, plan, images = Sizes.of(job.model), job.plan, job.store.split("train")
        data = Data(len(images), images.views, f"{images.views} views")
        print(f"dry run: {summary(job, sizes.parameters, int(zero['stage']))}")
    by_torch = config.engine.precision == "fp32" or (not torch.cuda.is_available() and not pretended)
    kernels: Kernels = "cpu" if by_torch else "gpu"
    setup = Setup(
        stage=int(zero["stage"]),
        precision=config.engine.precision,
        world=ranks,
        zero=zero,
        ema=config.optim.ema_decay > 0,
        recompute=config.engine.activation_checkpointing,
        kernels=kernels,
        accumulation=split.accumulation,
    )
    for line in (
        f"batch    {split.global_batch} = {split.ranks} ranks x {split.micro_batch} x {split.accumulation};"
        f" rank {rank} takes places {rank * _share(split)} to {(rank + 1) * _share(split) - 1} of each",
        *memory_lines(sizes, setup, split),
        *schedule_lines(plan),
        *order_lines(config, plan, data, split, rank, done),
    ):
        print(f"  {line}")


def _share(split: BatchSplit) -> int:
    return split.global_batch // split.ranks


def newest(config: TrainConfig) -> Progress | None:
    """Where the run folder's newest checkpoint stands; it is not verified."""
    folder = RunFolder(config.run).checkpoints
    step = newest_step(folder)
    return None if step is None else CheckpointRecord.read(folder_of(folder, step)).progress


def memory_lines(sizes: Sizes, setup: Setup, split: BatchSplit) -> Iterator[str]:
    planned = memory(sizes, setup, split.micro_batch)
    parts = ", ".join(f"{name} {gib(count)}" for name, count in planned.categories().items())
    yield f"memory   {gib(planned.peak)} GiB a rank: {parts}"
    if planned.state.host or planned.state.disk:
        yield f"         and host memory {gib(planned.state.host)}, disk {gib(planned.state.disk)} GiB a rank"


def schedule_lines(plan: Plan) -> Iterator[str]:
    """Learning rate and decay where something changes."""
    flat = FLAT_SHARE.get(plan.schedule, 0.0)
    falls = plan.warmup_steps + round(flat * (plan.total_steps - 1 - plan.warmup_steps))
    stations = {
        0: "begins",
        plan.warmup_steps: "warm",
        falls: "begins to fall",
        plan.total_steps // 2: "half",
        plan.last_step - 1: "last",
    }
    for step, name in sorted(stations.items()):
        if 0 <= step < plan.last_step:
            yield (
                f"step {step:>9,}  {plan.samples(step):>13,} images  lr {plan.lr(step):.3e}"
                f"  decay {plan.decay(step):.4f}  {name}"
            )


def order_lines(
    config: TrainConfig, plan: Plan, data: Data, split: BatchSplit, rank: int, done: Progress | None
) -> Iterator[str]:
    """The rank's first samples (with their views) of the run's first steps, and of those after the checkpoint."""
    yield f"order    {data.text}; sample/view of rank {rank}:"
    starts = [*range(SHOWN_STEPS)]
    if done is not None:
        starts += [done.step + number for number in range(SHOWN_STEPS)]
    for step in sorted(set(starts)):
        if step >= plan.last_step:
            continue
        first = plan.samples(step) + rank * _share(split)
        shown = range(first, first + min(SHOWN_SAMPLES, _share(split)))
        epochs = [place // data.images for place in shown]
        samples = permuted(config.seed, epochs, [place % data.images for place in shown], data.images)
        views = view_of(epochs, samples, data.views)
        listed = " ".join(f"{sample}/{view}" for sample, view in zip(samples, views, strict=True))
        more = " ..." if _share(split) > SHOWN_SAMPLES else ""
        resumed = "  (after the checkpoint)" if done is not None and step >= done.step else ""
        yield f"step {step:>9,}  epoch {epochs[0]}: {listed}{more}{resumed}"
