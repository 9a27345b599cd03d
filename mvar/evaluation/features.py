"""Features of a set of pictures: one pass over the pictures, in which everything that figures need is collected.

Legend: N pictures, B of a block, F features, S spatial features, K classes, P parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvar.errors import MvarError
from mvar.evaluation.extractors import Extractor
from mvar.evaluation.fidelity import mixed, part_bounds
from mvar.evaluation.moments import Moments
from mvar.evaluation.pictures import I64, PictureSet, digest_of
from mvar.run.progress import ProgressLine


@dataclass
class Features:
    """What an extractor gives of a set of pictures. Rows are in the mixed order, so that parts are not classes."""

    features_NF: Tensor
    """float32, on the CPU; of the kept pictures."""
    moments: Moments
    """Of all pictures."""
    spatial_P: list[Moments] | None
    """Of spatial features, by parts of the pictures."""
    probabilities_NK: Tensor | None
    labels_N: I64 | None
    """Of all pictures, in their own order."""
    sha256: str
    """Of all pixels, in order."""


def extract(
    pictures: PictureSet,
    extractor: Extractor,
    *,
    batch: int,
    keep: int | None = None,
    parts: int = 1,
    spatial: bool = True,
    classes: bool = False,
) -> Features:
    """Everything in one pass. `keep`: how many pictures' features are kept, of all evenly; None: all.

    `parts`: into how many parts spatial moments are divided; `spatial`, `classes`: whether these are wanted, where the
    extractor has them. Raises ImageError, and MvarError where features are not finite.
    """
    count, digest = len(pictures), hashlib.sha256()
    part_of_N = np.empty(count, dtype=np.int64)
    for part, (begin, end) in enumerate(part_bounds(count, parts)):
        part_of_N[mixed(count)[begin:end]] = part
    kept_N = np.zeros(count, dtype=bool)
    kept_N[mixed(count)[: count if keep is None else keep]] = True
    all_kept = bool(kept_N.all())
    rows: list[Tensor] = []
    probabilities: list[Tensor] = []
    moments: Moments | None = None
    spatial_P: list[Moments] | None = None
    progress = ProgressLine(pictures.where, count, "pictures")
    for block_BHWC in digest_of(pictures.blocks(batch), digest):
        found = extractor(torch.from_numpy(block_BHWC), classes=classes)
        _require_finite(found.features_BF, pictures.where, extractor.name, progress.done)
        own = slice(progress.done, progress.done + len(block_BHWC))
        if moments is None:
            moments = Moments(found.features_BF.shape[1], found.features_BF.device)
        if not all_kept:
            moments.add(found.features_BF)
        rows.append(found.features_BF[torch.from_numpy(kept_N[own])].float().cpu())
        if found.probabilities_BK is not None:
            probabilities.append(found.probabilities_BK.float().cpu())
        if spatial and found.spatial_BS is not None:
            if spatial_P is None:
                spatial_P = [Moments(found.spatial_BS.shape[1], found.spatial_BS.device) for _ in range(parts)]
            for part in np.unique(part_of_N[own]):
                spatial_P[part].add(found.spatial_BS[torch.from_numpy(part_of_N[own] == part)])
        progress.add(len(block_BHWC))
    assert moments is not None, "a set of pictures is not empty"
    features_NF = torch.cat(rows)
    rows.clear()
    order = mixed(len(features_NF))
    features_NF = features_NF[order]
    if all_kept:
        moments = Moments.of(features_NF)  # Faster than block by block.
    found_NK = torch.cat(probabilities)[mixed(progress.done)] if probabilities else None
    return Features(features_NF, moments, spatial_P, found_NK, pictures.labels_N, digest.hexdigest())


def total(parts: Sequence[Moments]) -> Moments:
    """Of all parts together."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def _require_finite(features_BF: Tensor, where: str, extractor: str, done: int) -> None:
    finite_B = features_BF.isfinite().all(dim=1)
    if not bool(finite_B.all()):
        number = done + int((~finite_B).nonzero()[0])
        raise MvarError(
            f"{where}: features of picture {number} are not finite numbers ({extractor}). The features file is damaged "
            "or overflows: give another --features file."
        )
