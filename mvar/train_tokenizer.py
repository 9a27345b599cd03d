"""`mvar train-tokenizer`: train a multi-scale VQ-VAE on images. The same command in the same folder goes on.

    mvar train-tokenizer --config recipes/tokenizer_64.yaml images=FOLDER out=FOLDER    one process
    torchrun --nproc-per-node 8 -m mvar.train_tokenizer --config ...                    one process per GPU of a machine
    srun python -m mvar.train_tokenizer --config ...                                    one task per GPU of a Slurm job

In the `out` folder: tokenizer.safetensors (when finished), state.safetensors (to resume from) and the one before it,
metrics.jsonl, config.yaml, samples/ and reconstructions.png (held-out originals above what the tokenizer makes of
them); left-out.json, if pictures are damaged and skip_bad allows for them.
Exit codes: 0 finished, 2 wrong use, 75 stopped on purpose with the state saved, others are faults.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvar.cli import run_command
from mvar.config import TrackingConfig
from mvar.data.prefetch import Feed
from mvar.errors import CheckpointError, ImageError, MvarError
from mvar.images.arrays import enlarge, grid, save_png, to_uint8
from mvar.images.layouts import open_images
from mvar.images.sources import Source, say_notes
from mvar.run import world as worlds
from mvar.run.folder import RunFolder
from mvar.run.launcher import rank_hint
from mvar.run.stopping import EXIT_FINISHED, EXIT_STOPPED, StopRequests, Watchdog
from mvar.run.tracking import Stopwatch, Tracker
from mvar.run.world import RemoteError, World, cores
from mvar.settings import describe, dump, load
from mvar.tokenizer.files import save_tokenizer, sha256_of, write_atomically
from mvar.tokenizer.training.config import LossConfig, TokenizerTrainConfig
from mvar.tokenizer.training.console import Console
from mvar.tokenizer.training.left_out import LeftOut, read_left_out, write_left_out
from mvar.tokenizer.training.losses import LossTerm, absolute_error, codebook_error, commitment_error, squared_error
from mvar.tokenizer.training.parallel import hand_round, part_of, require_equal, require_work_for_all
from mvar.tokenizer.training.perceptual import Perceptual
from mvar.tokenizer.training.pictures import Pictures, Pixels, centre_views
from mvar.tokenizer.training.state import IMAGES, State, StateFile
from mvar.tokenizer.training.trainer import Trainer

GRID_COLUMNS = 8
LEFT_OUT = "left-out.json"
"""Damaged pictures of a training by path, with the reasons."""


def loss_terms(config: LossConfig, device: torch.device | str = "cpu") -> list[LossTerm]:
    """The terms of the loss but the adversarial one, in the order they are reported. Raises TokenizerError."""
    terms = [
        LossTerm("l1", config.l1, absolute_error),
        LossTerm("l2", config.l2, squared_error),
        LossTerm("codebook", config.codebook, codebook_error, of_latents=True),
        LossTerm("commitment", config.commitment, commitment_error, of_latents=True),
    ]
    if config.perceptual:
        assert config.perceptual_backbone is not None  # LossConfig has seen to it.
        seen = Perceptual(config.perceptual_backbone, config.perceptual_heads).to(device)
        terms.append(LossTerm("perceptual", config.perceptual, seen))
    return [term for term in terms if term.weight]


def identity_of(config: TokenizerTrainConfig, source: Source) -> dict[str, Any]:
    """What may not change when a training is resumed: settings, images, networks of the loss. Raises TokenizerError."""
    loss = config.loss
    files = {"loss.perceptual_backbone": loss.perceptual_backbone, "loss.perceptual_heads": loss.perceptual_heads}
    digests = {key: sha256_of(path) for key, path in files.items() if path is not None and loss.perceptual}
    return config.identity() | {IMAGES: source.fingerprint.sha256} | digests


def train(config: TokenizerTrainConfig, world: World) -> int:
    """Train, or go on with a training, until the end or until asked to stop; returns the exit code. All ranks together.

    Raises MvarError; RemoteError on the ranks whose fault it is not.
    """
    run = RunFolder(config.out)
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.watchdog_s))
        world.together(lambda: require_work_for_all(config.batch, world))
        terms = world.together(lambda: loss_terms(config.loss, world.device))
        # One listing for all: a folder that changes in between would be two data sets.
        source = world.share(world.together(lambda: _open(config) if world.is_main else None))
        assert source is not None
        identity = world.share(world.together(lambda: identity_of(config, source) if world.is_main else None))
        assert identity is not None
        claim = run.claimed(config.takeover_s) if world.is_main else nullcontext(lambda: True)
        ours = world.together(lambda: stack.enter_context(claim))
        states = StateFile(config.out)
        found = world.together(lambda: _saved(states, config, identity) if world.is_main else None)
        done = world.share(found.step if found is not None else 0)
        result = config.out / "tokenizer.safetensors"
        if done == config.steps and world.share(result.exists()):
            if world.is_main:
                print(f"already finished: {result}")
            return EXIT_FINISHED
        stops = stack.enter_context(StopRequests(run.stop_file, config.stop_before_end_s))
        threads = config.threads or max(1, cores() // world.place.local_size)
        if world.device.type == "cpu":
            torch.set_num_threads(1)  # The trainer splits batches over threads of its own.
        known = world.share(world.together(lambda: _known_damage(config, source) if world.is_main else None))
        left_out = LeftOut(config.skip_bad, known)
        held_out = world.together(lambda: HeldOut.of(config, source, world, threads, left_out))
        watchdog.feed()
        trainer = Trainer(config, terms, world, threads)
        if done:
            trainer.restore(hand_round(world, None if found is None else found.tensors), done)
        del found
        size, part = config.geometry.image_size, part_of(config.batch, world)
        more: dict[str, Any] = {"part": part, "ram_gib": config.ram_gib, "workers": threads, "left_out": left_out}
        pictures = Pictures(source, size, config.resize, config.batch, config.seed, **more)
        if world.is_main:
            write_atomically(run.config, dump(config).encode())
            print(f"resuming after step {done}" if done else "beginning", flush=True)
            _announce(config, source, held_out, trainer, pictures.steps_per_epoch)
        tracker = stack.enter_context(_tracker(config, world, done))
        feed = Feed(stack.enter_context(closing(pictures.batches(done, config.steps))), 1)
        lasting = (config, world, run, states, identity, trainer, held_out, left_out)
        return Training(*lasting, tracker, feed, stops, watchdog, ours).loop()


@dataclass(frozen=True)
class HeldOut:
    """Held-out pictures, uint8 (N, H, W, 3)."""

    own: Pixels
    """This rank's part."""
    drawn: Pixels
    """Those of the grid; on rank 0."""
    total: int
    """Pictures of all ranks together."""
    learned_from: bool
    """The source holds nothing out, so these are training pictures."""

    @staticmethod
    def of(config: TokenizerTrainConfig, source: Source, world: World, workers: int, left_out: LeftOut) -> HeldOut:
        """Read them. Raises ImageError."""
        items = source.splits["val"] or source.splits["train"]
        chosen = _spread(len(items), config.validate_images)
        drawn = chosen[_spread(len(chosen), config.grid_images)]
        drawn = drawn[: max(1, len(drawn) // GRID_COLUMNS) * GRID_COLUMNS]
        mine = part_of(len(chosen), world)

        def read(indices: Any) -> Pixels:
            size = config.geometry.image_size
            if not len(indices):
                return np.zeros((0, size, size, 3), np.uint8)
            return centre_views(source, items, indices, size, config.resize, left_out, workers)

        pictures = read(drawn if world.is_main else [])
        return HeldOut(read(chosen[mine.start : mine.stop]), pictures, len(chosen), not source.splits["val"])


@dataclass(frozen=True)
class Training:
    """What the loop works with. Methods are called by all ranks together."""

    config: TokenizerTrainConfig
    world: World
    run: RunFolder
    states: StateFile
    identity: dict[str, Any]
    trainer: Trainer
    held_out: HeldOut
    left_out: LeftOut
    tracker: Tracker
    feed: Feed[Pixels]
    stops: StopRequests
    watchdog: Watchdog
    ours: Callable[[], bool]
    """Whether the folder is still this job's."""

    def loop(self) -> int:
        """From the steps that are done to the last one: batch -> step -> track -> maybe judge, save, stop."""
        config, trainer = self.config, self.trainer
        while trainer.step_number < config.steps:
            self.watchdog.feed()
            watch = Stopwatch()
            with watch.waiting():
                (pixels,) = self.feed.take()
            measured = trainer.step(pixels)
            step = trainer.step_number
            ending = step == config.steps
            if due(step, config.log_every) or ending:
                self.tracker.write("train", step, **measured, **self.speed(watch))
            stop, lost, unreadable, damaged = self.voted()
            if lost:
                self.world.raise_together(None if self.ours() else self.run.loss(self.config.takeover_s))
            excess = self.note_damaged() if damaged else None
            unreadable = unreadable or excess is not None
            if due(step, config.validate_every) or ending:
                self.judge(step)
            if due(step, config.save_every) or ending or stop or (unreadable and not ending):
                self.save()
            if unreadable and not ending:
                self.world.raise_together(self.feed.error or (excess if self.world.is_main else None))
            if stop and not ending:
                return self.stop()
        self.world.together(lambda: self.finish() if self.world.is_main else None)
        return EXIT_FINISHED

    def speed(self, watch: Stopwatch) -> dict[str, float]:
        seconds = watch.seconds()
        return {"imgs_per_s": self.config.batch / seconds, "wait_share": watch.waited_s / seconds}

    def voted(self) -> list[int]:
        """How many ranks were asked to stop, lost the folder, cannot read the next step's pictures; and how many
        damaged pictures they left out that others do not know of."""
        own = [self.stops.reason is not None, not self.ours(), self.feed.error is not None, self.left_out.unshared]
        return [int(votes) for votes in self.world.sum(torch.tensor(own, dtype=torch.float64))]

    def note_damaged(self) -> ImageError | None:
        """Tell all ranks, and the user, of the damaged pictures that were met; the error if they are too many."""
        new = self.left_out.agree(self.world)
        excess = self.left_out.excess()
        if excess is None:
            self.world.together(lambda: self.list_damaged(new) if self.world.is_main else None)
        return excess

    def list_damaged(self, new: dict[str, str]) -> None:
        for path, reason in new.items():
            print(f"left out {path}: {reason}", flush=True)
        try:
            write_left_out(self.run.path / LEFT_OUT, self.left_out.reasons)
        except OSError as error:
            raise CheckpointError(
                f"{self.run.path / LEFT_OUT}: cannot be written ({error.strerror}). Free some space; the same command "
                "goes on from the last state."
            ) from None

    def judge(self, step: int) -> None:
        """Quality on held-out pictures, and some of them to look at."""
        self.watchdog.feed()
        self.tracker.write("val", step, **asdict(self.trainer.quality(self.held_out.own)))
        name = f"{self.run.samples.name}/step-{step:09d}.png"
        self.world.together(lambda: self.draw(self.run.path / name) if self.world.is_main else None)
        self.tracker.write("sample", step, file=name)
        self.watchdog.feed()

    def draw(self, path: Path) -> None:
        """A PNG with rows of originals, each above the row of what the tokenizer makes of them."""
        save_png(path, reconstructions(self.held_out.drawn, to_uint8(self.trainer.rebuild(self.held_out.drawn)[0])))

    def save(self) -> None:
        """Write the state. Raises CheckpointError, TrainingError (RemoteError on other ranks)."""
        self.watchdog.feed()
        weights = [*self.trainer.parameters.values(), *self.trainer.vqvae.buffers()]
        require_equal(self.world, weights, f"tokenizer training, step {self.trainer.step_number}")
        self.world.together(lambda: self.write() if self.world.is_main else None)
        self.watchdog.feed()

    def write(self) -> None:
        try:
            self.tracker.sync()  # A state must not be newer than its records.
        except OSError as error:
            raise CheckpointError(
                f"{self.run.metrics}: cannot be written ({error.strerror}). Free some space; the state saved before is"
                " whole, and the same command goes on from it."
            ) from None
        self.states.write(State(self.trainer.step_number, self.trainer.tensors(), self.identity))

    def stop(self) -> int:
        reason = self.stops.reason or "another rank was asked to"
        if self.world.is_main:
            print(
                f"stopped after step {self.trainer.step_number} ({reason}); run the same command to go on.", flush=True
            )
            self.run.stop_file.unlink(missing_ok=True)
        return EXIT_STOPPED

    def finish(self) -> None:
        """Write what users want."""
        self.draw(self.run.path / "reconstructions.png")
        result = self.run.path / "tokenizer.safetensors"
        save_tokenizer(result, self.trainer.result)
        print(f"wrote {result}", flush=True)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def reconstructions(originals_NHWC: Pixels, rebuilt_NHWC: Pixels) -> Pixels:
    """One picture with rows of originals, each above the row of the rebuilt ones."""
    columns = min(GRID_COLUMNS, len(originals_NHWC))
    rows = [
        picture
        for start in range(0, len(originals_NHWC), columns)
        for pictures in (originals_NHWC, rebuilt_NHWC)
        for picture in pictures[start : start + columns]
    ]
    sheet = grid(rows, columns)
    return enlarge(sheet, 2) if originals_NHWC.shape[1] <= 64 else sheet


def _open(config: TokenizerTrainConfig) -> Source:
    source = open_images(config.images, val_fraction=config.val_fraction, rules=config.rules, cache=config.images_cache)
    say_notes(source)
    return source


def _known_damage(config: TokenizerTrainConfig, source: Source) -> dict[str, str]:
    known = read_left_out(config.out / LEFT_OUT, source)
    if excess := LeftOut(config.skip_bad, known).excess():
        raise excess
    return known


def _saved(states: StateFile, config: TokenizerTrainConfig, identity: dict[str, Any]) -> State | None:
    """The state to go on from, None where a training may begin. Raises CheckpointError."""
    states.remove_leftovers()
    if states.exists():
        state = states.read()
        state.require_same(states.path, identity, free=(IMAGES,) if config.other_images else ())
        return state
    result = config.out / "tokenizer.safetensors"
    if result.exists():
        raise CheckpointError(
            f"{result} exists, but not the state of its training. Give another out=... folder, or remove the file."
        )
    return None


def _tracker(config: TokenizerTrainConfig, world: World, done: int) -> Tracker:
    return Tracker(
        config.out,
        TrackingConfig(
            log_every=config.log_every,
            wandb=config.wandb,
            wandb_project=config.wandb_project,
            tensorboard=config.tensorboard,
        ),
        is_main=world.is_main,
        resumed_step=done,
        last_step=config.steps,
        samples_at=lambda step: step * config.batch,
        settings=config.model_dump(mode="json"),
        console=Console(done, config.steps),
    )


def _announce(
    config: TokenizerTrainConfig, source: Source, held_out: HeldOut, trainer: Trainer, steps_per_epoch: float
) -> None:
    where = "of them measured (none are held out)" if held_out.learned_from else "held out"
    tokens, words = trainer.vqvae.quantizer.pyramid.total, config.geometry.vocab_size
    parameters_millions = sum(parameter.numel() for parameter in trainer.parameters.values()) / 1e6
    print(
        f"{len(source.splits['train'])} images of {len(source.classes)} classes, {held_out.total} {where}; "
        f"{config.geometry.image_size} px -> {tokens} tokens of {words} words; {parameters_millions:.2f}M parameters; "
        f"{config.steps} steps of {config.batch} ({config.steps / steps_per_epoch:.1f} epochs)"
        + (f"; {trainer.world.size} processes" if trainer.world.size > 1 else ""),
        flush=True,
    )


def _spread(count: int, wanted: int) -> Any:
    """So many places of `count`, evenly spread, rising, none twice."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar train-tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys (set in the file, or as key=value):\n" + describe(TokenizerTrainConfig),
    )
    parser.add_argument("--config", type=Path, help="YAML file, such as recipes/tokenizer_32.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that win over the file")
    args = parser.parse_args(argv)
    try:
        config = load(TokenizerTrainConfig, args.config, args.settings)
    except MvarError:
        if rank_hint(os.environ) == 0:
            raise
        return 2  # The same on every rank; one message is enough.
    world = worlds.join(device=config.device)
    try:
        code = train(config, world)
    except RemoteError as error:
        code = 2 if error.expected else 1
    except MvarError:
        worlds.finish()
        raise
    except Exception:
        if world.size == 1:
            raise
        # At once and without goodbyes: the other ranks learn of it when this one is gone.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    worlds.finish()
    if world.size > 1:
        # All is written and closed. The interpreter's own end now and then aborts in a thread of torch's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    raise SystemExit(run_command(main))
