"""A sheet of samples for people: a class a row, with a bound on both, whatever the job's size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mvar.images.arrays import Bytes, grid, save_png
from mvar.sampling.job import SampleJob
from mvar.sampling.pictures import Picture


def shown(counts: Mapping[int, int], rows: int, columns: int) -> list[Picture]:
    """The first `columns` images of at most `rows` classes, evenly spaced; as many of each class as the least has."""
    labels = sorted(counts)
    places = np.linspace(0, len(labels) - 1, min(rows, len(labels))).round().astype(int)
    chosen = [labels[place] for place in places]
    across = min(columns, *(counts[label] for label in chosen))
    return [Picture(label, number) for label in chosen for number in range(across)]


def read_images(out: Path, job: SampleJob, pictures: Iterable[Picture]) -> dict[Picture, Bytes]:
    """Some of a job's images. Raises ImageError."""
    places: dict[int, list[int]] = defaultdict(list)
    where = {picture: number for number, picture in enumerate(job.pictures)}
    for picture in pictures:
        number, place = divmod(where[picture], job.part)
        places[number].append(place)
    packing = job.packing(out)
    found: dict[Picture, Bytes] = {}
    for number, own in places.items():
        part = job.parts[number]
        found |= {part.pictures[place]: image for place, image in zip(own, packing.read(part, own), strict=True)}
    return found


def sheet(images: Mapping[Picture, Bytes]) -> Bytes:
    """uint8 (H', W', 3), one row for each class."""
    pictures = sorted(images)
    across = sum(picture.label == pictures[0].label for picture in pictures)
    return grid([images[picture] for picture in pictures], across)


def write_gallery(path: Path, images: Mapping[Picture, Bytes]) -> None:
    """`sheet` as PNG."""
    save_png(path, sheet(images))
