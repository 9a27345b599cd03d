"""`mvar train`: train the transformer on a code store. The same command in the same folder goes on where it stopped.

    mvar train --config recipes/d16.yaml data.store=codes run=runs/d16              one process
    torchrun --nproc-per-node 8 -m mvar.train --config ...                          one process per GPU of a machine
    srun python -m mvar.train --config ...                                          one task per GPU of a Slurm job

Exit codes: 0 finished, 2 wrong use, 75 stopped on purpose with a checkpoint saved, others are faults.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mvar.checkpoint.choosing import retain
from mvar.checkpoint.saver import Saved, Saver
from mvar.cli import run_command
from mvar.config import TrainConfig
from mvar.data.prefetch import Feed
from mvar.data.stream import Batch, eval_batches
from mvar.errors import ConfigError, MvarError
from mvar.images.arrays import grid, save_png, to_uint8
from mvar.log import log, rank_hint, tell, write_to
from mvar.run import world as worlds
from mvar.run.folder import RunFolder
from mvar.run.history import History
from mvar.run.launcher import detect
from mvar.run.stopping import EXIT_FINISHED, EXIT_STOPPED, StopRequests, Watchdog
from mvar.run.tracking import Stopwatch, Tracker, memory_gib
from mvar.run.world import RemoteError, World, be_patient
from mvar.sampling.sampler import generate
from mvar.settings import describe, load
from mvar.tokenizer.files import load_tokenizer
from mvar.training.chosen import announce, chosen
from mvar.training.engine import Averages, Engine, Launched, StepResult
from mvar.training.job import Job, prepare
from mvar.training.mfu import Utilisation
from mvar.training.objective import Objective
from mvar.training.stability import DivergedError, Stability
from mvar.training.starting import begin, beyond_help, choose_checkpoint, go_back

WORST = 8
"""Samples that a spike's record names."""


def train(config: TrainConfig, world: World, *, from_scratch: bool = False, change_batch: bool = False) -> int:
    """Train until the end, or until asked to stop; returns the exit code. All ranks together."""
    run = RunFolder(config.run)
    with ExitStack() as stack:
        watchdog = stack.enter_context(open_watchdog(run, config, world))
        job = world.together(lambda: prepare(config, world.size, world.place.local_size))
        ours = world.together(lambda: stack.enter_context(claim(run, config, world)))
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
        history = stack.enter_context(History(run.path, writes=world.is_main).recording(world.size))
        job, found = choose_checkpoint(run, job, world, change_batch=change_batch)
        watchdog.feed("start")
        objective = Objective(job.store.quantizer(), world.device, config.optim.label_smoothing)
        engine = Engine(config, job.model, job.plan, job.split, objective, world)
        be_patient(config.engine.limits_s().values())
        watchdog.feed("start")
        done = begin(engine, run, job, world, found)
        watchdog.feed("start")
        announce(world, chosen(job, world))
        history.going_on(done)
        utilisation = Utilisation.start(config.tracking.peak_tflops, job.model, world, config.engine.precision)
        started = Started(engine, run, world, history, stops, watchdog, ours, utilisation)
        for left in range(config.engine.max_rollbacks, -1, -1):
            try:
                with training(started, job, done) as opened:
                    return opened.loop(done)
            except DivergedError as bad:
                world.raise_together(beyond_help(bad, config) if not left and world.is_main else None)
                watchdog.feed("start")
                job, done = go_back(engine, run, job, world, bad)
        raise AssertionError("the last round returns or raises")


@dataclass(frozen=True)
class Started:
    """What lasts from a process's start to its end."""

    engine: Engine
    run: RunFolder
    world: World
    history: History
    stops: StopRequests
    watchdog: Watchdog
    ours: Callable[[], bool]
    """Whether the run folder is still this job's."""
    utilisation: Utilisation | None


@contextmanager
def training(started: Started, job: Job, done: int) -> Iterator[Training]:
    """Open what is needed to train from `done` steps on, and close it again."""
    engine, world, config = started.engine, started.world, job.config
    with ExitStack() as stack:
        tracker = stack.enter_context(open_tracker(started.run, job, world, done))
        shape = {"world": world.size, "zero_stage": engine.stage, "global_batch": config.global_batch}
        tracker.write("resume", done, **shape, last_step=job.plan.last_step)
        stream = job.stream.rank_batches(job.plan.samples(done), world.rank, world.size, job.split.micro_batch)
        feed = Feed(stack.enter_context(closing(stream)), job.split.accumulation, ahead=2)
        world.raise_together(feed.error)
        saver = Saver(started.run.checkpoints, engine.partition, world, job.identity, config.checkpoint, tracker.sync)
        tell([saver.chosen])
        stability = Stability(config.engine.max_bad_steps, config.engine.spike_sigmas)
        yield Training(**vars(started), job=job, tracker=tracker, saver=saver, feed=feed, stability=stability)


@dataclass(frozen=True)
class Underway:
    """A step that was launched and not read yet."""

    done: int
    """Steps done with it."""
    launched: Launched
    watch: Stopwatch


@dataclass(frozen=True)
class Asked:
    """What the ranks' votes ask for."""

    stop: bool = False
    unreadable: bool = False
    """The data of a step to come cannot be read."""

    def __bool__(self) -> bool:
        return self.stop or self.unreadable

    def __or__(self, other: Asked) -> Asked:
        return Asked(self.stop or other.stop, self.unreadable or other.unreadable)


class StopAskedError(Exception):
    """Some rank was asked to stop in the middle of something long. Raised on all ranks together."""


@dataclass(frozen=True)
class Training(Started):
    """What the loop works with. Methods are called by all ranks together."""

    job: Job
    tracker: Tracker
    saver: Saver
    feed: Feed[Batch]
    stability: Stability

    def loop(self, done: int) -> int:
        """From `done` steps to the last one: batch -> step -> track -> maybe save, validate, draw, stop.

        A step's numbers are read while the device works on the step after it, so votes count a step later. Before
        anything else is done, and at the end, the last step is waited for.
        """
        last_step = self.job.plan.last_step
        missed = ({"val"} & self.looks_due(done)) - self.world.share(self.tracker.resumed) if done else set()
        if not self.look(done, missed):  # A kill or a stop came between the save and the validation.
            return self.stop(done, saved=True)
        before: Underway | None = None
        while done < last_step:
            self.watchdog.feed()
            watch = Stopwatch()
            with watch.waiting():
                batches = self.feed.take()
            now = Underway(done + 1, self.engine.launch(done, batches, self.votes()), watch)
            done += 1
            ending, looks = done == last_step, self.looks_due(done)
            saving = ending or due(done, self.job.config.checkpoint.every_steps)
            asked = self.read(before) if before is not None else Asked()
            before = now
            if asked or saving or looks:
                asked, before = asked | self.read(now), None
            else:
                watch.stop()
            if asked or saving:
                self.save(done, last=ending or bool(asked))
            if asked.unreadable and not ending:
                self.world.raise_together(self.feed.error)
            if (asked.stop and not ending) or not self.look(done, looks):
                return self.stop(done, saved=saving or bool(asked))
        if self.world.is_main:
            self.run.finish(last_step, self.job.plan.samples(last_step))
            log.info("finished after %d steps: %s", last_step, self.run.path)
        self.history.end(EXIT_FINISHED, last_step, "finished")
        return EXIT_FINISHED

    def read(self, step: Underway) -> Asked:
        """Wait for a step, record and judge it; gives what was asked for in its votes."""
        result = self.engine.result(step.launched)
        stop, lost, unreadable, written = result.votes
        if lost:
            self.world.raise_together(None if self.ours() else self.run.loss(self.job.config.checkpoint.takeover_s))
        self.track(step.done, result, step.watch)
        self.judge(step.done, result)
        if written == self.world.size:
            self.note(self.saver.settle())
        return Asked(bool(stop), bool(unreadable))

    def looks_due(self, done: int) -> set[str]:
        """Kinds of records that come from looking at the model after `done` steps."""
        tracking, ending = self.job.config.tracking, done == self.job.plan.last_step
        looks = set()
        if len(self.job.store.split("val")) and (ending or due(done, tracking.validate_every)):
            looks.add("val")
        if tracking.sample_every and (ending or due(done, tracking.sample_every)):
            looks.add("sample")
        return looks

    def look(self, done: int, looks: set[str]) -> bool:
        """Validate and draw; False if asked to stop before the end of it."""
        try:
            if "val" in looks:
                self.validate(done)
            if "sample" in looks:
                self.draw(done)
        except StopAskedError:
            return False
        return True

    def require_leisure(self) -> None:
        """Between two parts of something long: there is progress. Raises StopAskedError on all ranks together."""
        self.watchdog.feed("validate")
        if self.world.sum(torch.tensor([float(self.stops.reason is not None)]))[0]:
            raise StopAskedError

    def judge(self, done: int, result: StepResult) -> None:
        """Look at the step that was just done; note spikes. Raises DivergedError on all ranks."""
        try:
            reason = self.stability.judge(done - 1, result)
        except DivergedError:
            self.watchdog.feed("save")
            self.saver.settle()
            raise
        if reason is not None and not result.skipped:
            self.tracker.write("spike", done, reason=reason, worst_samples=self.engine.worst_samples(WORST))

    def votes(self) -> tuple[bool, ...]:
        """What this rank has to tell the others, in the step's one sum."""
        return self.stops.reason is not None, not self.ours(), self.feed.error is not None, self.saver.ended

    def stop(self, done: int, *, saved: bool) -> int:
        if saved:
            self.note(self.saver.settle())
        else:
            self.save(done, last=True)
        reason = self.stops.reason or "another rank was asked to"
        if self.world.is_main:
            log.info("stopped after step %d (%s); run the same command to go on.", done, reason)
            self.run.stop_file.unlink(missing_ok=True)
        self.history.end(EXIT_STOPPED, done, reason)
        return EXIT_STOPPED

    def save(self, done: int, *, last: bool) -> None:
        self.watchdog.feed("save")
        self.note(self.saver.save(self.engine.progress(done), last=last))

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
        if self.world.is_main:
            retain(self.run.checkpoints, last=keep.keep_last, every=keep.keep_every, best=keep.keep_best)

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
            memory_gib=memory_gib(self.world.device),
            **{name: value for name, value in optional.items() if value},
        )

    def validate(self, done: int) -> None:
        """Loss and accuracy on the store's validation split, with no label dropped. Raises StopAskedError."""
        split, job = self.job.store.split("val"), self.job
        limit = job.config.tracking.validate_images
        batches = eval_batches(split, limit, job.split.micro_batch, self.world.rank, self.world.size)
        found = self.engine.evaluate(batches, self.require_leisure)
        self.saver.validated(done, found.loss)  # First: a validation that was recorded is not made again.
        self.tracker.write("val", done, images=found.images, **losses_of(found))
        if job.config.checkpoint.keep_best:
            self.retain()

    def draw(self, done: int) -> None:
        """A grid of pictures, one class a row, always from the same seeds. Every rank draws its part of the codes.

        A failure is told and costs the picture, not the run. Raises StopAskedError.
        """
        name = f"samples/step-{done:09d}.png"
        codes_NL, problem = self.draw_codes()
        if codes_NL is not None:
            try:
                if self.world.is_main:
                    self.decode(codes_NL, name)
                error = None
            except Exception as raised:
                error = raised
            problem = self.first_problem(error)
        if problem is None:
            self.tracker.write("sample", done, file=name)
        elif self.world.is_main:
            log.warning("step %d: no samples were drawn: %s", done, problem)

    def draw_codes(self) -> tuple[torch.Tensor | None, str | None]:
        """Codes of the whole grid, of which each rank drew its part, or what some rank's problem was; all ranks alike.

        Under ZeRO 3 ranks need each other in every layer, so a rank that fails cannot go on to tell the others: what it
        raises ends the run.
        """
        tracking, classes, world = self.job.config.tracking, self.job.model.num_classes, self.world
        assert classes is not None
        rows = np.linspace(0, classes - 1, min(tracking.sample_classes, classes)).round().astype(np.int64)
        labels = rows.repeat(tracking.sample_per_class)
        share = math.ceil(len(labels) / world.size)
        # Equally many for every rank, so that collectives pair up; what is too much is thrown away.
        mine = np.arange(world.rank * share, (world.rank + 1) * share) % len(labels)
        parts: list[torch.Tensor] = []
        error: Exception | None = None
        with self.engine.drawing() as model:
            for chunk in np.array_split(mine, math.ceil(share / self.job.split.micro_batch)):
                self.require_leisure()
                if error is not None:
                    continue
                try:
                    labels_B = torch.from_numpy(labels[chunk])
                    codes_BL = generate(model, self.engine.objective.quantizer, labels_B, seeds=chunk.tolist())
                    parts.append(codes_BL.cpu())
                except Exception as raised:
                    if self.engine.stage == 3:
                        raise
                    error = raised
        problem = self.first_problem(error)
        if problem is not None:
            return None, problem
        return torch.cat(world.gather(torch.cat(parts)))[: len(labels)], None

    def first_problem(self, error: Exception | None) -> str | None:
        """What went wrong on the first rank on which something did, for all ranks."""
        said = self.world.gather(None if error is None else f"{type(error).__name__}: {error}")
        return next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None), None)

    def decode(self, codes_NL: torch.Tensor, name: str) -> None:
        """Write the grid of pictures. On one rank."""
        path, device = self.job.config.data.tokenizer, self.world.device
        assert path is not None
        tokenizer = load_tokenizer(path).eval().to(device)
        with torch.no_grad():
            decoded = [to_uint8(tokenizer.decode(codes.to(device))) for codes in torch.split(codes_NL, 16)]
        columns = self.job.config.tracking.sample_per_class
        save_png(self.run.path / name, grid(np.concatenate(decoded), columns=columns))


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def losses_of(averages: Averages) -> dict[str, object]:
    return {
        "loss": averages.loss,
        "loss_per_scale": averages.loss_per_scale,
        "accuracy": averages.accuracy,
        "accuracy_per_scale": averages.accuracy_per_scale,
    }


def claim(run: RunFolder, config: TrainConfig, world: World) -> AbstractContextManager[Callable[[], bool]]:
    """Rank 0 claims the run folder for all ranks."""
    return run.claimed(config.checkpoint.takeover_s) if world.is_main else nullcontext(lambda: True)


def open_watchdog(run: RunFolder, config: TrainConfig, world: World) -> Watchdog:
    on_gpu = world.device.type == "cuda"
    last_words = (lambda: worlds.write_flight_record(run.logs, world.rank)) if on_gpu else None
    return Watchdog(config.engine.limits_s(), last_words)


def open_tracker(run: RunFolder, job: Job, world: World, done: int) -> Tracker:
    return Tracker(
        run.path,
        job.config.tracking,
        is_main=world.is_main,
        resumed_step=done,
        last_step=job.plan.last_step,
        samples_at=job.plan.samples,
        settings=job.config.model_dump(mode="json"),
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
    main_rank = rank_hint(os.environ) == 0
    try:
        config = load(TrainConfig, args.config, args.overrides + ["checkpoint.trust_sizes=true"] * args.trust_sizes)
        if args.pretend_world is not None and (not args.dry_run or args.pretend_world < 1):
            raise ConfigError("--pretend-world: expected 1 or more ranks, together with --dry-run.")
        if args.dry_run:
            if main_rank:
                from mvar.training.dry_run import dry_run

                ranks = args.pretend_world or detect(os.environ).size
                dry_run(config, ranks, args.pretend_rank, pretended=args.pretend_world is not None)
            return EXIT_FINISHED
    except MvarError:
        if main_rank:
            raise
        return 2  # The same on every rank; one message is enough.
    world = worlds.start(os.environ, config.engine.threads, config.engine.limits_s()["start"])
    try:
        code = train(config, world, from_scratch=args.from_scratch, change_batch=args.change_batch)
    except RemoteError as error:
        log.warning("%s", error)
        code = 2 if error.expected else 1
    except MvarError:
        worlds.finish()
        raise
    except Exception:
        # At once and without goodbyes: the other ranks learn of it when this one is gone.
        log.critical("this rank fails", exc_info=True)
        os._exit(1)
    worlds.finish()
    return code


if __name__ == "__main__":
    raise SystemExit(run_command(main))
