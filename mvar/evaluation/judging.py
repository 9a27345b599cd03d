"""Small pictures judged by a classifier that is trained on the real ones: the demo's figures.

Legend: N pictures, M held-out ones, K classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvar.errors import ImageError
from mvar.evaluation.classifier import Classifier, judge
from mvar.evaluation.fidelity import frechet_distance, inception_score, kernel_distance, precision_recall
from mvar.evaluation.pictures import PictureSet
from mvar.images.arrays import Bytes

BATCH = 256


@dataclass(frozen=True)
class LabelledImages:
    """uint8 (N, size, size, 3) and int64 (N,)."""

    images_NHWC: Bytes
    labels_N: Tensor

    @classmethod
    def read(cls, pictures: PictureSet) -> LabelledImages:
        """All of them, in memory. Raises ImageError."""
        images_NHWC = np.concatenate(list(pictures.blocks(BATCH)))
        if pictures.labels_N is None:
            raise ImageError(f"{pictures.where}: a classifier needs the class of each picture (arr_1).")
        return cls(images_NHWC, torch.from_numpy(pictures.labels_N))


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
