"""Running moments against those of all features at once."""

import numpy as np
import pytest
import torch

from mvar.errors import MvarError
from mvar.evaluation.moments import Gaussian, Moments


def _features(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 7


def test_blocks_of_any_size_give_numpys_mean_and_covariance() -> None:
    features = _features(3000)
    running = Moments(5)
    for block in features.split(170):
        running.add(block)
    mean, cov = running.gaussian()
    assert running.count == 3000
    np.testing.assert_allclose(mean, features.double().numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_parts_add_up_and_can_be_taken_out_again() -> None:
    first, second = _features(40, 1), _features(60, 2)
    both = Moments.of(first) + Moments.of(second)
    left = (both - Moments.of(first)).gaussian()
    for ours, expected in zip(left, Moments.of(second).gaussian(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (torch.zeros(2), torch.zeros(3, 3), "shape"),
        (torch.zeros(2), torch.full((2, 2), float("nan")), "not finite"),
        (torch.zeros(2), torch.zeros(2, 2), "same features"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
    ],
)
def test_what_is_no_mean_and_covariance_is_refused(mean: torch.Tensor, cov: torch.Tensor, message: str) -> None:
    with pytest.raises(MvarError, match=message):
        Gaussian(mean.double(), cov.double()).check("reference x")
