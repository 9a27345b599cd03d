"""`mvar tokenize`: images -> shards of codes. One task of an array job, or the whole job.

Shard i belongs to task i mod tasks, or to whoever claims it first. A shard appears only when it is complete, and its
bytes depend on nothing but the job and its number: kill this command at any moment, run it again with the same
arguments, and the store is the same.

Legend: B views encoded at once, V views of an image, L tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.calibrate import Calibration, calibrate, calibration_views, require_accepted
from data_prep.decode import Order, Rendered, Renderer, groups, rendered
from data_prep.encoder import BatchEncoder, Launched
from data_prep.job import (
    LastRun,
    ShardPlan,
    TokenizeConfig,
    TokenizeJob,
    open_source,
    pin,
    plan_job,
    quantizer_bytes,
    undone_if_refused,
)
from data_prep.progress import TokenizeProgress
from data_prep.shards import ShardWriter, is_complete, read_record, shard_writer
from mvar.cgroups import cores
from mvar.cli import run_command
from mvar.data.manifest import Quarantined
from mvar.durations import duration
from mvar.errors import ConfigError, ImageError
from mvar.files.disk import remove_stale
from mvar.images.pixels import DamagedImageError
from mvar.images.sources import Item, Source, say_notes
from mvar.images.views import ViewPlan, is_suspicious
from mvar.randomness import permuted
from mvar.run.claims import Claims
from mvar.settings import describe, load

POLL_S = 2.0
"""How often a task that has nothing to claim looks whether another one died."""


class Outcome(NamedTuple):
    """What a task did. `busy_share`: part of the time in which the encoder did not wait for images."""

    written: int
    verified: int
    images: int
    seconds: float
    busy_share: float


def tokenize(
    config: TokenizeConfig, task: int = 0, tasks: int = 1, *, claim: bool = False, skip_bad: int = 0
) -> Outcome:
    """Make the shards of one task, skipping those that are complete. Raises MvarError.

    `claim`: take shards that no other task has, until all of the job are complete. `skip_bad`: damaged images that may
    be left out, over the whole job.
    """
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} --tasks {tasks}: expected a task number from 0 to {tasks - 1}.")
    if skip_bad < 0:
        raise ConfigError(f"--skip-bad {skip_bad}: expected a number of images, from 0.")
    encoder = BatchEncoder.load(config)
    with undone_if_refused(config.store):
        source = open_source(config, keep=True)
        say_notes(source)
        quantizer = quantizer_bytes(encoder.vqvae)
        job = plan_job(config, source, encoder.vqvae, quantizer)
        calibration = None if config.is_exact else accepted_calibration(config, source, encoder, job)
        pin(config.store, job, quantizer)
    if calibration is not None:
        calibration.write(config.store)
    LastRun(tasks=tasks, skip_bad=skip_bad).write(config.store)
    remove_stale(config.store)

    maker = ShardMaker(config, source, encoder, job, skip_bad, TokenizeProgress(f"tokenize {task}/{tasks}", None))
    verified = make_claimed(maker, task, tasks) if claim else make_share(maker, job.shards()[task::tasks])
    progress = maker.progress
    progress.say(
        f"done: {progress.shards} shards written, {verified} verified, {progress.images:,} images in "
        f"{duration(progress.seconds)}, encoder busy {progress.busy_share:.0%}. "
        f"When all tasks have ended: mvar finalize {config.store}"
    )
    return Outcome(progress.shards, verified, progress.images, progress.seconds, progress.busy_share)


def accepted_calibration(
    config: TokenizeConfig, source: Source, encoder: BatchEncoder, job: TokenizeJob
) -> Calibration:
    """What this job's fast mode costs, measured by its first task. Raises ConfigError where that is not accepted."""
    calibration = Calibration.read(config.store, job.sha256)
    if calibration is None:
        images_BHWC = calibration_views(config, source, encoder.vqvae.image_size)
        calibration = calibrate(encoder, images_BHWC, job.sha256)
    require_accepted(config, calibration)
    print(calibration.table(), flush=True)
    return calibration


def make_share(maker: ShardMaker, mine: list[ShardPlan]) -> int:
    """Make those of the shards that are not complete; returns how many were."""
    waiting = [shard for shard in mine if not maker.is_complete(shard)]
    verified = len(mine) - len(waiting)
    maker.progress.expect(sum(shard.samples for shard in waiting))
    maker.progress.say(f"{len(mine)} shards are this task's, {verified} of them complete")
    for _ in maker.make(waiting):
        pass
    return verified


def make_claimed(maker: ShardMaker, task: int, tasks: int) -> int:
    """Make shards that nobody else has until all are complete; returns how many others (or earlier runs) made."""
    shards = maker.job.shards()
    turn = len(shards) * task // tasks
    open_shards = {shard.name: shard for shard in shards[turn:] + shards[:turn]}
    verified = 0
    with Claims(maker.config.store) as claims:

        def claimed() -> Iterator[ShardPlan]:
            nonlocal verified
            for shard in list(open_shards.values()):
                if not claims.take(shard.name):
                    continue
                if not maker.is_complete(shard):
                    yield shard
                    continue
                claims.release(shard.name)
                del open_shards[shard.name]
                verified += 1

        while open_shards:
            for shard in maker.make(claimed()):
                claims.release(shard.name)
                del open_shards[shard.name]
            if open_shards:  # The others are at work on them, or dead.
                with maker.progress.waiting(lambda: True):
                    time.sleep(POLL_S)
    return verified


@dataclass
class ShardMaker:
    """Turns shard plans into shards, decoding ahead over the ends of shards."""

    config: TokenizeConfig
    source: Source
    encoder: BatchEncoder
    job: TokenizeJob
    skip_bad: int
    progress: TokenizeProgress
    _plans: dict[str, ViewPlan] = field(init=False)

    def __post_init__(self) -> None:
        size = self.encoder.vqvae.image_size
        self._plans = {"train": self.config.train_plan(size), "val": self.config.val_plan(size)}

    def is_complete(self, shard: ShardPlan) -> bool:
        return is_complete(self.config.store, shard.name, self.job.sha256)

    def make(self, shards: Iterable[ShardPlan]) -> Iterator[ShardPlan]:
        """Write the shards, one after the other, and yield each when it is complete.

        Shards are asked for as decoding comes to them, before those in front of them are written.
        """
        config = self.config
        orders = (
            Order(shard, item, self._plans[shard.split])
            for shard in shards
            for item in shard_items(self.source, shard, config)
        )
        workers = cores() if config.workers is None else config.workers
        renderer = Renderer(self.source.reader, config.seed)
        with closing(rendered(orders, renderer, workers, config.decoders, 2 * config.batch + workers)) as images:
            for shard, own in groupby(self._timed(images), key=lambda image: image.order.shard):
                with shard_writer(config.store, shard.name, self.job.sha256) as writer:
                    self._fill(writer, shard, own)
                self.progress.shards += 1
                yield shard

    def _timed(self, images: Generator[Rendered, None, None]) -> Iterator[Rendered]:
        while True:
            with self.progress.waiting(self.encoder.is_idle):
                image = next(images, None)
            if image is None:
                return
            yield image

    def _fill(self, writer: ShardWriter, shard: ShardPlan, images: Iterator[Rendered]) -> None:
        per_batch = max(1, self.config.batch // len(self._plans[shard.split].names))
        for image, codes_VL in self._encoded(groups(images, per_batch)):
            if isinstance(image.views, DamagedImageError):
                self._leave_out(writer, shard, image.order.item, image.views)
            else:
                assert codes_VL is not None, "every image that is not damaged was encoded"
                if is_suspicious(image.views):
                    writer.suspicious.append(image.order.item.key)
                writer.add(image.order.item.key, codes_VL, image.order.item.label)
            self.progress.add(1)

    def _encoded(self, batches: Iterator[list[Rendered]]) -> Iterator[tuple[Rendered, NDArray[np.uint16] | None]]:
        """Codes of each image. A batch is collected when the next one is launched: the encoder never waits for us."""
        before = None
        for batch in batches:
            views = [image.views for image in batch if not isinstance(image.views, DamagedImageError)]
            launched = (batch, self.encoder.launch(np.concatenate(views)) if views else None)
            if before is not None:
                yield from _collected(*before)
            before = launched
        if before is not None:
            yield from _collected(*before)

    def _leave_out(self, writer: ShardWriter, shard: ShardPlan, item: Item, damage: DamagedImageError) -> None:
        """Quarantine an image. Raises ImageError when that is one more than the job may leave out."""
        reason = damage.reason
        writer.quarantine.append(Quarantined(key=item.key, reason=reason))
        if self.skip_bad == 0:
            raise damage
        others = (read_record(self.config.store, plan.name) for plan in self.job.shards() if plan != shard)
        bad = [entry for record in others if record is not None for entry in record.quarantine] + writer.quarantine
        if len(bad) > self.skip_bad:
            listed = "\n  ".join(f"{entry.key} ({entry.reason})" for entry in bad[:20])
            raise ImageError(
                f"{len(bad)} images are damaged, --skip-bad {self.skip_bad} allows fewer:\n  {listed}\n"
                f"Mend them, or allow more. The last one: {damage}"
            )
        self.progress.say(f"left out {item.key}: {reason}")


def _collected(batch: list[Rendered], codes: Launched | None) -> Iterator[tuple[Rendered, NDArray[np.uint16] | None]]:
    rows = iter(() if codes is None else codes.collect())
    for image in batch:
        if isinstance(image.views, DamagedImageError):
            yield image, None
        else:
            yield image, np.stack(list(islice(rows, len(image.views))))


def shard_items(source: Source, shard: ShardPlan, config: TokenizeConfig) -> Iterator[Item]:
    """The images of a shard, in the store's order: that of the source, or a permutation of it."""
    items = source.splits[shard.split]
    places = np.arange(shard.first, shard.first + shard.samples)
    for place in permuted(config.seed, 0, places, len(items)) if config.shuffle else places:
        yield items[place]


def main(argv: Sequence[str] | None = None) -> int:
    """`mvar tokenize --config FILE [key=value ...] [--task I --tasks N] [--claim] [--skip-bad N]`."""
    parser = argparse.ArgumentParser(
        prog="mvar tokenize",
        description="Images -> shards of codes. Run again after a kill: what is complete is verified and kept.",
        epilog="keys:\n" + describe(TokenizeConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file with the keys below")
    parser.add_argument("--task", type=int, default=0, help="number of this task, from 0")
    parser.add_argument("--tasks", type=int, default=1, help="into how many tasks the job is divided")
    parser.add_argument("--claim", action="store_true", help="take free shards, also those of dead tasks, to the end")
    parser.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N damaged images")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace the file's")
    args = parser.parse_intermixed_args(argv)
    config = load(TokenizeConfig, args.config, args.overrides)
    tokenize(config, args.task, args.tasks, claim=args.claim, skip_bad=args.skip_bad)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
