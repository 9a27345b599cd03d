"""Reading a code store: random access by index against webdataset's sequential stream of the same tars.

random_vs_webdataset   samples/s in training order (shuffled over the whole split, labels and int64 tensors included)
                       divided by samples/s of a plain webdataset.WebDataset that decodes the same codes and labels
first_batch_s          from a closed store of 1,281,167 samples x 10 views to the first batch at a random position of a
                       random epoch; `first_batch_spread` is the slowest position divided by the fastest
samples_per_s          samples/s in training order
"""

from __future__ import annotations

import hashlib
import io
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset

from benchmarks.harness import Report, parser, seconds_of, side_by_side, spread
from data_prep.shards import ShardWriter
from mvar.data.manifest import (
    INDEX,
    MANIFEST,
    QUANTIZER,
    FileInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    TokenizerInfo,
)
from mvar.data.store import TAR_BLOCK, CodeStore, IndexTable, codes_header, write_index
from mvar.data.stream import TrainStream
from mvar.scales import PATCH_NUMS_256

TOKENS = sum(side * side for side in PATCH_NUMS_256)
IMAGENET = 1_281_167
CLASSES = 1000
BATCH = 768


def make_store(folder: Path, samples: int, views: int, shard_samples: int, *, sparse: bool) -> Path:
    """A store of made-up codes. `sparse`: shards of the right size with only the headers that a reader checks."""
    header = codes_header(views, TOKENS)
    payload = -(-(len(header) + 2 * views * TOKENS) // TAR_BLOCK) * TAR_BLOCK
    stride = payload + 3 * TAR_BLOCK
    rng = np.random.default_rng(0)
    codes_VL = rng.integers(0, 4096, (views, TOKENS)).astype(np.uint16)
    shards, shard_N, offset_N = [], [], []
    for number, first in enumerate(range(0, samples, shard_samples)):
        count = min(shard_samples, samples - first)
        offsets = TAR_BLOCK + len(header) + stride * np.arange(count, dtype=np.int64)
        name = f"train-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            if sparse:
                for offset in offsets[[0, -1]]:
                    file.seek(int(offset) - len(header))
                    file.write(header)
                file.truncate(stride * count + 2 * TAR_BLOCK)
            else:
                writer = ShardWriter(file)
                for place in range(first, first + count):
                    writer.add(f"n{place % CLASSES:08d}/{place}", (codes_VL + place) % 4096, place % CLASSES)
                writer.end()
            size = file.seek(0, 2)
        shards.append(ShardInfo(name=name, samples=count, bytes=size, sha256="0" * 64))
        shard_N.append(np.full(count, number, dtype=np.int32))
        offset_N.append(offsets)
    table = IndexTable(
        shard_N=np.concatenate(shard_N),
        offset_N=np.concatenate(offset_N),
        label_N=(np.arange(samples) % CLASSES).astype(np.int32),
    )
    index = io.BytesIO()
    write_index(index, {"train": table})
    (folder / INDEX).write_bytes(index.getvalue())
    manifest = Manifest(
        patch_nums=PATCH_NUMS_256,
        vocab_size=4096,
        latent_channels=32,
        classes=tuple(f"n{label:08d}" for label in range(CLASSES)),
        tokenizer=TokenizerInfo(sha256="0" * 64, geometry={}),
        source=SourceInfo(kind="synthetic", images=samples, bytes=0, sha256="0" * 64),
        transform={},
        encoding={},
        statistics={},
        job_sha256="0" * 64,
        index=FileInfo(name=INDEX, bytes=len(index.getvalue()), sha256=hashlib.sha256(index.getvalue()).hexdigest()),
        quantizer=FileInfo(name=QUANTIZER, bytes=0, sha256="0" * 64),
        splits={
            "train": SplitInfo(
                samples=samples, views=tuple(f"crop{view}" for view in range(views)), shards=tuple(shards)
            )
        },
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return folder


def read_in_training_order(stream: TrainStream, batches: int) -> None:
    """So many batches from somewhere in the middle of a run."""
    for number in range(batches):
        stream.batch(7_000_000 + number * BATCH, 0, BATCH)


def read_with_webdataset(folder: Path) -> int:
    """Every sample once, in the tars' order, decoded: the five lines that a user of the tars would write."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    count = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        codes = np.load(io.BytesIO(sample["codes.npy"]), allow_pickle=False)
        count += codes.shape[0] > 0 and int(sample["cls"]) >= 0
    return count


def measure(samples: int, views: int, rounds: int) -> Report:
    report = Report("store_read")
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_store(Path(scratch), samples, views, shard_samples=4096, sparse=False)
        stream = TrainStream(CodeStore.open(folder).split("train"), seed=0, global_batch=BATCH)
        batches = max(1, samples // BATCH)
        contestants = {
            "ours": lambda: read_in_training_order(stream, batches),
            "webdataset": lambda: read_with_webdataset(folder),
        }
        seconds = side_by_side(contestants, rounds)
        ours = [batches * BATCH / took_s for took_s in seconds["ours"]]
        theirs = [samples / took_s for took_s in seconds["webdataset"]]
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        report.context["store"] = {"samples": samples, "views": views, "tokens": TOKENS}
        report.add("random_vs_webdataset", statistics.median(ratios), ">= 30", spread(ratios))
        report.add("samples_per_s", statistics.median(ours), None, spread(ours))
        report.add("webdataset_samples_per_s", statistics.median(theirs), None, spread(theirs))
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_store(Path(scratch), IMAGENET, 10, shard_samples=4096, sparse=True)
        positions = [0, *np.random.default_rng(1).integers(0, 350 * IMAGENET, max(4, rounds)).tolist()]

        def first_batch(position: int) -> None:
            TrainStream(CodeStore.open(folder).split("train"), seed=0, global_batch=BATCH).batch(position, 0, BATCH)

        first_batch(0)
        took = [seconds_of(lambda position=position: first_batch(position)) for position in positions]  # type: ignore[misc]
        report.add("first_batch_s", statistics.median(took), "< 1", spread(took))
        report.add("first_batch_spread", max(took) / min(took))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=16_384, help="samples of the store that is read through")
    arguments.add_argument("--views", type=int, default=1, help="views of each")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds that are counted")
    args = arguments.parse_args(argv)
    measure(args.samples, args.views, args.rounds).finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
