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
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvar.cli import run_command
from mvar.config import Phase, TrackingConfig
from mvar.data.prefetch import Feed
from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, CheckpointError, ImageError
from mvar.files.disk import write_text
from mvar.images.arrays import enlarge, grid, save_png, to_uint8
from mvar.images.layouts import open_images
from mvar.images.sources import Source, say_notes
from mvar.log import log, tell, write_to
from mvar.run import world as worlds
from mvar.run.command import run_training
from mvar.run.folder import RunFolder
from mvar.run.heartbeat import Heartbeat
from mvar.run.history import History
from mvar.run.loop import Session, TrainingLoop, Votes, claim, due
from mvar.run.stopping import StopRequests, Watchdog
from mvar.run.tracking import Stopwatch, Tracker, wandb_mode
from mvar.run.world import World
from mvar.settings import describe, dump, load
from mvar.tokenizer.files import save_tokenizer, sha256_of
from mvar.tokenizer.training.config import LossConfig, TokenizerTrainConfig
from mvar.tokenizer.training.console import TokenizerLines
from mvar.tokenizer.training.left_out import LeftOut, read_left_out, write_left_out
from mvar.tokenizer.training.losses import LossTerm, absolute_error, codebook_error, commitment_error, squared_error
from mvar.tokenizer.training.parallel import hand_round, part_of, require_equal, require_work_for_all
from mvar.tokenizer.training.perceptual import Perceptual
from mvar.tokenizer.training.pictures import Pictures, Pixels, centre_views
from mvar.tokenizer.training.state import IMAGES, StateFile, TokenizerTrainingState
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
        limits_s: dict[Phase, float] = dict.fromkeys(("start", "step", "validate", "save"), config.watchdog_s)
        watchdog = stack.enter_context(Watchdog(limits_s))
        heartbeat = stack.enter_context(Heartbeat(watchdog, world))
        world.together(lambda: require_work_for_all(config.batch, world))
        terms = world.together(lambda: loss_terms(config.loss, world.device))
        # One listing for all: a folder that changes in between would be two data sets.
        source = world.share(world.together(lambda: _open(config) if world.is_main else None))
        assert source is not None
        identity = world.share(world.together(lambda: identity_of(config, source) if world.is_main else None))
        assert identity is not None
        ours = world.together(lambda: stack.enter_context(claim(run, config.takeover_s, world)))
        states = StateFile(config.out)
        found = world.together(lambda: _saved(states, config, identity) if world.is_main else None)
        done = world.share(found.step if found is not None else 0)
        result = config.out / "tokenizer.safetensors"
        if done == config.steps and world.share(result.exists()):
            if world.is_main:
                log.info("already finished: %s", result)
            return EXIT_FINISHED
        write_to(run.logs)
        log.info(f"{world.size} ranks; rank {world.rank} on {world.device}, process {os.getpid()}")
        stops = stack.enter_context(StopRequests(run.stop_file, config.stop_before_end_s, looks=world.is_main))
        session = Session(run, world, watchdog, stops, ours, config.takeover_s)
        history = stack.enter_context(History(run.path, writes=world.is_main).recording(world.size))
        threads = config.threads or world.own_cores
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
        pictures = Pictures(
            source,
            config.geometry.image_size,
            config.resize,
            config.batch,
            config.seed,
            part=part_of(config.batch, world),
            ram_gib=config.ram_gib,
            workers=threads,
            left_out=left_out,
        )
        world.together(lambda: write_text(run.config, dump(config)) if world.is_main else None)
        history.runs_on(world.devices)
        history.going_on(done)
        if world.is_main:
            log.info("%s", f"resuming after step {done}" if done else "beginning")
            _announce(config, source, held_out, trainer, pictures.steps_per_epoch)
        tell(trainer.chosen)
        tracker = stack.enter_context(_tracker(config, world, done))
        feed = Feed(stack.enter_context(closing(pictures.batches(done, config.steps))), 1)
        kept = Kept(states, identity, history)
        heartbeat.end()
        return TokenizerTraining(session, feed, config, trainer, held_out, left_out, kept, tracker).loop(done)


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
class Kept:
    """Where the training's states are kept, what may not change between two of them, and how its starts ended."""

    states: StateFile
    identity: dict[str, Any]
    history: History


@dataclass(frozen=True)
class TokenizerStep:
    """One step, as all ranks know it."""

    measured: dict[str, float]
    votes: Votes


class TokenizerTraining(TrainingLoop[Pixels, TokenizerStep, TokenizerStep]):
    """What the loop does in a training of a tokenizer."""

    def __init__(
        self,
        session: Session,
        feed: Feed[Pixels],
        config: TokenizerTrainConfig,
        trainer: Trainer,
        held_out: HeldOut,
        left_out: LeftOut,
        kept: Kept,
        tracker: Tracker,
    ) -> None:
        super().__init__(session, feed, tracker, config.steps, config.save_every)
        self.config, self.trainer, self.held_out, self.left_out = config, trainer, held_out, left_out
        self.kept, self.world, self.folder = kept, session.world, session.run.path

    def launch(self, done: int, batches: Sequence[Pixels]) -> TokenizerStep:
        (pixels,) = batches
        measured = self.trainer.step(pixels)
        votes = self.session.votes(self.feed, damaged=self.left_out.unshared)
        own = torch.tensor(votes.numbers(), dtype=torch.float64)
        return TokenizerStep(measured, Votes(*map(int, self.world.sum(own))))

    def result(self, launched: TokenizerStep) -> TokenizerStep:
        return launched

    def record(self, done: int, result: TokenizerStep, watch: Stopwatch) -> None:
        if due(done, self.config.log_every) or done == self.last_step:
            seconds = watch.seconds()
            speed = {"imgs_per_s": self.config.batch / seconds, "wait_share": watch.waited_s / seconds}
            self.tracker.write("train", done, **result.measured, **speed)

    def agree(self, votes: Votes) -> ImageError | None:
        """Tell all ranks, and the user, of the damaged pictures that were met; the error if they are too many."""
        if not votes.damaged:
            return None
        new = self.left_out.agree(self.world)
        excess = self.left_out.excess()
        if excess is None:
            self.world.together(lambda: self.list_damaged(new) if self.world.is_main else None)
        return excess

    def list_damaged(self, new: dict[str, str]) -> None:
        for path, reason in new.items():
            log.warning("left out %s: %s", path, reason)
        write_left_out(self.folder / LEFT_OUT, self.left_out.reasons)

    def looks_due(self, done: int) -> set[str]:
        return {"val", "sample"} if done == self.last_step or due(done, self.config.validate_every) else set()

    def look(self, done: int, looks: set[str]) -> None:
        """Quality on held-out pictures, and some of them to look at; not being able to draw them is told."""
        self.session.watchdog.feed("validate")
        self.tracker.write("val", done, **asdict(self.trainer.quality(self.held_out.own)))
        name = f"{self.session.run.samples.name}/step-{done:09d}.png"
        try:
            self.world.together(lambda: self.draw(self.folder / name) if self.world.is_main else None)
            self.tracker.write("sample", done, file=name)
        except Exception as error:
            log.warning("step %d: no pictures were drawn: %s: %s", done, type(error).__name__, error)
        self.session.watchdog.feed()

    def draw(self, path: Path) -> None:
        """A PNG with rows of originals, each above the row of what the tokenizer makes of them."""
        save_png(path, reconstructions(self.held_out.drawn, to_uint8(self.trainer.reconstruct(self.held_out.drawn)[0])))

    def save(self, done: int, *, last: bool) -> None:
        """Write the state. Raises WriteError, TrainingError (RemoteError on other ranks)."""
        weights = [*self.trainer.parameters.values(), *self.trainer.vqvae.buffers()]
        require_equal(self.world, weights, f"tokenizer training, step {done}")
        self.world.together(lambda: self.write(done) if self.world.is_main else None)
        self.session.watchdog.feed()

    def write(self, done: int) -> None:
        self.tracker.sync()  # A state must not be newer than its records.
        self.kept.states.write(TokenizerTrainingState(done, self.trainer.tensors(), self.kept.identity))

    def finish(self, done: int) -> None:
        self.world.together(lambda: self.publish() if self.world.is_main else None)
        self.kept.history.end(EXIT_FINISHED, done, "finished")

    def stopped(self, done: int, reason: str) -> None:
        self.kept.history.end(EXIT_STOPPED, done, reason)

    def publish(self) -> None:
        self.draw(self.folder / "reconstructions.png")
        result = self.folder / "tokenizer.safetensors"
        save_tokenizer(result, self.trainer.result)
        log.info("wrote %s", result)


def reconstructions(originals_NHWC: Pixels, reconstructed_NHWC: Pixels, columns: int = GRID_COLUMNS) -> Pixels:
    """One picture with rows of originals, each above the row of the reconstructed ones."""
    columns = min(columns, len(originals_NHWC))
    rows = [
        picture
        for start in range(0, len(originals_NHWC), columns)
        for pictures in (originals_NHWC, reconstructed_NHWC)
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


def _saved(states: StateFile, config: TokenizerTrainConfig, identity: dict[str, Any]) -> TokenizerTrainingState | None:
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
            wandb=config.wandb or ("disabled" if wandb_mode(None) is None else None),
            wandb_project=config.wandb_project,
            tensorboard=config.tensorboard,
        ),
        is_main=world.is_main,
        resumed_step=done,
        samples_at=lambda step: step * config.batch,
        settings=config.model_dump(mode="json"),
        lines=TokenizerLines(done, config.steps),
    )


def _announce(
    config: TokenizerTrainConfig, source: Source, held_out: HeldOut, trainer: Trainer, steps_per_epoch: float
) -> None:
    where = "of them measured (none are held out)" if held_out.learned_from else "held out"
    tokens, words = trainer.vqvae.quantizer.pyramid.total, config.geometry.vocab_size
    parameters_millions = sum(parameter.numel() for parameter in trainer.parameters.values()) / 1e6
    log.info(
        f"{len(source.splits['train'])} images of {len(source.classes)} classes, {held_out.total} {where}; "
        f"{config.geometry.image_size} px -> {tokens} tokens of {words} words; {parameters_millions:.2f}M parameters; "
        f"{config.steps} steps of {config.batch} ({config.steps / steps_per_epoch:.1f} epochs)"
        + (f"; {trainer.world.size} processes" if trainer.world.size > 1 else "")
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
    return run_training(
        lambda: load(TokenizerTrainConfig, args.config, args.settings),
        lambda config: worlds.join(device=config.device),
        train,
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
