"""The order of data: one endless stream, sliced by ranks and micro-batches, resumed anywhere."""

import itertools
import threading

import numpy as np
import pytest
import torch

from mvar.data.store import CodeStore
from mvar.data.stream import TrainStream, eval_batches
from mvar.errors import ConfigError, StoreError
from tests.stores import synthetic_codes, synthetic_store

SAMPLES, VIEWS, GLOBAL = 23, 3, 12


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return CodeStore.open(synthetic_store(tmp_path_factory.mktemp("store"), train=SAMPLES, views=VIEWS))


@pytest.fixture
def stream(store):
    return TrainStream(store.split("train"), seed=1, global_batch=GLOBAL)


def take(stream, samples_seen, rank, world, micro_batch, count):
    batches = stream.rank_batches(samples_seen, rank, world, micro_batch)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def global_batch(stream, samples_seen, world, micro_batch):
    """(codes, labels, positions) of one global batch, gathered from all ranks."""
    parts = [
        batch
        for rank in range(world)
        for batch in take(stream, samples_seen, rank, world, micro_batch, GLOBAL // world // micro_batch)
    ]
    codes = torch.cat([batch.codes_BL for batch in parts])
    labels = torch.cat([batch.labels_B for batch in parts])
    return codes, labels, np.concatenate([batch.positions_B for batch in parts])


def test_a_batch_holds_the_codes_and_labels_of_its_samples(stream):
    batch = stream.batch(40, 3, 5)
    assert batch.codes_BL.dtype == batch.labels_B.dtype == torch.int64
    for row in range(5):
        sample, view = int(batch.indices_B[row]), int(batch.views_B[row])
        assert batch.codes_BL[row].tolist() == synthetic_codes("train", sample, VIEWS)[view].tolist()
        assert batch.labels_B[row] == sample % 4
    assert batch.positions_B.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 1), (1, 4), (2, 6), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_the_global_batch_does_not_depend_on_ranks_or_micro_batch(stream, world, micro_batch):
    for samples_seen in (0, GLOBAL, 20 * GLOBAL):
        expected = stream.batch(samples_seen, 0, GLOBAL)
        codes, labels, positions = global_batch(stream, samples_seen, world, micro_batch)
        assert torch.equal(codes, expected.codes_BL)
        assert torch.equal(labels, expected.labels_B)
        assert np.array_equal(positions, np.arange(GLOBAL))


def test_resuming_at_any_position_yields_the_batches_of_an_uninterrupted_run(stream):
    whole = take(stream, 0, 1, 2, 3, 40)
    for step in (1, 7, 18):
        resumed = take(stream, step * GLOBAL, 1, 2, 3, 4)
        for batch, expected in zip(resumed, whole[2 * step :], strict=False):
            assert torch.equal(batch.codes_BL, expected.codes_BL)
            assert np.array_equal(batch.positions_B, expected.positions_B)
            assert batch.samples_seen == expected.samples_seen


def test_epochs_follow_each_other_without_dropping_a_sample(stream):
    epochs = 6
    indices, views, numbers = stream.order(0, 0, epochs * SAMPLES)
    assert np.array_equal(numbers, np.repeat(np.arange(epochs), SAMPLES))
    for epoch in range(epochs):
        assert sorted(indices[numbers == epoch]) == list(range(SAMPLES))
    orders = {tuple(indices[numbers == epoch]) for epoch in range(epochs)}
    assert len(orders) == epochs
    for sample in range(SAMPLES):  # Two rounds of all three views.
        assert np.bincount(views[indices == sample]).tolist() == [2, 2, 2]


def test_a_batch_may_span_several_epochs_of_a_tiny_split(tmp_path):
    split = CodeStore.open(synthetic_store(tmp_path, train=5, val=0)).split("train")
    batch = TrainStream(split, seed=0, global_batch=32).batch(32, 0, 32)
    assert batch.epochs_B.tolist() == sorted(batch.epochs_B.tolist())
    assert set(batch.epochs_B.tolist()) == set(range(6, 13))


def test_seeds_have_different_orders(store):
    first, second = (TrainStream(store.split("train"), seed, GLOBAL).order(0, 0, SAMPLES)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("world", "micro_batch"), [(5, 1), (2, 4), (1, 24)])
def test_an_impossible_division_of_the_batch_is_refused_with_its_numbers(stream, world, micro_batch):
    with pytest.raises(ConfigError, match=f"global_batch 12 .* {world} ranks .* micro-batches of {micro_batch}"):
        stream.rank_batches(0, 0, world, micro_batch)


def test_an_empty_split_is_refused(tmp_path):
    split = CodeStore.open(synthetic_store(tmp_path, val=0)).split("val")
    with pytest.raises(StoreError, match="'val' is empty"):
        TrainStream(split, 0, 4)
    with pytest.raises(StoreError, match="val_fraction"):
        next(eval_batches(split, limit=4, batch=2))


def test_an_error_while_reading_ahead_reaches_the_reader_of_batches(stream, monkeypatch):
    batches = stream.rank_batches(0, 0, 1, 4)
    next(batches)
    monkeypatch.setattr(stream.split, "codes", lambda indices, views: (_ for _ in ()).throw(StoreError("damaged")))
    with pytest.raises(StoreError, match="damaged"):
        list(itertools.islice(batches, 20))


def test_closing_the_batches_ends_the_thread(stream):
    batches = stream.rank_batches(0, 0, 1, 4)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mvar-read-ahead"]


@pytest.mark.parametrize("limit", [3, 9, SAMPLES, 100])
def test_evaluation_uses_the_same_samples_whatever_the_ranks(store, limit):
    split = store.split("train")

    def chosen(world, batch_size):
        batches = [list(eval_batches(split, limit, batch_size, rank, world)) for rank in range(world)]
        assert len({len(own) for own in batches}) == 1
        assert all(len(batch) == batch_size for own in batches for batch in own)
        picked = [
            (place, index)
            for own in batches
            for batch in own
            for place, index, valid in zip(batch.positions_B, batch.indices_B, batch.valid_B, strict=True)
            if valid
        ]
        return [int(index) for _, index in sorted(picked)]

    expected = chosen(1, 4)
    assert len(expected) == len(set(expected)) == min(limit, SAMPLES)
    assert expected[0] == 0
    assert expected[-1] >= SAMPLES - SAMPLES // min(limit, SAMPLES) - 1
    for world, batch_size in [(2, 4), (3, 1), (4, 8)]:
        assert chosen(world, batch_size) == expected


def test_evaluation_reads_view_zero(store):
    batch = next(eval_batches(store.split("val"), limit=5, batch=5))
    assert batch.codes_BL.tolist() == [synthetic_codes("val", place, 1)[0].tolist() for place in range(5)]
