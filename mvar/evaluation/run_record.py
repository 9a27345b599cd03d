"""What is known of a run's samples: evaluations.jsonl in its folder, a flat object for each evaluation.

step, images, fid | fd_efflite0 | fd, kid, precision, ... with *_error and *_floor, and how they were made
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvar.evaluation import EVALUATIONS
from mvar.evaluation.extractors import FeatureKind
from mvar.evaluation.reference import Reference
from mvar.files.disk import cannot_write
from mvar.files.json_lines import append

FIGURES = ("fid", "fd", "sfid", "kid", "inception_score", "class_score", "precision", "recall")
"""How names of figures begin."""


def add_evaluation(
    run: Path,
    step: int,
    images: int,
    figures: Mapping[str, float],
    identity: FeatureKind,
    reference: Reference,
    drawn: Mapping[str, Any],
) -> None:
    """Add a line. `figures`: see `told.keys`; `drawn`: weights, options and digests, as far as known.

    Raises WriteError.
    """
    line = {"step": step, "images": images, **figures, "time_s": round(time.time(), 1), **drawn}
    line |= {"features": identity.name, "features_sha256": identity.sha256, "reference_sha256": reference.sha256}
    try:
        append(run / EVALUATIONS, line)
    except OSError as error:
        raise cannot_write(run / EVALUATIONS, error) from None


def one_line(record: Mapping[str, Any]) -> str:
    """The figures in a record, such as `fid 3.071 +- 0.020  kid 0.0004`."""
    shown = []
    for name, value in record.items():
        if name.startswith(FIGURES) and not name.endswith(("_error", "_floor")):
            error = record.get(f"{name}_error")
            shown.append(f"{name} {value:.4g}" + (f" +- {error:.2g}" if error is not None else ""))
    return "  ".join(shown)
