"""Distances against closed forms and against plain definitions."""

import pytest
import torch

from mvar.evaluation.fidelity import frechet_distance, inception_score, kernel_distance, precision_recall


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
