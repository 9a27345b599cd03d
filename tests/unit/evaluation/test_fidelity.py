"""Distances against closed forms and against plain definitions."""

import pytest
import torch

from mvar.evaluation import fidelity
from mvar.evaluation.fidelity import (
    KernelSums,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_within,
    part_bounds,
    precision_recall,
    radii,
    share_error,
)


def _cloud(count: int, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def test_frechet_of_a_set_with_itself_is_zero() -> None:
    cloud = _cloud(50)
    assert frechet_distance(cloud, cloud) == pytest.approx(0, abs=1e-9)


def test_frechet_of_a_shifted_and_scaled_set_has_its_closed_form() -> None:
    cloud = _cloud(400)
    covariance = torch.cov(cloud.T)
    moved = cloud * 2 + 1
    mean_gap = (cloud.mean(0) * 2 + 1 - cloud.mean(0)).square().sum()
    # Covariances commute: tr(C + 4C - 2 * 2C) = tr C.
    assert frechet_distance(cloud, moved) == pytest.approx(float(mean_gap + covariance.trace()), rel=1e-9)


def test_frechet_works_with_fewer_images_than_features() -> None:
    assert frechet_distance(_cloud(4, seed=1), _cloud(4, seed=2)) > 0


def test_kernel_distance_equals_the_double_sum() -> None:
    a, b = _cloud(7, seed=1), _cloud(5, 0.5, seed=2)

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 6 + 1) ** 3)

    within_a = sum(k(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / 42
    within_b = sum(k(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(k(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-12)


def test_precision_falls_for_far_samples_and_recall_for_collapsed_ones() -> None:
    real = _cloud(200)
    near = precision_recall(_cloud(200, seed=3), real)
    far = precision_recall(_cloud(200, 50.0, seed=3), real)
    collapsed = precision_recall(_cloud(200, scale=1e-3, seed=3), real)
    assert near.precision > 0.7 and near.recall > 0.7
    assert far.precision == 0 and far.recall == 0
    assert collapsed.precision > 0.9 and collapsed.recall < 0.1


def test_class_score_is_the_number_of_classes_shown_with_certainty() -> None:
    assert inception_score(torch.eye(5).repeat(4, 1)) == pytest.approx(5, rel=1e-6)
    assert inception_score(torch.full((8, 5), 0.2)) == pytest.approx(1, rel=1e-6)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that sets of tens of images are cut into many, which do not divide them evenly."""
    monkeypatch.setattr(fidelity, "ROWS", 7)
    monkeypatch.setattr(fidelity, "COLUMNS", 11)


@pytest.mark.usefixtures("small_blocks")
def test_precision_and_recall_in_blocks_equal_the_definition_by_brute_force() -> None:
    samples, real = _cloud(100, 0.4, seed=1), _cloud(20, seed=2)  # Five times as many, as 50,000 to 10,000.

    def radii_of(cloud: torch.Tensor) -> list[float]:
        gaps = [[float((a - b).square().sum().sqrt()) for b in cloud] for a in cloud]
        return [sorted(own[:i] + own[i + 1 :])[2] for i, own in enumerate(gaps)]

    radius = {id(cloud): radii_of(cloud) for cloud in (samples, real)}

    def inside(point: torch.Tensor, cloud: torch.Tensor) -> bool:
        return any(float((point - a).square().sum().sqrt()) <= r for a, r in zip(cloud, radius[id(cloud)], strict=True))

    found = precision_recall(samples, real)
    expected_precision = sum(inside(point, real) for point in samples) / len(samples)
    expected_recall = sum(inside(point, samples) for point in real) / len(real)
    assert 0 < expected_precision < 1 and 0 < expected_recall <= 1
    assert (found.precision, found.recall) == (expected_precision, expected_recall)


@pytest.mark.usefixtures("small_blocks")
def test_kernel_distance_in_blocks_and_without_a_part_equals_the_direct_one() -> None:
    a, b = _cloud(53, seed=1), _cloud(31, 0.5, seed=2)

    def direct(a: torch.Tensor, b: torch.Tensor) -> float:
        k_aa, k_bb, k_ab = ((x @ y.T / 6 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
        within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb)]
        return float(within[0] + within[1] - 2 * k_ab.mean())

    sums = KernelSums.between(a, b, kernel_within(b), parts=4)
    assert sums.distance() == pytest.approx(direct(a, b), rel=1e-12)
    for part, (begin, end) in enumerate(part_bounds(53, 4)):
        kept = torch.cat([a[:begin], a[end:]])
        assert sums.distance(without=part) == pytest.approx(direct(kept, b), rel=1e-11)


def test_an_image_that_is_there_four_times_has_a_ball_of_no_size() -> None:
    cloud = torch.cat([_cloud(1, 3.0).repeat(4, 1), _cloud(9, seed=4)])
    assert radii(cloud)[:4].tolist() == [0, 0, 0, 0]
    assert (radii(cloud)[4:] > 0).all()


def test_the_error_over_parts_is_that_of_a_mean() -> None:
    flags = torch.rand(2000, generator=torch.Generator().manual_seed(5)) < 0.3
    by_hand = float((flags.double().view(10, 200).mean(dim=1)).std() / 10**0.5)
    assert share_error(flags, 10) == pytest.approx(by_hand, rel=1e-9)
    assert by_hand == pytest.approx((0.3 * 0.7 / 2000) ** 0.5, rel=0.5)
