"""`mvar verify-step`: do the machines of a run compute the same twice? Loss and gradient of a micro-batch, bit for bit.

    mvar verify-step runs/d16                                             this machine's first GPU, or its CPU
    torchrun --nproc-per-node 8 -m mvar.verify_step runs/d16              every GPU of a machine
    srun --ntasks-per-node=8 python -m mvar.verify_step runs/d16          every GPU of a Slurm allocation

Takes the weights of the newest checkpoint and the data that come after it. On GPUs it computes as with
engine.deterministic=true, whatever the run does. The run's checkpoints and records stay as they are; a difference is
written into RUN/strikes.jsonl with node and GPU. Exit codes: 0 the same bits, 1 a difference, 2 wrong use.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mvar.checkpoint.choosing import newest_good, problem_of
from mvar.checkpoint.record import CheckpointRecord
from mvar.cli import run_command
from mvar.config import TrainConfig
from mvar.errors import EXIT_FINISHED, CheckpointError
from mvar.run import world as worlds
from mvar.run.command import run_training
from mvar.run.launcher import detect
from mvar.run.names import steps_in
from mvar.run.world import World
from mvar.settings import load
from mvar.training.determinism import make_deterministic
from mvar.training.engine import Engine
from mvar.training.job import prepare
from mvar.training.objective import Objective
from mvar.training.suspects import Suspects
from mvar.training.twice import difference

EXIT_DIFFERENT = 1


@dataclass(frozen=True)
class Trial:
    """What is computed twice."""

    run: Path
    checkpoint: Path
    config: TrainConfig
    """The run's, with its micro-batch and no more of the global batch than the ranks here take at once."""
    samples: int
    """Seen by the checkpoint."""
    rounds: int


def ask(run: Path, rounds: int, ranks: int) -> Trial:
    """Raises MvarError."""
    config = load(TrainConfig, run / "config.yaml", [])
    checkpoints = run / "checkpoints"
    found = newest_good(checkpoints, steps_in(checkpoints), lambda folder: problem_of(folder, digests=False))
    if found is None:
        raise CheckpointError(f"{run}: no checkpoint to take the weights of. Train until the first one is saved.")
    record = CheckpointRecord.read(found)
    micro_batch = config.engine.micro_batch or config.global_batch // record.world_size
    engine = config.engine.model_copy(update={"micro_batch": micro_batch})
    tracking = config.tracking.model_copy(update={"sample_every": 0, "evaluate_every": 0})
    changed = {"engine": engine, "tracking": tracking, "global_batch": micro_batch * ranks}
    return Trial(run, found, config.model_copy(update=changed), record.progress.samples, rounds)


def verify_step(asked: Trial, world: World) -> int:
    """All ranks together; returns the exit code."""
    suspects = Suspects(asked.run, world)
    job = world.together(lambda: prepare(asked.config, world.size, world.place.local_size))
    objective = Objective(job.store.quantizer(), world.device, asked.config.optim.label_smoothing)
    engine = Engine(job.config, job.model, job.plan, job.split, objective, world)
    step, micro_batch = engine.restore(asked.checkpoint).step, job.split.micro_batch
    found: list[str | None] = [None] * world.size
    began_s = time.perf_counter()
    for number in range(asked.rounds):
        samples = asked.samples + number * asked.config.global_batch
        start = world.rank * micro_batch
        batch = world.together(lambda: job.stream.batch(samples, start, micro_batch))  # noqa: B023 - called at once
        new = world.gather(difference(engine, step, batch))
        found = [old or text for old, text in zip(found, new, strict=True)]
    seconds = (time.perf_counter() - began_s) / asked.rounds
    for rank, text in enumerate(found):
        if text is not None:
            suspects.strike(rank, "computes differently twice", text, step=step)
    if world.is_main:
        print(f"{asked.checkpoint}: {asked.rounds} x {micro_batch} images a rank, {seconds:.2f} s for each")
        for rank, text in enumerate(found):
            print(f"{'!' if text else ' '} {suspects.describe(rank)}: {text or 'the same bits'}", flush=True)
    return EXIT_DIFFERENT if any(found) else EXIT_FINISHED


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar verify-step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="micro-batches of each rank (3)")
    args = parser.parse_args(argv)

    def prepare_asked() -> Trial:
        if torch.cuda.is_available():
            make_deterministic(os.environ)
        return ask(args.run, max(1, args.rounds), detect(os.environ).size)

    return run_training(
        prepare_asked,
        lambda asked: worlds.start(os.environ, asked.config.engine.threads, asked.config.engine.limits_s()["start"]),
        verify_step,
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
