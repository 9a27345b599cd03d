"""How a training begins: from a checkpoint, from weights, from nothing, or from before it diverged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mvar.checkpoint.choosing import choose, set_aside_after
from mvar.checkpoint.record import KnownSteps, Progress, require_same
from mvar.checkpoint.weights import initial_values
from mvar.config import TrainConfig
from mvar.errors import TrainingError
from mvar.files.disk import write_text
from mvar.log import log
from mvar.run.folder import RunFolder
from mvar.run.world import World
from mvar.schedule import BatchPhase, Plan
from mvar.settings import dump
from mvar.training.engine import Engine
from mvar.training.job import TrainingJob, going_on, summary
from mvar.training.stability import DivergedError


def choose_checkpoint(
    run: RunFolder, job: TrainingJob, world: World, *, change_batch: bool = False
) -> tuple[TrainingJob, Path | None]:
    """The newest good checkpoint, if it is of this very run, and the job as it goes on from there; None where a run may
    begin. Raises CheckpointError."""
    found = choose(run.checkpoints, world, trust_sizes=job.config.checkpoint.trust_sizes)
    if found is None:
        world.together(lambda: run.require_no_history() if world.is_main else None)
        return job, None
    record = world.together(lambda: require_same(found, job.identity, change_batch=change_batch))
    return world.together(lambda: going_on(job, record.progress)), found


def begin(engine: Engine, run: RunFolder, job: TrainingJob, world: World, found: Path | None) -> Progress:
    """Take up a checkpoint, or begin; tells where that is. Writes the run's config.yaml."""
    if found is not None:
        begun, where = engine.restore(found), f"going on from {found.name}"
    else:
        source = job.config.init_from
        if source is None:
            engine.initialise()
        else:
            engine.initialise(world.together(lambda: initial_values(source, job.model, digests=world.is_main)))
        begun, where = Progress(), f"beginning with the weights of {source}" if source else "beginning"
    world.together(lambda: write_text(run.config, dump(job.config)) if world.is_main else None)
    if world.is_main:
        run.finished.unlink(missing_ok=True)
        log.info("%s: %s", where, summary(job, engine.parameters, engine.stage))
        if len(job.plan.phases) > 1:
            by_step = [(phase.step, phase.global_batch) for phase in job.plan.phases]
            log.info("global batch by first step: %s", by_step)
    return begun


def known_steps(begun: Progress, config: TrainConfig) -> KnownSteps | None:
    """What the checkpoint that was taken up knew of its steps, where that still holds: another global batch has other
    gradients."""
    same = bool(begun.stretches) and begun.stretches[-1].global_batch == config.global_batch
    return begun.known_steps if same else None


def beyond_help(bad: DivergedError, config: TrainConfig) -> TrainingError:
    return TrainingError(
        f"{bad}, {bad.done - bad.first} steps in a row (engine.max_bad_steps), after going back"
        f" {config.engine.max_rollbacks} times (engine.max_rollbacks). The newest good checkpoint is untouched."
        " history.jsonl names the samples (bad_samples, worst_samples), and mvar status shows them. Lower"
        " optim.base_lr or use a wider engine.precision, and run again."
    )


def go_back(
    engine: Engine, run: RunFolder, job: TrainingJob, world: World, bad: DivergedError
) -> tuple[TrainingJob, Progress]:
    """Take up the last checkpoint from before the bad steps, and skip the data up to their end. Raises MvarError."""
    world.together(lambda: set_aside_after(run.checkpoints, bad.first) if world.is_main else None)
    found = choose(run.checkpoints, world, trust_sizes=job.config.checkpoint.trust_sizes)
    if found is None:
        none = TrainingError(f"{bad}; there is no checkpoint to go back to. Lower optim.base_lr, and run again.")
        world.raise_together(none if world.is_main else None)
    assert found is not None
    begun = engine.restore(found)
    done = begun.step
    begin, end = job.plan.samples(done), job.plan.samples(bad.done)
    kept = tuple(phase for phase in job.plan.phases if phase.step <= done)
    phases = (*kept, BatchPhase(done, end, job.config.global_batch))
    job = replace(job, plan=Plan.of(job.config, len(job.store.split("train")), phases))
    engine.plan = job.plan
    if world.is_main:
        log.warning("%s. Went back to %s; the %s images after it are skipped.", bad, found.name, f"{end - begin:,}")
    return job, begun
