"""What a training decided by itself, told once at its start, with the reason."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from mvar.log import Chosen, log, tell
from mvar.model.backends import DTYPES
from mvar.model.kernels.precision import lacking, product_dtype
from mvar.run.world import World
from mvar.training.job import TrainingJob
from mvar.training.mfu import chosen_peak

FEW_CORES = 2
"""With fewer for each rank, a GPU waits for its process: reading, launching kernels and saving share them."""


def chosen(job: TrainingJob, world: World) -> list[Chosen]:
    """What follows from configuration and machine alone."""
    peak = chosen_peak(job.config.tracking.peak_tflops, world.device)
    own = [products(job.config.engine.precision, world.device), micro_batch(job), threads(job, world)]
    return [*own, *([peak] if peak is not None else [])]


def products(precision: str, device: torch.device) -> Chosen:
    asked = DTYPES[precision]
    found = product_dtype(asked, device)
    name = f"{found} on {device}".removeprefix("torch.")
    problem = lacking(asked, device)
    return Chosen("matrix products", name, problem, slow=bool(problem))


def micro_batch(job: TrainingJob) -> Chosen:
    split = job.split
    way = f"{split.micro_batch} images a rank, {split.accumulation} times a step"
    asked = job.config.engine.micro_batch is not None
    return Chosen(
        "micro-batch", way, "" if asked else "engine.micro_batch is not set, so a rank holds all of its images"
    )


def threads(job: TrainingJob, world: World) -> Chosen:
    """Loud where the rank waits for cores that the machine may have: a GPU waits with it."""
    own, machine = world.own_cores, os.cpu_count() or 1
    more = world.device.type == "cuda" or machine >= FEW_CORES * world.place.local_size
    reason = "" if job.config.engine.threads else f"{own} of this machine's {machine} cores are this rank's"
    if few := own < FEW_CORES and more:
        reason = (
            f"{own} of this machine's {machine} cores is this rank's: a launcher or container gives it no more"
            " (under Slurm: --cpus-per-task)"
        )
    return Chosen("CPU threads", f"{torch.get_num_threads()} a rank", reason, slow=few)


def announce(world: World, own: Sequence[Chosen]) -> None:
    """Every rank tells its own; rank 0 also where others differ, such as on a node that lacks a package.

    All ranks together.
    """
    tell(own)
    everybody = world.gather(list(own))
    if not world.is_main:
        return
    for other in dict.fromkeys(one for theirs in everybody[1:] for one in theirs if one not in everybody[0]):
        ranks = [rank for rank, theirs in enumerate(everybody) if other in theirs]
        log.warning("%d ranks, from rank %d on, differ: %s", len(ranks), ranks[0], other)
