"""From the code store to batches: the order of data as a pure function of (seed, samples seen).

The only state is how many samples the run has seen. Samples form one endless stream of epochs; the global batch that
begins at `samples_seen` is a stretch of it, and ranks and micro-batches are slices of that stretch. So neither the
number of ranks nor the micro-batch changes what is learned from, and a run resumes anywhere at no cost.

Legend: B samples of a batch, L tokens of all scales.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar.data.prefetch import read_ahead
from mvar.data.store import Split
from mvar.errors import ConfigError, StoreError
from mvar.randomness import permuted, view_of

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A slice of a global batch.

    `codes_BL`: int64; `labels_B`: int64; `positions_B`: places in the global batch, which key the random numbers of
    the step; `indices_B`, `views_B`, `epochs_B`: which sample and view it is, in which pass; `valid_B`: False where a
    sample only fills up an evaluation batch; `samples_seen`: where the global batch begins.
    """

    codes_BL: Tensor
    labels_B: Tensor
    positions_B: I64
    indices_B: I64
    views_B: I64
    epochs_B: I64
    valid_B: NDArray[np.bool_]
    samples_seen: int

    def __len__(self) -> int:
        return len(self.positions_B)


class TrainStream:
    """The endless stream of training samples. Raises StoreError when the split is empty."""

    def __init__(self, split: Split, seed: int, global_batch: int) -> None:
        if len(split) == 0:
            raise StoreError(f"code store: split {split.name!r} is empty; there is nothing to train on.")
        self.split = split
        self.seed = seed
        self.global_batch = global_batch

    def order(self, samples_seen: int, start: int, count: int) -> tuple[I64, I64, I64]:
        """(sample, view, epoch) of the places [start, start + count) of the global batch at `samples_seen`."""
        places = samples_seen + start + np.arange(count, dtype=np.int64)
        epochs_B, inside_B = np.divmod(places, len(self.split))
        indices_B = permuted(self.seed, epochs_B, inside_B, len(self.split))
        return indices_B, view_of(epochs_B, indices_B, self.split.views), epochs_B

    def batch(self, samples_seen: int, start: int, count: int) -> Batch:
        """The slice [start, start + count) of the global batch that begins at `samples_seen`. Pure."""
        indices_B, views_B, epochs_B = self.order(samples_seen, start, count)
        positions_B = start + np.arange(count, dtype=np.int64)
        valid_B = np.ones(count, dtype=np.bool_)
        return _read(self.split, indices_B, views_B, epochs_B, positions_B, valid_B, samples_seen)

    def rank_batches(self, samples_seen: int, rank: int, world: int, micro_batch: int) -> Generator[Batch, None, None]:
        """This rank's micro-batches from `samples_seen` on, for ever; a thread reads ahead until `.close()`.

        Rank r takes the r-th contiguous part of each global batch. Raises ConfigError when the global batch cannot be
        divided so.
        """
        check_split(self.global_batch, world, micro_batch)
        return read_ahead(self._slices(samples_seen, rank, world, micro_batch))

    def _slices(self, samples_seen: int, rank: int, world: int, micro_batch: int) -> Iterator[Batch]:
        share = self.global_batch // world
        while True:
            for start in range(rank * share, (rank + 1) * share, micro_batch):
                yield self.batch(samples_seen, start, micro_batch)
            samples_seen += self.global_batch


def check_split(global_batch: int, world: int, micro_batch: int) -> None:
    """Raises ConfigError unless the global batch is a whole number of micro-batches on every rank."""
    if global_batch % (world * micro_batch):
        raise ConfigError(
            f"global_batch {global_batch} cannot be divided over {world} ranks in micro-batches of {micro_batch}: "
            f"it must be a multiple of {world * micro_batch}. Change global_batch or engine.micro_batch."
        )


def eval_batches(split: Split, limit: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """View 0 of at most `limit` samples, spread evenly over the split: the same ones whatever the ranks and the batch.

    Every rank gets equally many batches of equal size (collectives must pair up); samples that only fill up have
    `valid_B` False. Positions number the chosen samples. Raises StoreError when the split is empty.
    """
    if len(split) == 0:
        raise StoreError(f"code store: split {split.name!r} is empty; tokenize with val_fraction set, or with a val/.")
    chosen = np.arange(min(limit, len(split)), dtype=np.int64)
    for begin in range(rank * batch, rank * batch + -(-len(chosen) // (world * batch)) * world * batch, world * batch):
        positions_B = np.arange(begin, begin + batch, dtype=np.int64)
        valid_B = positions_B < len(chosen)
        indices_B = np.where(valid_B, positions_B, 0) * len(split) // len(chosen)
        yield _read(split, indices_B, np.zeros_like(indices_B), np.zeros_like(indices_B), positions_B, valid_B, 0)


def _read(
    split: Split,
    indices_B: I64,
    views_B: I64,
    epochs_B: I64,
    positions_B: I64,
    valid_B: NDArray[np.bool_],
    samples_seen: int,
) -> Batch:
    return Batch(
        codes_BL=torch.from_numpy(split.codes(indices_B, views_B).astype(np.int64)),
        labels_B=torch.from_numpy(split.labels_N[indices_B]),
        positions_B=positions_B,
        indices_B=indices_B,
        views_B=views_B,
        epochs_B=epochs_B,
        valid_B=valid_B,
        samples_seen=samples_seen,
    )
