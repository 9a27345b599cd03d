"""Series of numbers out of a run's records: what is missing or no finite number is a gap, never an error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mvar.evaluation import EVALUATIONS
from mvar.files.json_lines import JsonRecord, read

DISTANCES = {"fid": "FID", "fd_efflite0": "FD-efflite0", "fd": "FD"}
"""Keys of Frechet distances in evaluations, and their names."""
Point = tuple[float, float]
"""Images seen, and a value."""


def number(value: Any) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def of_kind(records: Iterable[JsonRecord], kind: str) -> list[JsonRecord]:
    """Those records that can be placed on an axis of images seen."""
    return [record for record in records if record.get("kind") == kind and number(record.get("samples")) is not None]


def series(records: Iterable[JsonRecord], key: str, place: int | None = None) -> list[Point]:
    """(images seen, value) of each record that has the number; `place`: of a list of numbers, one for each scale."""
    found = []
    for record in records:
        value = record.get(key)
        if place is not None:
            value = value[place] if isinstance(value, list) and place < len(value) else None
        x, y = number(record.get("samples")), number(value)
        if x is not None and y is not None:
            found.append((x, y))
    return found


def places(records: Iterable[JsonRecord], key: str) -> int:
    """How many numbers the lists under `key` hold, at most."""
    return max((len(record[key]) for record in records if isinstance(record.get(key), list)), default=0)


def smooth(points: Sequence[Point], share: float = 0.02) -> list[Point]:
    """Exponential mean over about `share` of the points, corrected for its start."""
    decay = 1 - 1 / max(1.0, share * len(points))
    mean, weight, out = 0.0, 0.0, []
    for x, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append((x, mean / weight))
    return out


def read_evaluations(run: Path, records: Iterable[JsonRecord]) -> list[JsonRecord]:
    """Of a run's samples: what `mvar evaluate --run` and the training itself noted, by images seen.

    `records`: of metrics.jsonl, which tell how many images a step comes to.
    """
    noted = [record for record in read(run / EVALUATIONS) if isinstance(record.get("step"), int)]
    seen = {record["step"]: record["samples"] for record in records if record.get("step") and "samples" in record}
    if seen:
        last = max(seen)
        noted = [{"samples": seen.get(one["step"], one["step"] * seen[last] / last), **one} for one in noted]
    found = [one for one in noted if "samples" in one and any(key in one for key in (*DISTANCES, "kid"))]
    return sorted(found, key=lambda one: float(one["samples"]))


def way_of(evaluation: JsonRecord, key: str) -> str:
    """How a figure was made, in words: figures of two ways cannot be compared."""
    told = [DISTANCES.get(key, ""), f"{evaluation['images']:,} images" if "images" in evaluation else ""]
    told += [f"cfg {evaluation['cfg']}" if evaluation.get("cfg") is not None else ""]
    return ", ".join(filter(None, told))
