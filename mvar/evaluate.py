"""`mvar evaluate`: how good are samples, next to real images.

Prints a classifier's accuracy on samples and on held-out real images, Frechet and kernel distance between samples and
held-out images with the floor beside them (as many real training images against the same held-out ones), precision
and recall. The classifier is trained here on the real training images, or read from a file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from mvar.cli import run_command
from mvar.errors import ImageError, MvarError
from mvar.evaluation.classifier import Classifier, fit, judge, load_classifier, save_classifier
from mvar.evaluation.fidelity import NEIGHBOURS, frechet_distance, inception_score, kernel_distance, precision_recall
from mvar.files.disk import write_text
from mvar.images.arrays import Bytes
from mvar.images.pixels import Orientation, Rules
from mvar.images.sources import ImageFolder, say_notes
from mvar.images.views import RESIZE, centre_view
from mvar.log import log
from mvar.sampling.job import CLASSES, RECORD


@dataclass(frozen=True)
class LabelledImages:
    """uint8 (N, size, size, 3) and int64 (N,)."""

    images_NHWC: Bytes
    labels_N: Tensor


def read_split(folder: ImageFolder, split: str, size: int, resize: float) -> LabelledImages:
    """The centre view of every image of a split (resize: see mvar.images.views)."""
    items = folder.splits[split]
    if not items:
        raise ImageError(f"images {folder.root}: nothing is held out. Set --val-fraction, or add a val/ folder.")
    views = [centre_view(folder.reader(item.path), size, resize) for item in items]
    return LabelledImages(np.stack(views), torch.tensor([item.label for item in items]))


def read_samples(path: Path, size: int) -> LabelledImages:
    """Samples as `mvar sample` writes them: sub-folders named by class number. Raises ImageError."""
    folder = ImageFolder(path)
    if not all(name.isdigit() for name in folder.classes):
        raise ImageError(
            f"samples {path}: sub-folders must be class numbers, got {list(folder.classes[:5])}. Point --samples at"
            " the folder that `mvar sample --out` wrote."
        )
    found = read_split(folder, "train", size, resize=1.0)
    numbers = torch.tensor([int(name) for name in folder.classes])
    return LabelledImages(found.images_NHWC, numbers[found.labels_N])


def differing_names(samples: Path, classes: Sequence[str]) -> list[str]:
    """A line if classes of one number were called otherwise where the samples were drawn, as far as that is known."""
    try:
        drawn = json.loads((samples / RECORD).read_text())[CLASSES]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    pairs = enumerate(zip(drawn, classes, strict=False))
    differing = [(label, ours, theirs) for label, (ours, theirs) in pairs if ours not in (theirs, str(label))]
    if not differing:
        return []
    label, ours, theirs = differing[0]
    return [
        f"--samples {samples}: {len(differing)} classes were called otherwise where they were drawn: class number "
        f"{label} was {ours!r}, and is {theirs!r} in the images. Figures compare classes of one number."
    ]


def compare(
    classifier: Classifier, samples: LabelledImages, train: LabelledImages, val: LabelledImages
) -> dict[str, float]:
    """All figures. The floor uses as many training images as there are samples, evenly spaced over the folder."""
    chosen = np.linspace(0, len(train.labels_N) - 1, min(len(samples.labels_N), len(train.labels_N))).astype(np.int64)
    probabilities_NK, samples_NF = judge(classifier, samples.images_NHWC)
    real_probabilities_MK, val_MF = judge(classifier, val.images_NHWC)
    _, floor_NF = judge(classifier, train.images_NHWC[chosen])
    overlap = precision_recall(samples_NF, val_MF)
    floor_overlap = precision_recall(floor_NF, val_MF)
    return {
        "classifier_accuracy_samples": _accuracy(probabilities_NK, samples.labels_N),
        "classifier_accuracy_real": _accuracy(real_probabilities_MK, val.labels_N),
        "frechet_samples": frechet_distance(samples_NF, val_MF),
        "frechet_floor": frechet_distance(floor_NF, val_MF),
        "kernel_samples": kernel_distance(samples_NF, val_MF),
        "kernel_floor": kernel_distance(floor_NF, val_MF),
        "precision_samples": overlap.precision,
        "precision_floor": floor_overlap.precision,
        "recall_samples": overlap.recall,
        "recall_floor": floor_overlap.recall,
        "class_score_samples": inception_score(probabilities_NK),
        "class_score_real": inception_score(real_probabilities_MK),
        "samples": float(len(samples.labels_N)),
        "held_out": float(len(val.labels_N)),
    }


def _accuracy(probabilities_NK: Tensor, labels_N: Tensor) -> float:
    return float((probabilities_NK.argmax(dim=1) == labels_N).double().mean())


def table(figures: dict[str, float]) -> str:
    """The figures for people: samples in one column, real images in the other."""
    rows = [
        ("classifier accuracy", "classifier_accuracy_samples", "classifier_accuracy_real", "{:.1%}"),
        ("Frechet distance", "frechet_samples", "frechet_floor", "{:.3f}"),
        ("kernel distance", "kernel_samples", "kernel_floor", "{:.4f}"),
        ("precision", "precision_samples", "precision_floor", "{:.3f}"),
        ("recall", "recall_samples", "recall_floor", "{:.3f}"),
        ("class score", "class_score_samples", "class_score_real", "{:.2f}"),
    ]
    lines = [f"{'':22}{'samples':>10}{'real':>10}"]
    lines += [f"{name:22}{form.format(figures[a]):>10}{form.format(figures[b]):>10}" for name, a, b, form in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=Path, required=True, help="folder written by `mvar sample --out`")
    parser.add_argument("--images", type=Path, required=True, help="class folders of the real images")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="share held out where there is no val/ folder (default 0.1)"
    )
    parser.add_argument(
        "--resize", type=float, default=RESIZE, help=f"shorter side before the crop, in sizes (default {RESIZE})"
    )
    parser.add_argument(
        "--orientation",
        choices=get_args(Orientation),
        default="stored",
        help="exif: turn real images as their EXIF data say, if the store was made so (default stored)",
    )
    parser.add_argument("--size", type=int, default=32, help="pixels the classifier sees (default 32)")
    parser.add_argument("--classifier", type=Path, help="weights file: read if it exists, else trained and written")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images (default 8)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)

    folder = ImageFolder(args.images, val_fraction=args.val_fraction, rules=Rules(orientation=args.orientation))
    say_notes(folder)
    num_classes = len(folder.classes)
    samples = read_samples(args.samples, args.size)
    if len(samples.labels_N) <= NEIGHBOURS:
        raise MvarError(
            f"--samples {args.samples} holds {len(samples.labels_N)} images; precision and recall need more than"
            f" {NEIGHBOURS}, and figures worth reading need hundreds. Draw more (--per-class)."
        )
    if int(samples.labels_N.max()) >= num_classes:
        raise MvarError(
            f"--samples {args.samples} has class {int(samples.labels_N.max())}, but {args.images} has"
            f" {num_classes} classes. Compare with the images that the model was trained on."
        )
    for line in differing_names(args.samples, folder.classes):
        log.warning("%s", line)
    train, val = (read_split(folder, split, args.size, args.resize) for split in ("train", "val"))
    if args.classifier is not None and args.classifier.exists():
        classifier = load_classifier(args.classifier, num_classes)
    else:
        log.info("training a classifier on %d images, %d epochs", len(train.labels_N), args.epochs)
        classifier = fit(train.images_NHWC, train.labels_N, num_classes, epochs=args.epochs)
        if args.classifier is not None:
            save_classifier(args.classifier, classifier)
    figures = compare(classifier, samples, train, val)
    print(table(figures))
    if args.json is not None:
        context = {"size_px": args.size, "samples": str(args.samples), "images": str(args.images)}
        payload = {"name": "evaluate", "figures": figures, "goals": {}, "context": context}
        write_text(args.json, json.dumps(payload, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
