"""Mean and covariance of features that come in blocks: running sums in float64, so memory does not grow with images.

Legend: B images of a block, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mvar.errors import MvarError

ROWS = 1024
"""Images that are added to the sums at once: a product of fewer is bound by memory."""
ASYMMETRY = 1e-6
"""Of a covariance's largest value, that rounding may explain; eigenvalues may be below zero by as much."""


class Gaussian(NamedTuple):
    """What a Frechet distance sees of a set of images; float64."""

    mean_F: Tensor
    cov_FF: Tensor

    def check(self, where: str) -> Gaussian:
        """Itself. Raises MvarError where it is no mean and covariance of anything."""
        mean_F, cov_FF = self
        problem = ""
        if mean_F.ndim != 1 or cov_FF.shape != (len(mean_F), len(mean_F)):
            problem = f"mean of shape {tuple(mean_F.shape)}, covariance of shape {tuple(cov_FF.shape)}"
        elif not bool(mean_F.isfinite().all() and cov_FF.isfinite().all()):
            problem = "values that are not finite"
        elif float(cov_FF.trace()) <= 0:
            problem = "a covariance of zero: all images have the same features"
        elif float((cov_FF - cov_FF.T).abs().max()) > ASYMMETRY * float(cov_FF.abs().max()):
            problem = "a covariance that is not symmetric"
        if problem:
            raise MvarError(f"{where}: no mean and covariance of features ({problem}). Make it anew.")
        return self


class Moments:
    """Number of images, sum of their features and of their products. Adding is associative up to float64's rounding."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sum_F = torch.zeros(width, dtype=torch.float64, device=device)
        self._products_FF = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []

    @classmethod
    def of(cls, features_NF: Tensor) -> Moments:
        """Of features that are all there."""
        made = cls(features_NF.shape[1], features_NF.device)
        for block_BF in features_NF.split(8 * ROWS):
            made._fold(block_BF)
        return made

    def add(self, features_BF: Tensor) -> None:
        """Count some images."""
        self._waiting.append(features_BF)
        if sum(map(len, self._waiting)) >= ROWS:
            self._flush()

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of all images so far; needs two."""
        self._flush()
        mean_F = self._sum_F / self.count
        cov_FF = (self._products_FF - self.count * torch.outer(mean_F, mean_F)) / (self.count - 1)
        return Gaussian(mean_F, cov_FF)

    @property
    def device(self) -> torch.device:
        return self._sum_F.device

    def __add__(self, other: Moments) -> Moments:
        return self._combined(other, 1)

    def __sub__(self, other: Moments) -> Moments:
        """What is left when images that were counted are taken out again."""
        return self._combined(other, -1)

    def _combined(self, other: Moments, sign: int) -> Moments:
        self._flush()
        other._flush()
        made = Moments(0)
        made.count = self.count + sign * other.count
        made._sum_F = self._sum_F + sign * other._sum_F
        made._products_FF = self._products_FF + sign * other._products_FF
        return made

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._fold(torch.cat(waiting))

    def _fold(self, features_BF: Tensor) -> None:
        rows_BF = features_BF.to(self._sum_F.device, torch.float64)
        self.count += len(rows_BF)
        self._sum_F += rows_BF.sum(dim=0)
        self._products_FF.addmm_(rows_BF.T, rows_BF)
