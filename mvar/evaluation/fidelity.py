"""Distances between two sets of images, from features of an extractor.

Legend: N images of one set, M of the other, F features, K classes. Everything is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3
"""Neighbours that set the radius of a ball of `precision_recall`."""


def frechet_distance(a_NF: Tensor, b_MF: Tensor) -> float:
    """Frechet distance of two feature sets seen as Gaussians (Heusel et al. 2017, eq. 6). Biased upward for small N."""
    mean_a_F, cov_a_FF = _moments(a_NF)
    mean_b_F, cov_b_FF = _moments(b_MF)
    # tr((A B)^(1/2)) through the symmetric product A^(1/2) B A^(1/2): real and stable, also for singular covariances.
    root_FF = _symmetric_root(cov_a_FF)
    cross = torch.linalg.eigvalsh(root_FF @ cov_b_FF @ root_FF).clamp(min=0).sqrt().sum()
    distance = (mean_a_F - mean_b_F).square().sum() + cov_a_FF.trace() + cov_b_FF.trace() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(a_NF: Tensor, b_MF: Tensor) -> float:
    """KID: unbiased squared MMD with the cubic polynomial kernel (Binkowski et al. 2018). Can be slightly negative."""
    a, b = a_NF.double(), b_MF.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(gram: Tensor) -> Tensor:
        return (gram.sum() - gram.diagonal().sum()) / (len(gram) * (len(gram) - 1))

    return float(off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean())


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of samples inside the real manifold, and of real images inside the samples' manifold."""

    precision: float
    recall: float


def precision_recall(samples_NF: Tensor, real_MF: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): manifolds are unions of k-nearest-neighbour balls."""
    samples, real = samples_NF.double(), real_MF.double()
    cross_NM = torch.cdist(samples, real)
    radius_samples_N = torch.cdist(samples, samples).kthvalue(neighbours + 1, dim=1).values
    radius_real_M = torch.cdist(real, real).kthvalue(neighbours + 1, dim=1).values
    precision = (cross_NM <= radius_real_M[None]).any(dim=1).double().mean()
    recall = (cross_NM <= radius_samples_N[:, None]).any(dim=0).double().mean()
    return PrecisionRecall(float(precision), float(recall))


def inception_score(probabilities_NK: Tensor) -> float:
    """exp of the mean divergence of p(class | image) from p(class) (Salimans et al. 2016), over the whole set."""
    p_NK = probabilities_NK.double().clamp(min=1e-12)
    marginal_K = p_NK.mean(dim=0)
    return float((p_NK * (p_NK.log() - marginal_K.log())).sum(dim=1).mean().exp())


def _moments(features_NF: Tensor) -> tuple[Tensor, Tensor]:
    features = features_NF.double()
    return features.mean(dim=0), torch.cov(features.T)


def _symmetric_root(matrix_FF: Tensor) -> Tensor:
    values_F, vectors_FF = torch.linalg.eigh(matrix_FF)
    root_FF: Tensor = (vectors_FF * values_F.clamp(min=0).sqrt()) @ vectors_FF.T
    return root_FF
