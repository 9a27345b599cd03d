"""`mvar tokenize`: images -> shards of codes. One task of an array job, or the whole job.

Shard i belongs to task i mod tasks. A shard appears only when it is complete, and its bytes depend on nothing but the
job and its number: kill this command at any moment, run it again with the same arguments, and the store is the same.

Legend: B views encoded at once, V views of an image, L tokens, H, W pixels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.decode import Order, Renderer, rendered
from data_prep.job import LAST_TASKS, ShardPlan, TokenizeConfig, cores, open_source, pin, plan_job, quantizer_bytes
from data_prep.shards import is_complete, shard_writer
from data_prep.sources import Item, Source
from data_prep.views import Pixels
from mvar.cli import run_command
from mvar.config import describe, load
from mvar.disk import remove_stale, write_file
from mvar.errors import BackendError, ConfigError
from mvar.images import from_uint8
from mvar.randomness import permuted
from mvar.tokenizer.files import load_tokenizer
from mvar.tokenizer.vqvae import VQVAE

PROGRESS_EVERY_S = 5.0


class Outcome(NamedTuple):
    """What a task did. `busy_share`: part of the time in which the encoder did not wait for images."""

    written: int
    verified: int
    images: int
    seconds: float
    busy_share: float


def tokenize(config: TokenizeConfig, task: int = 0, tasks: int = 1) -> Outcome:
    """Make the shards of one task, skipping those that are complete. Raises MvarError."""
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} --tasks {tasks}: expected a task number from 0 to {tasks - 1}.")
    encoder = Encoder.load(config)
    size = encoder.vqvae.image_size
    plans = {"train": config.train_plan(size), "val": config.val_plan(size)}
    source = open_source(config)
    quantizer = quantizer_bytes(encoder.vqvae)
    job = plan_job(config, source, encoder.vqvae, quantizer)
    pin(config.store, job, quantizer)
    write_file(config.store / LAST_TASKS, f"{tasks}\n".encode())
    remove_stale(config.store)

    mine = job.shards()[task::tasks]
    waiting = [shard for shard in mine if not is_complete(config.store, shard.name, job.sha256)]
    progress = Progress(f"tokenize {task}/{tasks}", len(waiting), sum(shard.samples for shard in waiting))
    progress.say(f"{len(mine)} shards are this task's, {len(mine) - len(waiting)} of them complete")
    orders = (Order(item, plans[shard.split]) for shard in waiting for item in shard_items(source, shard, config))
    workers = cores() if config.workers is None else config.workers
    ahead = 2 * config.batch + workers
    renderer = Renderer(source.reader, config.seed)
    with closing(rendered(orders, renderer, workers, config.decoders, ahead)) as views:
        for shard in waiting:
            views_per_image = len(plans[shard.split].names)
            with shard_writer(config.store, shard.name, job.sha256) as writer:
                for group in groups(shard_items(source, shard, config), max(1, config.batch // views_per_image)):
                    with progress.waiting():
                        images_BHWC = np.concatenate([next(views) for _ in group])
                    codes_BL = encoder(images_BHWC)
                    for item, codes_VL in zip(group, np.split(codes_BL, len(group)), strict=True):
                        writer.add(item.key, codes_VL, item.label)
                    progress.add(len(group))
            progress.shards_done += 1
    outcome = Outcome(len(waiting), len(mine) - len(waiting), progress.images, progress.seconds, progress.busy_share)
    progress.say(
        f"done: {outcome.written} shards written, {outcome.verified} verified, {outcome.images:,} images in "
        f"{_clock(outcome.seconds)}. When all tasks have ended: mvar finalize {config.store}"
    )
    return outcome


def shard_items(source: Source, shard: ShardPlan, config: TokenizeConfig) -> Iterator[Item]:
    """The images of a shard, in the store's order: that of the source, or a permutation of it."""
    items = source.splits[shard.split]
    places = np.arange(shard.first, shard.first + shard.samples)
    for place in permuted(config.seed, 0, places, len(items)) if config.shuffle else places:
        yield items[place]


def groups(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items in lists of `size`; the last may be shorter."""
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@dataclass
class Encoder:
    """Views to codes, in exact float32, at most `batch` views at once."""

    vqvae: VQVAE
    device: torch.device
    batch: int

    @classmethod
    def load(cls, config: TokenizeConfig) -> Encoder:
        """The tokenizer of the configuration on its device. Raises TokenizerError, BackendError."""
        has_cuda = torch.cuda.is_available()
        if config.device == "cuda" and not has_cuda:
            raise BackendError("device=cuda: this machine has no CUDA device that torch can use. Set device=cpu.")
        device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        geometry = None if config.patch_nums is None else {"patch_nums": list(config.patch_nums)}
        vqvae = load_tokenizer(config.tokenizer, geometry)
        # channels_last is faster and gives the same codes.
        torch.nn.utils.convert_conv2d_weight_memory_format(vqvae.to(device), torch.channels_last)
        return cls(vqvae, device, config.batch)

    def __call__(self, images_BHWC: Pixels) -> NDArray[np.uint16]:
        """uint8 (B, H, W, 3) -> codes, uint16 (B, L)."""
        with exact_float32(), torch.inference_mode():
            parts = [
                self.vqvae.encode(from_uint8(images_BHWC[begin : begin + self.batch]).to(self.device))
                for begin in range(0, len(images_BHWC), self.batch)
            ]
            return torch.cat(parts).cpu().numpy().astype(np.uint16)


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no algorithms picked by a race: the same codes every time. A quarter of them flips in bfloat16."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass
class Progress:
    """A line every few seconds: shards, images, images per second, share of time the encoder was busy, time left."""

    title: str
    shards: int
    total: int
    images: int = 0
    shards_done: int = 0
    waited_s: float = 0.0
    began_s: float = field(default_factory=time.monotonic)
    said_s: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began_s

    @property
    def busy_share(self) -> float:
        return 1 - self.waited_s / max(self.seconds, 1e-9)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for images."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - began_s

    def add(self, images: int) -> None:
        self.images += images
        if time.monotonic() - self.said_s >= PROGRESS_EVERY_S:
            self.said_s = time.monotonic()
            speed = self.images / self.seconds
            self.say(
                f"shard {self.shards_done + 1} of {self.shards}  {self.images:,}/{self.total:,} images  "
                f"{speed:.1f} img/s  encoder busy {self.busy_share:.0%}  "
                f"left {_clock((self.total - self.images) / speed)}"
            )

    def say(self, text: str) -> None:
        print(f"{self.title}: {text}", flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def main(argv: Sequence[str] | None = None) -> int:
    """`mvar tokenize --config FILE [key=value ...] [--task I --tasks N]`."""
    parser = argparse.ArgumentParser(
        prog="mvar tokenize",
        description="Images -> shards of codes. Run again after a kill: what is complete is verified and kept.",
        epilog="keys:\n" + describe(TokenizeConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file with the keys below")
    parser.add_argument("--task", type=int, default=0, help="number of this task, from 0")
    parser.add_argument("--tasks", type=int, default=1, help="into how many tasks the job is divided")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace the file's")
    args = parser.parse_args(argv)
    tokenize(load(TokenizeConfig, args.config, args.overrides), args.task, args.tasks)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
