"""What is warned of: everything that can be seen and that makes a figure another than the papers'."""

from typing import Any

import numpy as np
import torch

from mvar.evaluation.extractors import FeatureKind
from mvar.evaluation.features import Features
from mvar.evaluation.figures import Figure
from mvar.evaluation.moments import Gaussian, Moments
from mvar.evaluation.reference import Reference
from mvar.evaluation.told import caveats, frechet_name, keys

INCEPTION = FeatureKind("inception-2015-12-05.pt", "ab" * 32, True, "torch")
PUBLISHED: dict[str, Any] = {
    "options": {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "smooth": False, "temperature": 1.0, "guidance": "ramp"},
    "counts": {str(label): 50 for label in range(1000)},
}


def _samples(count: int = 50_000, classes: int = 1000) -> Features:
    features_NF = torch.zeros(1, 4).expand(count, 4)
    return Features(features_NF, Moments(4), None, None, np.arange(count, dtype=np.int64) % classes, "cd" * 32)


def _reference(**changes: Any) -> Reference:
    context = {"images": 1_281_167, "classes": 1000, "size_px": [256, 256], "split": "train", "features": {}} | changes
    gaussian = Gaussian(torch.zeros(4), torch.eye(4))
    return Reference(gaussian, None, torch.zeros(1, 4).expand(50_000, 4), None, context, "ef" * 32)


def test_nothing_is_warned_of_where_all_is_as_in_papers() -> None:
    assert caveats(_samples(), _reference(), INCEPTION, PUBLISHED) == []


def test_each_difference_from_papers_is_told() -> None:
    published, other = PUBLISHED["options"], FeatureKind("efflite0", "ab" * 32, False, "torch")
    cases: list[tuple[str, Features, Reference, FeatureKind, Any]] = [
        ("biased", _samples(49_000, 1000), _reference(), INCEPTION, None),
        ("from 49 to 50 samples", _samples(49_999), _reference(), INCEPTION, PUBLISHED),
        ("record says 50,000", _samples(49_000), _reference(), INCEPTION, PUBLISHED),
        ("500 of the reference's 1,000 classes", _samples(classes=500), _reference(), INCEPTION, PUBLISHED),
        ("the reference has 10,000", _samples(), _reference(images=10_000), INCEPTION, PUBLISHED),
        ("held-out", _samples(), _reference(split="val"), INCEPTION, PUBLISHED),
        ("which network", _samples(), _reference(features=None), INCEPTION, PUBLISHED),
        ("size of its images", _samples(), _reference(size_px=None), INCEPTION, PUBLISHED),
        ("not with papers' FID", _samples(), _reference(), other, PUBLISHED),
        ("cfg 4.0 (published 1.5)", _samples(), _reference(), INCEPTION, {"options": published | {"cfg": 4.0}}),
        ("temperature 0.9", _samples(), _reference(), INCEPTION, {"options": published | {"temperature": 0.9}}),
        ("scales [3, 9] alone", _samples(), _reference(), INCEPTION, {"options": published | {"interval": [3, 9]}}),
        ("smoothing", _samples(), _reference(), INCEPTION, {"smooth": True}),
        ("no record", _samples(), _reference(), INCEPTION, None),
    ]
    for expected, samples, reference, identity, drawn in cases:
        said = caveats(samples, reference, identity, drawn)
        assert any(expected in line for line in said), (expected, said)


def test_only_inceptions_distance_is_called_fid() -> None:
    figures = {"frechet": Figure(2.0, 0.1, 1.0), "inception_score": Figure(300.0)}
    efflite, own = (FeatureKind(name, "ab" * 32, False, "torch") for name in ("efflite0", "own.pt"))
    assert keys(figures, INCEPTION) == {"fid": 2.0, "fid_error": 0.1, "fid_floor": 1.0, "inception_score": 300.0}
    assert set(keys(figures, efflite)) == {"fd_efflite0", "fd_efflite0_error", "fd_efflite0_floor", "class_score"}
    assert [frechet_name(identity) for identity in (INCEPTION, efflite, own)] == ["FID", "FD-efflite0", "FD"]
