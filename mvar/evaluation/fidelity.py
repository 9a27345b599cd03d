"""Distances between two sets of images, from features of an extractor, in blocks of rows: memory is linear in images.

Everything is computed in float64, where the features lie. Libraries keep matrices of all pairs (20 GB for 50,000
images) or all features twice in float64; tests hold this module against plain definitions and against torch-fidelity.

Legend: N images of one set, M of the other, F features, K classes, P parts of a set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvar.evaluation.moments import Gaussian, Moments

NEIGHBOURS = 3
"""Neighbours that set the radius of a ball of `precision_recall`."""
ROWS, COLUMNS = 2048, 8192
"""A block of pairs: 128 MiB in float64."""
ORDER_SEED = 2020
"""The one that torch-fidelity mixes images with, so that splits are of the same images."""


def mixed(count: int) -> list[int]:
    """The one order in which images are cut into parts: samples come sorted by class, and parts must not be classes."""
    order: list[int] = np.random.RandomState(ORDER_SEED).permutation(count).tolist()
    return order


def part_bounds(count: int, parts: int) -> list[tuple[int, int]]:
    """[begin, end) of each of `parts` parts of a mixed set; each has at least one image where there are enough."""
    return [(part * count // parts, (part + 1) * count // parts) for part in range(parts)]


# --- Frechet distance ------------------------------------------------------------------------------------------------


class FrechetTo:
    """Frechet distance to one set of images (Heusel et al. 2017, eq. 6). Biased upward for few images."""

    def __init__(self, reference: Gaussian) -> None:
        self._reference = reference
        self._root_FF = _symmetric_root(reference.cov_FF)

    def __call__(self, other: Gaussian) -> float:
        mean_F, cov_FF = (value.to(self._root_FF.device) for value in other)
        # tr((A B)^(1/2)) through the symmetric product A^(1/2) B A^(1/2): real and stable, singular covariances too.
        cross = torch.linalg.eigvalsh(self._root_FF @ cov_FF @ self._root_FF).clamp(min=0).sqrt().sum()
        gap = (mean_F - self._reference.mean_F).square().sum()
        distance = gap + cov_FF.trace() + self._reference.cov_FF.trace() - 2 * cross
        return max(float(distance), 0.0)


def frechet_distance(a_NF: Tensor, b_MF: Tensor) -> float:
    """Frechet distance of two sets of features."""
    return FrechetTo(Moments.of(b_MF).gaussian())(Moments.of(a_NF).gaussian())


def _symmetric_root(matrix_FF: Tensor) -> Tensor:
    values_F, vectors_FF = torch.linalg.eigh(matrix_FF)
    root_FF: Tensor = (vectors_FF * values_F.clamp(min=0).sqrt()) @ vectors_FF.T
    return root_FF


# --- kernel distance -------------------------------------------------------------------------------------------------


def kernel_distance(a_NF: Tensor, b_MF: Tensor) -> float:
    """KID: unbiased squared MMD with the cubic polynomial kernel (Binkowski et al. 2018). Can be slightly negative."""
    return KernelSums.between(a_NF, b_MF, kernel_within(b_MF)).distance()


def kernel_within(features_NF: Tensor) -> float:
    """Mean of the kernel over all pairs of different images of one set."""
    count = len(features_NF)
    total = _kernel_sums(features_NF, features_NF, [(0, count)], [(0, count)]).sum()
    return float(total - _kernel_diagonal(features_NF).sum()) / (count * (count - 1))


class KernelSums(NamedTuple):
    """Sums of the kernel by parts of a set, from which its distance follows, also without one of the parts."""

    counts_P: Tensor
    within_PP: Tensor
    """Over pairs of different images of the set, by the parts of the two."""
    across_P: Tensor
    """Over pairs of an image of the part and one of the reference."""
    reference_count: int
    reference_within: float

    @classmethod
    def between(cls, a_NF: Tensor, b_MF: Tensor, b_within: float, parts: int = 1) -> KernelSums:
        """Of `a`, cut into parts as it lies, to `b`; `b_within`: see `kernel_within`."""
        bounds = part_bounds(len(a_NF), parts)
        within_PP = _kernel_sums(a_NF, a_NF, bounds, bounds)
        diagonal_N = _kernel_diagonal(a_NF)
        within_PP -= torch.diag(torch.stack([diagonal_N[begin:end].sum() for begin, end in bounds]))
        across_P = _kernel_sums(a_NF, b_MF, bounds, [(0, len(b_MF))])[:, 0]
        counts_P = torch.tensor([end - begin for begin, end in bounds], dtype=torch.float64, device=across_P.device)
        return cls(counts_P, within_PP, across_P, len(b_MF), b_within)

    def distance(self, without: int | None = None) -> float:
        """Of all, or of all but one part."""
        kept_P = torch.ones_like(self.counts_P)
        if without is not None:
            kept_P[without] = 0
        count = float(kept_P @ self.counts_P)
        within = float(kept_P @ self.within_PP @ kept_P) / (count * (count - 1))
        return within + self.reference_within - 2 * float(kept_P @ self.across_P) / (count * self.reference_count)


def _kernel_sums(
    a_NF: Tensor, b_MF: Tensor, a_bounds: Sequence[tuple[int, int]], b_bounds: Sequence[tuple[int, int]]
) -> Tensor:
    """Sums of the kernel over all pairs, by part of `a` and part of `b`. A set with itself is computed half."""
    alone, width = a_NF is b_MF, a_NF.shape[1]  # As float64 block by block: a copy of all would be twice the features.
    sums = torch.zeros(len(a_bounds), len(b_bounds), dtype=torch.float64, device=a_NF.device)
    for i, a_bound in enumerate(a_bounds):
        for j, b_bound in enumerate(b_bounds):
            if alone and j < i:
                sums[i, j] = sums[j, i]
                continue
            for begin, end in _blocks(a_bound, ROWS):
                rows_BF = a_NF[begin:end].double()
                for left, right in _blocks(b_bound, COLUMNS):
                    if alone and right <= begin and i == j:
                        continue  # Below the diagonal.
                    kernel = rows_BF @ b_MF[left:right].double().T
                    kernel = kernel.div_(width).add_(1).pow_(3)
                    if alone and i == j and right > begin:
                        sums[i, j] += _mirrored_sum(kernel, begin, end, left, right)
                    else:
                        sums[i, j] += kernel.sum()
    return sums


def _mirrored_sum(kernel: Tensor, begin: int, end: int, left: int, right: int) -> Tensor:
    """Of a block of a symmetric matrix of which only what is on and above the diagonal is summed, the rest counted."""
    if left >= end:
        return 2 * kernel.sum()
    rows = torch.arange(begin, end, device=kernel.device)[:, None]
    columns = torch.arange(left, right, device=kernel.device)[None]
    above = (columns > rows).to(kernel.dtype).mul_(2).add_((columns == rows).to(kernel.dtype))
    return (kernel * above).sum()


def _kernel_diagonal(a_NF: Tensor) -> Tensor:
    squares_N = torch.cat([block_BF.double().square().sum(dim=1) for block_BF in a_NF.split(COLUMNS)])
    return (squares_N / a_NF.shape[1] + 1) ** 3


def _blocks(bound: tuple[int, int], rows: int) -> Iterator[tuple[int, int]]:
    for begin in range(*bound, rows):
        yield begin, min(begin + rows, bound[1])


# --- precision and recall --------------------------------------------------------------------------------------------


class PrecisionRecall(NamedTuple):
    """Share of samples inside the real manifold, and of real images inside the samples' manifold.

    `inside_N`, `covered_M`: which they are; bool.
    """

    precision: float
    recall: float
    inside_N: Tensor
    covered_M: Tensor


def precision_recall(
    samples_NF: Tensor,
    real_MF: Tensor,
    neighbours: int = NEIGHBOURS,
    *,
    radius_N: Tensor | None = None,
    radius_M: Tensor | None = None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): manifolds are unions of k-nearest-neighbour balls.

    `radius_N`, `radius_M`: what `radii` gives of each set, where it is known.
    """
    radius_N = radii(samples_NF, neighbours) if radius_N is None else radius_N
    radius_M = radii(real_MF, neighbours) if radius_M is None else radius_M
    inside_N = torch.zeros(len(samples_NF), dtype=torch.bool, device=samples_NF.device)
    covered_M = torch.zeros(len(real_MF), dtype=torch.bool, device=real_MF.device)
    for begin, end in _blocks((0, len(samples_NF)), ROWS):
        rows_BF = samples_NF[begin:end].double()
        for left, right in _blocks((0, len(real_MF)), COLUMNS):
            distances = torch.cdist(rows_BF, real_MF[left:right].double())
            inside_N[begin:end] |= (distances <= radius_M[left:right]).any(dim=1)
            covered_M[left:right] |= (distances <= radius_N[begin:end, None]).any(dim=0)
    return PrecisionRecall(float(inside_N.double().mean()), float(covered_M.double().mean()), inside_N, covered_M)


def radii(features_NF: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Distance of each image to its k-th neighbour in its own set, which must have more than k images."""
    count, device = len(features_NF), features_NF.device
    nearest_Nk = torch.full((count, neighbours), math.inf, dtype=torch.float64, device=device)

    def see(rows: slice, distances: Tensor) -> None:
        few = distances.topk(min(neighbours, distances.shape[1]), dim=1, largest=False).values
        nearest_Nk[rows] = torch.cat([nearest_Nk[rows], few], dim=1).topk(neighbours, dim=1, largest=False).values

    for begin, end in _blocks((0, count), ROWS):
        rows_BF = features_NF[begin:end].double()
        for left, right in _blocks((begin, count), COLUMNS):  # From the diagonal on: a pair is looked at once.
            distances = torch.cdist(rows_BF, features_NF[left:right].double())
            if left == begin:
                distances[:, : end - begin].fill_diagonal_(math.inf)  # An image is no neighbour of itself.
            see(slice(begin, end), distances)
            later = max(left, end)
            if later < right:  # What lies behind these rows sees them too.
                see(slice(later, right), distances[:, later - left :].T)
    return nearest_Nk[:, -1]


# --- Inception score -------------------------------------------------------------------------------------------------


def inception_score(probabilities_NK: Tensor) -> float:
    """exp of the mean divergence of p(class | image) from p(class) (Salimans et al. 2016), over the whole set."""
    total, marginal_K = 0.0, torch.zeros(probabilities_NK.shape[1], dtype=torch.float64, device=probabilities_NK.device)
    for block_BK in probabilities_NK.split(COLUMNS):
        p_BK = block_BK.double()
        total += float(torch.xlogy(p_BK, p_BK).sum())
        marginal_K += p_BK.sum(dim=0)
    marginal_K /= len(probabilities_NK)
    return math.exp(total / len(probabilities_NK) - float(torch.xlogy(marginal_K, marginal_K).sum()))


def inception_scores(probabilities_NK: Tensor, splits: int) -> list[float]:
    """Of each of `splits` parts of a mixed set: papers give their mean and spread."""
    return [inception_score(probabilities_NK[begin:end]) for begin, end in part_bounds(len(probabilities_NK), splits)]


# --- how sure --------------------------------------------------------------------------------------------------------


def jackknife_error(left_out: Sequence[float]) -> float:
    """Standard error of a figure from what it is without each part of the images (delete-a-group jackknife)."""
    parts = len(left_out)
    mean = sum(left_out) / parts
    return math.sqrt((parts - 1) / parts * sum((value - mean) ** 2 for value in left_out))


def share_error(flags_N: Tensor, parts: int) -> float:
    """`jackknife_error` of a share, with what decides each image held fixed."""
    flags = flags_N.double()
    left_out = []
    for begin, end in part_bounds(len(flags), parts):
        kept = len(flags) - (end - begin)
        left_out.append(float(flags.sum() - flags[begin:end].sum()) / kept)
    return jackknife_error(left_out)
