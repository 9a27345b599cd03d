"""The random numbers of a run: exact values that must never change, and the properties they are used for."""

import hashlib
import itertools

import numpy as np
import pytest

from mvar.randomness import drop_path, hash64, label_drop, permuted, uniform, view_of

SMALL = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000, 1023, 1024, 1025]


def test_the_hash_has_its_fixed_values():
    # A change here changes the data order and the dropped labels of every run ever started: old runs cannot resume.
    assert int(hash64(0, "a")) == 10600591454142951214
    assert int(hash64(0, "a", 1, 2)) == 17285256027801071415
    assert hash64(7, "order", np.arange(3), 5).tolist() == [
        7626659388196174820,
        5445523859699064531,
        9080870376510095993,
    ]


def test_the_hash_is_the_documented_chain_of_splitmix64_steps():
    mask = 2**64 - 1

    def mix(bits):
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & mask
        return bits ^ (bits >> 31)

    name = int.from_bytes(hashlib.blake2b(b"stream", digest_size=8).digest(), "little")
    state = mix(123 ^ name)
    for counter in (5, 2**40):
        state = mix((state + (counter + 1) * 0x9E3779B97F4A7C15) & mask)
    assert int(hash64(123, "stream", 5, 2**40)) == state


def test_the_order_of_data_has_its_fixed_values():
    assert permuted(1, 0, np.arange(10), 10).tolist() == [7, 9, 6, 0, 3, 4, 2, 5, 1, 8]
    assert permuted(0, 3, [0, 1, 640_583, 1_281_166], 1_281_167).tolist() == [169568, 1238926, 859726, 630664]


def test_drawn_numbers_have_their_fixed_values():
    assert view_of(3, np.arange(8), 4).tolist() == [3, 1, 2, 1, 2, 1, 2, 2]
    assert uniform(3, "x", np.arange(3)).tolist() == [0.8919773544140815, 0.3526742371010049, 0.7582878100724199]
    assert label_drop(0, 12, np.arange(16), 0.25).nonzero()[0].tolist() == [0, 10]
    assert (drop_path(0, 12, np.arange(8), [0.5])[0] == 0).astype(int).tolist() == [
        [1, 1, 1, 1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1, 0, 0, 1],
        [1, 1, 1, 0, 1, 1, 1, 0],
    ]


@pytest.mark.parametrize("n", SMALL)
def test_an_epoch_is_a_permutation_of_all_samples(n):
    for epoch in (0, 1, 12345):
        assert np.array_equal(np.sort(permuted(3, epoch, np.arange(n), n)), np.arange(n))


def test_an_epoch_of_imagenet_is_a_permutation():
    n = 1_281_167
    order = permuted(0, 7, np.arange(n), n)
    assert np.array_equal(np.bincount(order, minlength=n), np.ones(n, dtype=np.int64))
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5e-3
    assert np.array_equal(permuted(0, 7, [999_999], n), order[[999_999]])


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(permuted(seed, epoch, np.arange(100), 100)) for seed in range(4) for epoch in range(25)}
    assert len(orders) == 100


def test_all_orders_of_a_small_set_are_about_equally_likely():
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(4800):
        counts[tuple(permuted(0, epoch, np.arange(4), 4).tolist())] += 1
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 50  # 23 degrees of freedom: exceeded once in a thousand draws of a fair permutation.


def test_each_position_may_have_its_own_epoch():
    epochs = np.array([0, 0, 1, 5])
    positions = np.array([3, 9, 0, 3])
    mixed = permuted(2, epochs, positions, 10)
    alone = [permuted(2, int(epoch), [position], 10)[0] for epoch, position in zip(epochs, positions, strict=True)]
    assert mixed.tolist() == alone


@pytest.mark.parametrize("positions", [[10], [-1], [0.5]])
def test_a_position_outside_the_epoch_is_refused(positions):
    with pytest.raises(ValueError, match=r"positions|counters"):
        permuted(0, 0, positions, 10)


@pytest.mark.parametrize("views", [1, 2, 3, 10])
def test_every_view_of_a_sample_is_used_once_in_as_many_epochs_as_there_are_views(views):
    samples = np.arange(500)
    schedule = np.stack([view_of(epoch, samples, views) for epoch in range(views)])
    assert np.array_equal(np.sort(schedule, axis=0), np.broadcast_to(np.arange(views)[:, None], schedule.shape))
    if views > 1:  # Samples start at different views.
        assert np.bincount(schedule[0], minlength=views).min() > 500 / views / 2


def test_labels_are_dropped_at_the_asked_rate_and_differently_in_every_step():
    positions = np.arange(20_000)
    first, second = label_drop(0, 1, positions, 0.1), label_drop(0, 2, positions, 0.1)
    assert abs(first.mean() - 0.1) < 0.01
    assert abs((first & second).mean() - 0.01) < 0.003
    assert not label_drop(0, 1, positions, 0.0).any()
    assert label_drop(0, 1, positions, 1.0).all()


def test_branches_are_dropped_at_their_rates_independently_and_keep_the_mean():
    rates = [0.0, 0.1, 0.5, 1.0]
    multipliers = drop_path(0, 3, np.arange(20_000), rates)
    assert multipliers.shape == (4, 3, 20_000)
    assert multipliers.dtype == np.float32
    for block, rate in enumerate(rates):
        assert np.allclose((multipliers[block] == 0).mean(axis=1), rate, atol=0.012)
    assert np.allclose(multipliers[:3].mean(axis=2), 1.0, atol=0.03)
    assert set(np.unique(multipliers[2]).tolist()) == {0.0, 2.0}
    dropped = multipliers[2] == 0
    assert abs((dropped[0] & dropped[1]).mean() - 0.25) < 0.012


def test_drawn_numbers_do_not_depend_on_how_the_batch_is_sliced():
    whole = np.arange(96)
    rates = [0.2, 0.4]
    for part in (whole[:32], whole[32:33], whole[50:]):
        assert np.array_equal(label_drop(4, 9, part, 0.3), label_drop(4, 9, whole, 0.3)[part])
        assert np.array_equal(drop_path(4, 9, part, rates), drop_path(4, 9, whole, rates)[:, :, part])


def test_uniform_numbers_fill_the_unit_interval_evenly():
    numbers = uniform(1, "test", np.arange(200), np.arange(100)[:, None])
    assert numbers.shape == (100, 200)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # 19 degrees of freedom: one in a thousand.
