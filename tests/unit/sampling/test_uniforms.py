"""Numbers for tokens."""

import numpy as np
import pytest
import torch

from mvar import randomness
from mvar.sampling import uniforms
from mvar.sampling.uniforms import token_uniforms, vocabulary_uniforms


def test_uniform_numbers_are_spread_independent_and_stable() -> None:
    seeds = torch.tensor([0, 1, -5, 2**63 - 1])
    numbers = token_uniforms(seeds, 3, 5000)
    assert bool(((numbers > 0) & (numbers < 1)).all())
    assert (numbers.mean(1) - 0.5).abs().max() < 0.02
    assert (numbers.std(1) - 12**-0.5).abs().max() < 0.01
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.05
    assert not torch.equal(numbers, token_uniforms(seeds, 4, 5000))
    entries = vocabulary_uniforms(seeds, 3, 10, 500)
    assert bool(((entries > 0) & (entries < 1)).all())
    assert (entries.mean((1, 2)) - 0.5).abs().max() < 0.02


def test_uniform_numbers_equal_their_definition_in_whole_numbers() -> None:
    """Every version and device must reproduce them: the same seed means the same image."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    for seed in (42, -7):
        by_token = [mixed(mixed(mixed(mixed(seed % 2**64) ^ 1) ^ 9) ^ token) for token in range(3)]
        found = token_uniforms(torch.tensor([seed]), 9, 3)[0].tolist()
        assert found == [((number >> 32) + 0.5) / 2**32 for number in by_token]
        by_word = [mixed(mixed(mixed(mixed(mixed(seed % 2**64) ^ 2) ^ 9) ^ 0) ^ word) for word in range(3)]
        found = vocabulary_uniforms(torch.tensor([seed]), 9, 1, 3)[0, 0].tolist()
        assert found == [((number >> 41) + 0.5) / 2**23 for number in by_word]
    assert token_uniforms(torch.tensor([42]), 9, 1).item() == pytest.approx(0.024954182445071638, abs=1e-15)


def test_torch_and_numpy_mix_alike() -> None:
    """One SplitMix64 for the order of data (numpy) and for samples (torch, whose integers have a sign)."""
    counters = np.array([0, 1, 2, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15], dtype=np.uint64)
    by_torch = uniforms._mixed(torch.from_numpy(counters.view(np.int64)))
    by_numpy = randomness._mix(counters + np.uint64(randomness.GOLDEN))
    assert np.array_equal(by_torch.numpy().view(np.uint64), by_numpy)
