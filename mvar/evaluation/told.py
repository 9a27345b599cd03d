"""What is said of figures: how they were made, and where that differs from papers."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL
import torch

from mvar.evaluation.extractors import FeatureKind
from mvar.evaluation.features import Features
from mvar.evaluation.fidelity import NEIGHBOURS, ORDER_SEED
from mvar.evaluation.figures import MANIFOLD, Figure, parts_of
from mvar.evaluation.reference import IS_SPLITS, Reference
from mvar.version import __version__

PAPER_IMAGES = 50_000
PAPER_OPTIONS: Mapping[str, Any] = {
    "cfg": 1.5,
    "top_k": 900,
    "top_p": 0.96,
    "temperature": 1.0,
    "guidance": "ramp",
}
"""Those of the published figures (arXiv 2411.10433), without smoothing."""
NAMES = {
    "frechet": ("FD", 3),
    "spatial_frechet": ("sFID", 3),
    "kernel": ("KID", 5),
    "inception_score": ("IS", 2),
    "precision": ("precision", 4),
    "recall": ("recall", 4),
}


def frechet_name(identity: FeatureKind) -> str:
    """FID with Inception's features, and another name with any others."""
    if identity.inception:
        return "FID"
    return f"FD-{identity.name}" if identity.name == "efflite0" else "FD"


def keys(figures: Mapping[str, Figure], identity: FeatureKind) -> dict[str, float]:
    """Figures by the names that they have in JSON: `fid`, `fid_error`, `fid_floor`, ..."""
    flat: dict[str, float] = {}
    for name, figure in figures.items():
        key = short_key(name, identity)
        flat[key] = figure.value
        flat |= {} if figure.error is None else {f"{key}_error": figure.error}
        flat |= {} if figure.floor is None else {f"{key}_floor": figure.floor}
    return flat


def short_key(name: str, identity: FeatureKind) -> str:
    """Of a figure in JSON."""
    if name == "frechet":
        return frechet_name(identity).lower().replace("-", "_")
    if name == "inception_score" and not identity.inception:
        return "class_score"
    return {"spatial_frechet": "sfid", "kernel": "kid"}.get(name, name)


def caveats(
    samples: Features, reference: Reference, identity: FeatureKind, drawn: Mapping[str, Any] | None
) -> list[str]:
    """Everything that can be seen and that would make a figure another than the papers'."""
    lines = []
    count, labels_N = len(samples.features_NF), samples.labels_N
    if count != PAPER_IMAGES:
        lines.append(f"{count:,} samples, papers draw {PAPER_IMAGES:,}: Frechet distances are biased upward; read KID.")
    width = samples.features_NF.shape[1]
    if count <= width:
        lines.append(f"fewer samples than the {width:,} features: their covariance is singular. Read KID, not this.")
    if reference.images is not None and reference.images < PAPER_IMAGES:
        lines.append(f"the reference has {reference.images:,} images; papers' have 50,000 or more.")
    if reference.features_MF is not None and len(reference.features_MF) < MANIFOLD:
        lines.append(
            f"precision and recall look at {len(reference.features_MF):,} real images, papers at {MANIFOLD:,}."
        )
    if reference.size is None:
        lines.append("the reference does not say the size of its images: make sure that it is the samples'.")
    if reference.context.get("features") is None or reference.context.get("statistics") is not None:
        lines.append("the statistics do not say which network made them: make sure that it was the one of --features.")
    if reference.context.get("split") == "val":
        lines.append("compared with held-out images; papers compare with the training images.")
    if not identity.inception:
        lines.append(f"features of {identity.name}: comparable among runs with the same, not with papers' FID.")
    if labels_N is None:
        lines.append("the samples do not say their classes.")
    else:
        found, counts = np.unique(labels_N, return_counts=True)
        if counts.min() != counts.max():
            lines.append(f"classes have from {counts.min():,} to {counts.max():,} samples; papers draw equally many.")
        if reference.classes is not None and len(found) < reference.classes:
            lines.append(f"samples of {len(found):,} of the reference's {reference.classes:,} classes.")
    return lines + _of_drawing(drawn, count)


def _of_drawing(drawn: Mapping[str, Any] | None, count: int) -> list[str]:
    if drawn is None:
        return ["no record beside the samples (sample.json): what they were drawn with is not known."]
    lines = []
    told = {key: found_in(drawn, key) for key in PAPER_OPTIONS}
    differing = [
        f"{key} {value} (published {PAPER_OPTIONS[key]})"
        for key, value in told.items()
        if value is not None and value != PAPER_OPTIONS[key]
    ]
    if differing:
        lines.append(f"drawn with {', '.join(differing)}.")
    if found_in(drawn, "interval") is not None:
        lines.append(f"drawn with guidance in scales {found_in(drawn, 'interval')} alone (published: all).")
    if found_in(drawn, "smooth"):
        lines.append("drawn with smoothing, which makes figures worse.")
    wanted = _images_of(drawn)
    if wanted is not None and wanted != count:
        lines.append(f"{count:,} samples, but their record says {wanted:,}: some are missing, or from elsewhere.")
    return lines


def _images_of(drawn: Mapping[str, Any]) -> int | None:
    """How many samples a record speaks of."""
    counts = found_in(drawn, "counts")
    if isinstance(counts, Mapping) and all(isinstance(number, int) for number in counts.values()):
        return sum(counts.values())
    images = found_in(drawn, "images")
    return images if isinstance(images, int) else None


def found_in(tree: Mapping[str, Any], key: str) -> Any:
    """The value of a key at any depth of a record, or None."""
    if key in tree:
        return tree[key]
    inner = (found_in(child, key) for child in tree.values() if isinstance(child, Mapping))
    return next((found for found in inner if found is not None), None)


def _without_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the thousand names of its classes."""
    kept = {key: value for key, value in tree.items() if key not in ("classes", "counts")}
    return {key: _without_names(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def context_of(
    samples: Features,
    reference: Reference,
    identity: FeatureKind,
    drawn: Mapping[str, Any] | None,
    places: Mapping[str, Any],
    parts: int,
) -> dict[str, Any]:
    """How figures were made, for a record. `places`: paths, and what was left out."""
    labels_N = samples.labels_N
    counts = None if labels_N is None else np.unique(labels_N, return_counts=True)[1]
    return {
        "samples": len(samples.features_NF),
        "samples_classes": None if counts is None else len(counts),
        "samples_per_class": None if counts is None else [int(counts.min()), int(counts.max())],
        "samples_sha256": samples.sha256,
        "drawn_with": None if drawn is None else _without_names(drawn),
        "reference": reference.context,
        "reference_sha256": reference.sha256,
        "reference_features": None if reference.features_MF is None else len(reference.features_MF),
        "features": dataclasses.asdict(identity),
        "options": {
            "neighbours": NEIGHBOURS,
            "precision_recall_real_images": MANIFOLD,
            "kid": "unbiased, cubic kernel, over all pairs",
            "inception_score_splits": IS_SPLITS,
            "parts": parts_of(len(samples.features_NF), parts),
            "order_seed": ORDER_SEED,
        },
        "versions": {
            "mvar": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        **places,
    }


def screen(
    figures: Mapping[str, Figure], context: Mapping[str, Any], warnings: list[str], identity: FeatureKind
) -> str:
    """Everything that a reader has to know, on one screen."""
    lines = [f"{'':22}{'samples':>12}{'+-':>14}{'real images':>14}"]
    for name, figure in figures.items():
        title, digits = NAMES[name]
        title = frechet_name(identity) if name == "frechet" else title
        if name == "inception_score":  # Its spread over splits, as papers give it.
            title, factor = title if identity.inception else "class score", 1
        else:
            factor = 2
        spread = "" if figure.error is None else f"{factor * figure.error:.{digits}f}"
        floor = "-" if figure.floor is None else f"{figure.floor:.{digits}f}"
        lines.append(f"{title:22}{figure.value:>12.{digits}f}{spread:>14}{floor:>14}")
    reference, made_of = context["reference"], context["reference"]["made_of"]
    of = made_of if isinstance(made_of, str) else f"{made_of['source']} ({reference['split']})"
    floor_images = next((figure.floor_images for figure in figures.values() if figure.floor_images), None)
    per_class = context["samples_per_class"]
    classes = "classes unknown" if per_class is None else f"{context['samples_classes']:,} classes, "
    classes += "" if per_class is None else "-".join(f"{number:,}" for number in dict.fromkeys(per_class)) + " each"
    told = [
        (
            "samples",
            f"{context['samples']:,} of {_px(context['size_px'])}, {classes}; "
            f"sha256 {_short(context['samples_sha256'])}",
        ),
        ("drawn with", _drawn(context["drawn_with"])),
        ("reference", f"{of}: {_number(reference['images'])} images; sha256 {_short(context['reference_sha256'])}"),
        ("real images", _floor(floor_images, reference.get("floor_of"))),
        ("features", f"{identity.name} (mvar {__version__}, {identity.how}); sha256 {_short(identity.sha256)}"),
        (
            "how",
            f"KID unbiased over all pairs; precision, recall k={NEIGHBOURS}, {MANIFOLD:,} real images; +-: two "
            f"errors over {context['options']['parts']} parts, of IS the spread over {IS_SPLITS} splits",
        ),
    ]
    lines += [""] + [f"{name:12}{text}" for name, text in told]
    lines += [""] * bool(warnings) + [f"! {warning}" for warning in warnings]
    return "\n".join(lines)


def _drawn(drawn: Mapping[str, Any] | None) -> str:
    if drawn is None:
        return "not known"
    parts = [
        f"{key} {found_in(drawn, key)}" for key in ("cfg", "top_k", "top_p", "smooth", "seed", "precision", "step")
    ]
    parts = [part for part in parts if not part.endswith(" None")]
    parts += [f"{key} {_short(str(found_in(drawn, key)))}" for key in ("weights", "tokenizer") if found_in(drawn, key)]
    return ", ".join(parts)


def _floor(images: int | None, of: str | None) -> str:
    return "left out" if images is None else f"{images:,} in the samples' place ({of or 'half against half'})"


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"


def _short(digest: str) -> str:
    return digest[:12]


def _number(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"
