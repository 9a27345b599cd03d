"""`mvar train`: train the transformer on a code store. The same command in the same folder goes on where it stopped.

    mvar train --config recipes/d16.yaml data.store=codes run=runs/d16              one process
    torchrun --nproc-per-node 8 -m mvar.train --config ...                          one process per GPU of a machine
    srun python -m mvar.train --config ...                                          one task per GPU of a Slurm job

Exit codes: 0 finished, 2 wrong use, 75 stopped on purpose with a checkpoint saved, others are faults.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mvar.checkpoint.choosing import retain
from mvar.checkpoint.record import Progress
from mvar.checkpoint.saver import Saved, Saver
from mvar.cli import run_command
from mvar.config import TrainConfig
from mvar.data.prefetch import Feed
from mvar.data.stream import Batch, eval_batches
from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, ConfigError
from mvar.log import log, rank_hint, tell, write_to
from mvar.run import world as worlds
from mvar.run.command import run_training
from mvar.run.film import FILM, write_film
from mvar.run.folder import RunFolder
from mvar.run.heartbeat import Heartbeat
from mvar.run.history import History
from mvar.run.launcher import detect
from mvar.run.loop import Session, TrainingLoop, claim, due
from mvar.run.startup import Startup
from mvar.run.stopping import StopRequests, Watchdog
from mvar.run.tracking import Stopwatch, Tracker, memory_gib
from mvar.run.world import World, be_patient
from mvar.settings import describe, load
from mvar.training.announcement import announce, chosen
from mvar.training.console import TransformerLines
from mvar.training.determinism import make_deterministic
from mvar.training.drawing import SampleGrid
from mvar.training.engine import Averages, Engine, LaunchedStep, StepResult
from mvar.training.evaluating import SampleFigures
from mvar.training.job import TrainingJob, hold_codes, prepare
from mvar.training.mfu import Utilisation
from mvar.training.objective import Objective
from mvar.training.stability import DivergedError, Stability
from mvar.training.starting import begin, beyond_help, choose_checkpoint, go_back, known_steps
from mvar.training.suspects import Suspects
from mvar.training.trust import Trust, require_sound_machines
from mvar.training.twice import require_repeatable

WORST = 8
"""Samples that a spike's record names."""


def train(config: TrainConfig, world: World, *, from_scratch: bool = False, change_batch: bool = False) -> int:
    """Train until the end, or until asked to stop; returns the exit code. All ranks together."""
    run = RunFolder(config.run)
    with ExitStack() as stack:
        watchdog = stack.enter_context(open_watchdog(run, config, world))
        heartbeat = stack.enter_context(Heartbeat(watchdog, world))
        startup = Startup(watchdog)
        world.together(lambda: require_repeatable(config, world.device))
        job = world.together(lambda: prepare(config, world.size, world.place.local_size))
        takeover_s = config.checkpoint.takeover_s
        ours = world.together(lambda: stack.enter_context(claim(run, takeover_s, world)))
        if from_scratch:
            world.together(lambda: run.set_aside() if world.is_main else None)
        write_to(run.logs)
        log.info(f"{world.size} ranks; rank {world.rank} on {world.device}, process {os.getpid()}")
        finished = world.share(world.together(lambda: run.finished_at() if world.is_main else (-1, -1)))
        if job.plan.is_over(*finished):
            if world.is_main:
                log.info("%s: finished; nothing is left to do (raise epochs or max_steps to go on).", run.path)
            return EXIT_FINISHED
        margin_s = config.checkpoint.stop_before_end_s
        stops = stack.enter_context(StopRequests(run.stop_file, margin_s, looks=world.is_main))
        session = Session(run, world, watchdog, stops, ours, takeover_s)
        history = stack.enter_context(History(run.path, writes=world.is_main).recording(world.size))
        hold_codes(job, world)
        suspects = Suspects(run.path, world)
        require_sound_machines(config, world, suspects)
        startup.passed("store, run folder and machine")
        job, found = choose_checkpoint(run, job, world, change_batch=change_batch)
        startup.passed("checkpoint")
        objective = Objective(job.store.quantizer(), world.device, config.optim.label_smoothing)
        engine = Engine(config, job.model, job.plan, job.split, objective, world)
        be_patient([0])  # Groups of DeepSpeed's own; the heartbeat's end sets their limits.
        startup.passed("model and engine")
        begun = begin(engine, run, job, world, found)
        startup.passed("weights")
        heartbeat.end()
        announce(world, [*engine.chosen, *chosen(job, world)])
        history.runs_on(world.devices)
        history.going_on(begun.step)
        utilisation = Utilisation.start(config.tracking.peak_tflops, job.model, world, config.engine.precision)
        means = Means(session, startup, engine, history, Trust(engine, suspects), utilisation)
        for left in range(config.engine.max_rollbacks, -1, -1):
            try:
                with training(means, job, begun) as opened:
                    return opened.loop(begun.step)
            except DivergedError as bad:
                world.raise_together(beyond_help(bad, config) if not left and world.is_main else None)
                watchdog.feed("start")
                left_out = job.plan.samples(bad.done)
                with Heartbeat(watchdog, world):
                    job, begun = go_back(engine, run, job, world, bad)
                history.went_back(bad.first, bad.done - 1, begun.step, left_out - begun.samples)
        raise AssertionError("the last round returns or raises")


@dataclass(frozen=True)
class Means:
    """What a start of a training works with, through all its rollbacks."""

    session: Session
    startup: Startup
    engine: Engine
    history: History
    trust: Trust
    utilisation: Utilisation | None


@contextmanager
def training(means: Means, job: TrainingJob, begun: Progress) -> Iterator[TransformerTraining]:
    """Open what is needed to train from `begun` on, and close it again."""
    run, world, engine = means.session.run, means.session.world, means.engine
    config, done = job.config, begun.step
    with ExitStack() as stack:
        tracker = stack.enter_context(open_tracker(run, job, world, done))
        shape = {"world": world.size, "zero_stage": engine.stage, "global_batch": config.global_batch}
        tracker.write("resume", done, **shape, last_step=job.plan.last_step)
        stream = job.stream.rank_batches(job.plan.samples(done), world.rank, world.size, job.split.micro_batch)
        feed = Feed(stack.enter_context(closing(stream)), job.split.accumulation, ahead=2)
        world.raise_together(feed.error)
        saver = Saver(run.checkpoints, engine.partition, world, job.identity, config.checkpoint, tracker.sync)
        tell([saver.chosen])
        judging = Stability(config.engine.max_bad_steps, config.engine.spike_sigmas, known_steps(begun, config))
        yield TransformerTraining(means, job, feed, tracker, saver, judging)


class TransformerTraining(TrainingLoop[Batch, LaunchedStep, StepResult]):
    """What the loop does in a training of the transformer."""

    reads_late = True

    def __init__(
        self, means: Means, job: TrainingJob, feed: Feed[Batch], tracker: Tracker, saver: Saver, stability: Stability
    ) -> None:
        super().__init__(means.session, feed, tracker, job.plan.last_step, job.config.checkpoint.every_steps)
        self.startup, self.engine, self.history = means.startup, means.engine, means.history
        self.trust, self.utilisation = means.trust, means.utilisation
        self.job, self.saver, self.stability = job, saver, stability
        self._batch: Batch | None = None
        """The first that the last step learned from."""
        self.grid = SampleGrid(job, self.engine, self.session.world, self.require_leisure)
        self.figures: SampleFigures | None = None
        if job.config.tracking.evaluate_every:
            self.figures = SampleFigures(job, self.engine, self.session.world, self.require_leisure)

    def launch(self, done: int, batches: Sequence[Batch]) -> LaunchedStep:
        self._batch = batches[0]
        return self.engine.launch(done, batches, self.session.votes(self.feed, written=self.saver.ended))

    def result(self, launched: LaunchedStep) -> StepResult:
        return self.engine.result(launched)

    def record(self, done: int, result: StepResult, watch: Stopwatch) -> None:
        """Raises DivergedError on all ranks."""
        if self.startup.stepped(watch):
            self.history.first_step(done, self.startup.parts_s)
        self.track(done, result, watch)
        self.judge(done, result)
        if result.votes.written == self.session.world.size:
            self.note(self.saver.settle())

    def looks_due(self, done: int) -> set[str]:
        tracking, ending = self.job.config.tracking, done == self.last_step
        looks = set()
        if len(self.job.store.split("val")) and (ending or due(done, tracking.validate_every)):
            looks.add("val")
        if tracking.sample_every and (ending or due(done, tracking.sample_every)):
            looks.add("sample")
        if tracking.evaluate_every and (ending or due(done, tracking.evaluate_every)):
            looks.add("evaluation")
        if due(done, self.job.config.trust.verify_every):
            looks.add("verify")
        return looks

    def look(self, done: int, looks: set[str]) -> None:
        if "val" in looks:
            self.validate(done)
        if "sample" in looks:
            self.draw(done)
        if "evaluation" in looks:
            self.evaluate(done)
        if "verify" in looks and self._batch is not None:
            self.require_leisure()
            self.trust.compute_twice(done, self._batch, self.tracker)

    def save(self, done: int, *, last: bool) -> None:
        self.trust.require_agreement(done, self.settle)
        progress = replace(self.engine.progress(done), known_steps=self.stability.known())
        self.note(self.saver.save(progress, last=last))

    def settle(self) -> None:
        self.note(self.saver.settle())

    def finish(self, done: int) -> None:
        run, world = self.session.run, self.session.world
        if world.is_main and self.job.config.tracking.sample_every:
            self.film()
        world.together(lambda: run.finish(done, self.job.plan.samples(done)) if world.is_main else None)
        if world.is_main:
            log.info("finished after %d steps: %s", done, run.path)
        self.history.end(EXIT_FINISHED, done, "finished")

    def stopped(self, done: int, reason: str) -> None:
        self.history.end(EXIT_STOPPED, done, reason)

    def judge(self, done: int, result: StepResult) -> None:
        """Look at the step that was just done; note spikes. Raises DivergedError on all ranks.

        What a rollback or a restart cuts from metrics.jsonl stays in history.jsonl.
        """
        diverged = None
        try:
            reason = self.stability.judge(done - 1, result)
        except DivergedError as error:
            reason, diverged = error.reason, error
        if reason is not None and result.skipped:
            self.history.skipped(done, reason, result.bad_samples)
        elif reason is not None:
            worst = self.engine.worst_samples(WORST)
            self.tracker.write("spike", done, reason=reason, worst_samples=worst)
            self.history.spike(done, reason, worst)
        if diverged is not None:
            self.session.watchdog.feed("save")
            self.saver.settle()
            raise diverged

    def note(self, attempts: list[Saved]) -> None:
        """Record checkpoints that came to their end, and remove those that are not to be kept."""
        for saved in attempts:
            if saved.error is not None:
                self.tracker.write("not_saved", saved.step, error=saved.error)
                continue
            self.retain()
            self.tracker.write("checkpoint", saved.step, seconds=saved.seconds, stall_s=saved.stall_s)

    def retain(self) -> None:
        keep = self.job.config.checkpoint
        if self.session.world.is_main:
            retain(self.session.run.checkpoints, last=keep.keep_last, every=keep.keep_every, best=keep.keep_best)

    def track(self, done: int, result: StepResult, watch: Stopwatch) -> None:
        step_s, averages = watch.seconds(), result.averages
        imgs_per_s = averages.images / step_s
        optional: dict[str, object] = {"bad_samples": result.bad_samples[:64], "loss_scale": result.loss_scale}
        if self.utilisation is not None:
            optional["mfu"] = self.utilisation.of(imgs_per_s)
        self.tracker.write(
            "train",
            done,
            **losses_of(averages),
            grad_norm=result.grad_norm,
            lr=result.lr,
            weight_decay=result.weight_decay,
            skipped=result.skipped,
            imgs_per_s=imgs_per_s,
            step_s=step_s,
            wait_s=watch.waited_s,
            memory_gib=memory_gib(self.session.world.device),
            **self.trust.keep_pace(done, result),
            **{name: value for name, value in optional.items() if value},
        )

    def validate(self, done: int) -> None:
        """Loss and accuracy on the store's validation split, with no label dropped. Raises StopAskedError."""
        split, job = self.job.store.split("val"), self.job
        limit = job.config.tracking.validate_images
        batches = eval_batches(split, limit, job.split.micro_batch, self.session.world.rank, self.session.world.size)
        found = self.engine.evaluate(batches, self.require_leisure)
        self.saver.validated(done, found.loss)  # First: a validation that was recorded is not made again.
        self.tracker.write("val", done, images=found.images, **losses_of(found))
        if job.config.checkpoint.keep_best:
            self.retain()

    def draw(self, done: int) -> None:
        """A grid of pictures. A failure is told and costs the picture, not the run. Raises StopAskedError."""
        name = f"samples/step-{done:09d}.png"
        problem = self.grid.draw(self.session.run.path / name)
        if problem is None:
            self.tracker.write("sample", done, file=name)
        elif self.session.world.is_main:
            log.warning("step %d: no samples were drawn: %s", done, problem)

    def film(self) -> None:
        """The grids as one film, on rank 0. A failure is told and costs the film, not the run."""
        run = self.session.run
        try:
            write_film(run, run.samples / FILM)
        except Exception as error:
            log.warning("%s: no film was made of it: %s", run.samples, error)

    def evaluate(self, done: int) -> None:
        """Figures of drawn pictures. A failure is told and costs the figures, not the run. Raises StopAskedError."""
        assert self.figures is not None
        watch = Stopwatch()
        figures, problem = self.figures.measure(done)
        if problem is None:
            images = self.job.config.tracking.evaluate_images
            self.tracker.write("evaluation", done, images=images, **figures, seconds=watch.seconds())
        elif self.session.world.is_main:
            log.warning("step %d: samples were not evaluated: %s", done, problem)


def losses_of(averages: Averages) -> dict[str, object]:
    return {
        "loss": averages.loss,
        "loss_per_scale": averages.loss_per_scale,
        "accuracy": averages.accuracy,
        "accuracy_per_scale": averages.accuracy_per_scale,
    }


def open_watchdog(run: RunFolder, config: TrainConfig, world: World) -> Watchdog:
    on_gpu = world.device.type == "cuda"
    last_words = (lambda: worlds.write_flight_record(run.logs, world.rank)) if on_gpu else None
    return Watchdog(config.engine.limits_s(), last_words)


def open_tracker(run: RunFolder, job: TrainingJob, world: World, done: int) -> Tracker:
    return Tracker(
        run.path,
        job.config.tracking,
        is_main=world.is_main,
        resumed_step=done,
        samples_at=job.plan.samples,
        settings=job.config.model_dump(mode="json"),
        lines=TransformerLines(job.config.tracking.log_every, job.plan.last_step),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mvar train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of the configuration:\n" + describe(TrainConfig),
    )
    parser.add_argument("--config", type=Path, help="YAML file, such as recipes/d16.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the configuration")
    parser.add_argument("--from-scratch", action="store_true", help="move what is in the run folder aside and begin")
    parser.add_argument(
        "--trust-sizes", action="store_true", help="resume without reading digests (checkpoint.trust_sizes=true)"
    )
    parser.add_argument("--change-batch", action="store_true", help="go on with another global_batch than before")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print sizes and steps, and end")
    parser.add_argument("--pretend-world", type=int, metavar="N", help="with --dry-run: as if N ranks were started")
    parser.add_argument("--pretend-rank", type=int, default=0, metavar="R", help="with --dry-run: as rank R of them")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # From the deepspeed launcher.
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    def prepare_or_rehearse() -> TrainConfig | None:
        overrides = [*args.overrides, "checkpoint.trust_sizes=true"] if args.trust_sizes else args.overrides
        config = load(TrainConfig, args.config, overrides)
        if config.engine.deterministic:
            make_deterministic(os.environ)
        if args.pretend_world is not None and (not args.dry_run or args.pretend_world < 1):
            raise ConfigError("--pretend-world: expected 1 or more ranks, together with --dry-run.")
        if not args.dry_run:
            return config
        if rank_hint(os.environ) == 0:
            from mvar.training.dry_run import dry_run

            ranks = args.pretend_world or detect(os.environ).size
            dry_run(config, ranks, args.pretend_rank, pretended=args.pretend_world is not None)
        return None

    return run_training(
        prepare_or_rehearse,
        lambda config: worlds.start(os.environ, config.engine.threads, config.engine.limits_s()["start"]),
        lambda config, world: train(config, world, from_scratch=args.from_scratch, change_batch=args.change_batch),
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
