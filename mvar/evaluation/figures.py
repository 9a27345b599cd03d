"""All figures of samples against a reference: each with its error over parts of the samples, and with the floor.

The floor is what real images score in the samples' place: other real images, as many as there are samples (or all that
there are); where a reference has no others, one half of its images against the other.

Legend: N samples, M real images, F features, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvar.errors import MvarError
from mvar.evaluation.extractors import Extractor
from mvar.evaluation.features import Features, extract, total
from mvar.evaluation.fidelity import (
    NEIGHBOURS,
    FrechetTo,
    KernelSums,
    inception_scores,
    jackknife_error,
    kernel_within,
    part_bounds,
    precision_recall,
    radii,
    share_error,
)
from mvar.evaluation.moments import Gaussian, Moments
from mvar.evaluation.pictures import PictureSet
from mvar.evaluation.reference import GIVEN, IS_SPLITS, Reference
from mvar.log import log

PARTS = 10
MANIFOLD = 10_000
"""Real images of precision and recall, as the ADM evaluation suite takes."""


@dataclass(frozen=True)
class Figure:
    """`error`: one standard error, from the figure without each part of the samples in turn (None: too few)."""

    value: float
    error: float | None = None
    floor: float | None = None
    floor_images: int | None = None


class Distances(NamedTuple):
    """Of one set of images to the real ones."""

    frechet: Figure
    kernel: Figure | None
    precision: Figure | None
    recall: Figure | None


class Yardstick:
    """A reference on the device, with what all sets that are compared with it share."""

    def __init__(self, gaussian: Gaussian | None, features_MF: Tensor | None, device: torch.device) -> None:
        self._device = device
        self._features_MF = None if features_MF is None else features_MF.to(device)
        if gaussian is None:
            assert self._features_MF is not None
            gaussian = Moments.of(self._features_MF).gaussian()
        self._frechet = FrechetTo(Gaussian(*(value.to(device) for value in gaussian)))
        self._within = self._manifold_MF = self._radius_M = None
        if self._features_MF is not None:
            self._within = kernel_within(self._features_MF)
            self._manifold_MF = self._features_MF[:MANIFOLD]
            self._radius_M = radii(self._manifold_MF)

    def measure(self, features_NF: Tensor, parts: int, where: str) -> Distances:
        """Raises MvarError where the features have no spread at all."""
        features_NF = features_NF.to(self._device)
        bounds = part_bounds(len(features_NF), parts)
        moments_P = [Moments.of(features_NF[begin:end]) for begin, end in bounds]
        frechet = _with_error(self._frechet, moments_P, where)
        if self._features_MF is None:
            return Distances(frechet, None, None, None)
        assert self._within is not None and self._manifold_MF is not None
        sums = KernelSums.between(features_NF, self._features_MF, self._within, parts)
        found = precision_recall(features_NF, self._manifold_MF, radius_M=self._radius_M)
        kernel, precision, recall = sums.distance(), found.precision, found.recall
        if parts == 1:
            return Distances(frechet, Figure(kernel), Figure(precision), Figure(recall))
        return Distances(
            frechet,
            Figure(kernel, jackknife_error([sums.distance(without=part) for part in range(parts)])),
            Figure(precision, share_error(found.inside_N, parts)),
            Figure(recall, share_error(found.covered_M, parts)),
        )

    def frechet(self, features_NF: Tensor) -> float:
        """The Frechet distance alone."""
        return self._frechet(Moments.of(features_NF.to(self._device)).gaussian())


def measure(
    pictures: PictureSet,
    extractor: Extractor,
    reference: Reference,
    named: str,
    device: torch.device,
    *,
    batch: int,
    parts: int = PARTS,
    floor: bool = True,
) -> tuple[Features, dict[str, Figure]]:
    """One pass over the pictures, `batch` in the network at once, and `all_figures` of what it gave.

    `named`: what the reference is called in errors. Raises MvarError where it does not fit, before and after the pass,
    and what `extract` and `all_figures` raise.
    """
    reference.require_like(extractor, pictures.size, named)
    samples = extract(pictures, extractor, batch=batch, parts=PARTS, classes=True)
    spatial = None if samples.spatial_P is None else len(samples.spatial_P[0].gaussian().mean_F)
    reference.require_width(samples.features_NF.shape[1], spatial, named)
    return samples, all_figures(samples, reference, device, pictures.where, parts=parts, floor=floor)


def all_figures(
    samples: Features, reference: Reference, device: torch.device, where: str, *, parts: int = PARTS, floor: bool = True
) -> dict[str, Figure]:
    """By key: frechet, spatial_frechet, kernel, inception_score, precision, recall; those that there can be.

    Raises MvarError: fewer images than neighbours, features without spread.
    """
    count = len(samples.features_NF)
    for what, images in ((where, count), ("the reference", _count(reference.features_MF))):
        if images is not None and images <= NEIGHBOURS:
            raise MvarError(
                f"{what}: {images} images; precision and recall look at {NEIGHBOURS} neighbours of each, so more are "
                "needed, and figures worth reading need thousands. Give more."
            )
    parts = parts_of(count, parts)
    log.info("distances of %s samples", f"{count:,}")
    yardstick = Yardstick(reference.gaussian, reference.features_MF, device)
    found = yardstick.measure(samples.features_NF, parts, where)
    figures: dict[str, Figure | None] = {"frechet": found.frechet}
    if samples.spatial_P is not None and reference.spatial is not None:
        to_spatial = FrechetTo(Gaussian(*(value.to(samples.spatial_P[0].device) for value in reference.spatial)))
        figures["spatial_frechet"] = _with_error(to_spatial, samples.spatial_P, where)
    figures["kernel"] = found.kernel
    if samples.probabilities_NK is not None and count >= IS_SPLITS:
        scores = inception_scores(samples.probabilities_NK, IS_SPLITS)
        # Its spread over splits, as papers give it: not the error of the mean.
        real = reference.context.get("inception_score")
        figures["inception_score"] = Figure(float(np.mean(scores)), float(np.std(scores)), real)
    figures |= {"precision": found.precision, "recall": found.recall}
    if floor and reference.features_MF is not None:
        log.info("the floor: real images in the samples' place")
        _add_floor(figures, reference, yardstick, count, device)
    return {name: figure for name, figure in figures.items() if figure is not None}


def parts_of(count: int, parts: int) -> int:
    """Into how many parts so many samples are cut: two images at least in each."""
    return max(1, min(parts, count // 2))


def _add_floor(
    figures: dict[str, Figure | None], reference: Reference, yardstick: Yardstick, count: int, device: torch.device
) -> None:
    """Write what real images score beside each figure."""
    features_MF, others_NF = reference.features_MF, reference.floor_NF
    assert features_MF is not None
    if others_NF is None or len(others_NF) <= NEIGHBOURS:
        half = len(features_MF) // 2
        if half <= NEIGHBOURS:
            return
        others_NF = features_MF[half:]
        floor = Yardstick(None, features_MF[:half], device)
        if reference.context.get("statistics") == GIVEN:  # Its images against the statistics of all.
            _set_floor(figures, "frechet", yardstick.frechet(features_MF[:count]), min(count, len(features_MF)))
    else:
        floor = yardstick
    others_NF = others_NF[:count]
    found = floor.measure(others_NF, 1, "the floor")
    for name in ("frechet", "kernel", "precision", "recall"):
        own_figure: Figure | None = getattr(found, name)
        present = figures.get(name)
        if own_figure is not None and present is not None and present.floor is None:
            _set_floor(figures, name, own_figure.value, len(others_NF))


def _set_floor(figures: dict[str, Figure | None], name: str, value: float, images: int) -> None:
    figure = figures[name]
    assert figure is not None
    figures[name] = replace(figure, floor=value, floor_images=images)


def _with_error(frechet: Callable[[Gaussian], float], moments_P: Sequence[Moments], where: str) -> Figure:
    whole = total(moments_P)
    value = frechet(whole.gaussian().check(where))
    if len(moments_P) == 1:
        return Figure(value)
    return Figure(value, jackknife_error([frechet((whole - part).gaussian()) for part in moments_P]))


def _count(features: Tensor | None) -> int | None:
    return None if features is None else len(features)
