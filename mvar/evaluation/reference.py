"""What samples are compared with: statistics and features of real images, in one .npz that is complete or absent.

    mu, sigma, mu_s, sigma_s   mean and covariance of all images' features, and of spatial ones (names of ADM's files)
    features                   float32 (M, F), of some of the images, in mixed order: for KID, precision and recall
    floor                      float32, of other real images: what the real thing scores
    context                    JSON: which images, how they were read, which features, digests

Others' files are read too: ADM's reference batches (images in arr_0, statistics, or both), statistics alone.

Legend: M real images, F features.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvar.errors import MvarError, WriteError
from mvar.evaluation.extractors import Extractor
from mvar.evaluation.features import Features, extract, total
from mvar.evaluation.fidelity import inception_scores
from mvar.evaluation.moments import Gaussian
from mvar.evaluation.pictures import IMAGES, NpzPictures, SkipBad
from mvar.evaluation.real import RealImages
from mvar.files.disk import sha256_of, writing
from mvar.log import log

FORMAT = "mvar-reference"
FORMAT_VERSION = 1
KEPT = 50_000
"""Images whose features are kept, and those of the floor: as many as papers draw."""
IS_SPLITS = 10
GIVEN = "given with the images"
"""Where statistics are not of the images whose features are there."""


@dataclass(frozen=True)
class Reference:
    """Real images, as figures need them; tensors on the CPU."""

    gaussian: Gaussian
    spatial: Gaussian | None
    features_MF: Tensor | None
    floor_NF: Tensor | None
    context: dict[str, Any]
    sha256: str
    """Of its file, or of what it was made of."""

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width, where known."""
        size = self.context.get("size_px")
        return None if size is None else (int(size[0]), int(size[1]))

    @property
    def images(self) -> int | None:
        """How many the statistics are of."""
        return self.context.get("images")

    @property
    def classes(self) -> int | None:
        return self.context.get("classes")

    def require_like(self, extractor: Extractor, size: tuple[int, int], where: str) -> None:
        """Raises MvarError where samples of this size and these features cannot be compared with it."""
        theirs, ours = self.context.get("features"), dataclasses.asdict(extractor.identity)
        if theirs is not None and theirs["sha256"] != ours["sha256"]:
            raise MvarError(
                f"{where}: statistics of other features ({theirs['name']}, sha256 {theirs['sha256'][:12]}), --features "
                f"has {ours['name']}, sha256 {ours['sha256'][:12]}. Give that file, or make the reference anew."
            )
        if self.size is not None and self.size != size:
            raise MvarError(
                f"{where}: made of images of {self.size[0]} x {self.size[1]} px, the samples have {size[0]} x {size[1]}"
                ". A resize changes figures: make a reference of this size (mvar reference --size or --store)."
            )

    def require_width(self, width: int, spatial: int | None, where: str) -> None:
        """Raises MvarError where its statistics are of vectors of another length."""
        for what, ours, own in (("features", width, self.gaussian), ("spatial features", spatial, self.spatial)):
            if own is not None and ours is not None and len(own.mean_F) != ours:
                raise MvarError(
                    f"{where}: statistics of {len(own.mean_F)} {what}, --features gives {ours}: statistics of other "
                    "features. Give the file of the network that made the statistics, or make the reference anew."
                )

    def write(self, path: Path) -> None:
        """Raises WriteError."""
        arrays = {"mu": self.gaussian.mean_F, "sigma": self.gaussian.cov_FF}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean_F, "sigma_s": self.spatial.cov_FF}
        arrays |= {} if self.features_MF is None else {"features": self.features_MF}
        arrays |= {} if self.floor_NF is None else {"floor": self.floor_NF}
        with writing(path) as file:
            plain: dict[str, Any] = {name: value.cpu().numpy() for name, value in arrays.items()}
            np.savez(file, context=np.array(json.dumps(self.context)), **plain)


def make_reference(
    real: RealImages,
    extractor: Extractor,
    split: str,
    *,
    count: int | None,
    keep: int = KEPT,
    batch: int,
    bad: SkipBad,
    spatial: bool = True,
    floor: bool = True,
) -> Reference:
    """Of the images of a split; `floor`: of the other split, if it has any. Raises MvarError."""
    found = extract(real.pictures(split, count, bad), extractor, batch=batch, keep=keep, spatial=spatial)
    other = "val" if split == "train" else "train"
    others: Features | None = None
    if floor and keep and real.pick(other, keep):
        others = extract(real.pictures(other, keep, bad), extractor, batch=batch, spatial=False, classes=True)
    context: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "images": found.moments.count,
        "split": split,
        "size_px": [real.size, real.size],
        "classes": len(np.unique(found.labels_N)) if found.labels_N is not None else None,
        "pixels_sha256": found.sha256,
        "features": dataclasses.asdict(extractor.identity),
        "made_of": real.describe(),
        "left_out": bad.left_out,
        "floor_of": None if others is None else f"{len(others.features_NF)} images of {other}",
    }
    if others is not None and others.probabilities_NK is not None and len(others.probabilities_NK) >= IS_SPLITS:
        context["inception_score"] = float(np.mean(inception_scores(others.probabilities_NK, IS_SPLITS)))
    return _of(found, None if others is None else others.features_NF, context, found.sha256)


def read_reference(path: Path, extractor: Extractor, *, batch: int) -> Reference:
    """Ours, or another's .npz of images or statistics. Features of its images are kept beside it. Raises MvarError."""
    where = f"reference {path}"
    if path.suffix != ".npz":
        raise MvarError(f"{where}: expected an .npz, as `mvar reference` or the ADM evaluation suite writes it.")
    arrays = _arrays(path, where)
    sha256 = sha256_of(path)
    if "context" in arrays:
        return _ours(path, arrays, sha256, where)
    gaussian = _gaussian(arrays, "mu", "sigma", where)
    spatial = _gaussian(arrays, "mu_s", "sigma_s", where)
    if not _has_images(path):
        if gaussian is None:
            raise MvarError(f"{where}: holds neither images ({IMAGES}) nor statistics (mu, sigma).")
        context = {"images": None, "classes": None, "size_px": None, "made_of": str(path), "features": None}
        log.warning("%s: holds statistics alone, so KID, precision, recall and the floor are left out.", where)
        return Reference(gaussian, spatial, None, None, context, sha256)
    own = _features_of(path, extractor, sha256, batch)
    if gaussian is None:
        return own
    # Statistics of more images than it holds: ADM's are of the whole training set, its images are 10,000 of these.
    context = own.context | {"images": None, "statistics": GIVEN}
    return dataclasses.replace(own, gaussian=gaussian, spatial=spatial or own.spatial, context=context)


def _features_of(path: Path, extractor: Extractor, sha256: str, batch: int) -> Reference:
    """Statistics and features of the images in an .npz, from beside it if they are there."""
    identity = dataclasses.asdict(extractor.identity)
    kept = path.with_name(f"{path.stem}.{identity['sha256'][:12]}.features.npz")
    if kept.exists():
        try:
            found = _ours(kept, _arrays(kept, f"features {kept}"), sha256, f"features {kept}")
            if (found.context["file_sha256"], found.context["features"]["sha256"]) == (sha256, identity["sha256"]):
                log.info("features of %s: read from %s", path, kept)
                return found
            log.warning("%s: of another file than %s has become; made anew.", kept, path)
        except (MvarError, KeyError, TypeError) as error:
            log.warning("%s; made anew.", error)
    pictures = NpzPictures(path, f"reference {path}")
    features = extract(pictures, extractor, batch=batch)
    context: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "images": len(pictures),
        "size_px": list(pictures.size),
        "classes": None if pictures.labels_N is None else len(np.unique(pictures.labels_N)),
        "pixels_sha256": features.sha256,
        "features": identity,
        "made_of": str(path),
        "file_sha256": sha256,
        "floor_of": None,
    }
    made = _of(features, None, context, sha256)
    try:
        made.write(kept)
        log.info("features of %s: kept in %s", path, kept)
    except WriteError as error:
        log.warning("%s These features are not kept.", error)
    return made


def _of(found: Features, floor_NF: Tensor | None, context: dict[str, Any], sha256: str) -> Reference:
    where = f"reference {context['made_of'] if isinstance(context['made_of'], str) else context['made_of']['source']}"
    if found.moments.count < 2:
        raise MvarError(f"{where}: {found.moments.count} image has no covariance. Give more.")
    spatial = None if found.spatial_P is None else total(found.spatial_P).gaussian().check(where)
    gaussian = found.moments.gaussian().check(where)
    return Reference(
        gaussian, spatial, found.features_NF if len(found.features_NF) else None, floor_NF, context, sha256
    )


def _ours(path: Path, arrays: dict[str, Any], sha256: str, where: str) -> Reference:
    try:
        context: dict[str, Any] = json.loads(str(arrays["context"]))
        if context["format"] != FORMAT or context["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {context['format']} {context['format_version']}")
        gaussian, spatial = _gaussian(arrays, "mu", "sigma", where), _gaussian(arrays, "mu_s", "sigma_s", where)
        kept = [torch.from_numpy(arrays[name]) if name in arrays else None for name in ("features", "floor")]
    except (ValueError, KeyError, TypeError) as error:
        raise MvarError(f"{where}: damaged, or of another version ({error}). Make it anew: mvar reference.") from None
    if gaussian is None:
        raise MvarError(f"{where}: damaged (no mu and sigma). Make it anew: mvar reference.")
    for features in kept:
        if features is not None and not bool(features.isfinite().all()):
            raise MvarError(f"{where}: features that are not finite numbers. Make it anew: mvar reference.")
    return Reference(gaussian, spatial, kept[0], kept[1], context, sha256)


def _gaussian(arrays: dict[str, Any], mean: str, cov: str, where: str) -> Gaussian | None:
    if (mean in arrays) != (cov in arrays):
        raise MvarError(f"{where}: has one of {mean} and {cov}, but not the other. Make it anew.")
    if mean not in arrays:
        return None
    found = (np.asarray(arrays[name]) for name in (mean, cov))
    try:
        mean_F, cov_FF = (torch.from_numpy(array.astype(np.float64)) for array in found)
    except (TypeError, ValueError) as error:
        raise MvarError(f"{where}: {mean} and {cov} are no numbers ({error}). Make it anew.") from None
    return Gaussian(mean_F, cov_FF).check(where)


def _arrays(path: Path, where: str) -> dict[str, Any]:
    """Everything in an .npz but images. Members' checksums are compared. Raises MvarError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name not in (IMAGES, "arr_1")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise MvarError(f"{where}: cannot be read as an .npz ({error}). Copy it again, or make it anew.") from None


def _has_images(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return f"{IMAGES}.npy" in archive.namelist()
