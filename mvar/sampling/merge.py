"""The parts of a job as one .npz, in a stream: memory holds a few images, whatever their number.

What is merged is what was drawn: nothing may be missing, files must be those that were written, and their pixels those
that came from the model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mvar.cgroups import cores
from mvar.errors import ConfigError, ImageError
from mvar.files.disk import remove_stale, sha256_of, write_text, writing
from mvar.images.arrays import Bytes
from mvar.log import log
from mvar.sampling.job import SampleJob, explain_unfinished, problem_of, read_record, record_path
from mvar.sampling.npz import write_npz
from mvar.sampling.packing import SamplePart

STRETCH, THREADS = 64, 16
"""Images that a thread decodes at once, and threads at most: together all that memory holds."""


def open_job(out: Path) -> SampleJob:
    """The job of a folder that holds one. Raises ConfigError."""
    job = SampleJob.read(out)
    if job is None:
        raise ConfigError(f"samples {out}: holds no job of `mvar sample`. Give the folder of its --out.")
    return job


def unfinished(out: Path, job: SampleJob, *, thorough: bool = True) -> dict[int, str]:
    """Number of each part that has to be drawn again -> why. `thorough`: files are read through, not only looked for.

    Raises ConfigError: a part is another job's.
    """
    if not thorough:
        return {part.number: "not drawn" for part in job.parts if read_record(out, job, part) is None}
    with ThreadPoolExecutor(cores()) as pool:
        problems = pool.map(lambda part: problem_of(out, job, part), job.parts)
        return {part.number: why for part, why in zip(job.parts, problems, strict=True) if why is not None}


def merge(out: Path, to: Path, tasks: int | None = None) -> str:
    """Write `to` (.npz) and, beside it, `to`.json with how it was made; returns the digest of the .npz.

    `tasks`: the number of tasks to name those that have to run again by; default: as in the last run. Raises
    ConfigError while a part is missing, damaged or another job's, and ImageError.
    """
    if to.suffix != ".npz":
        raise ConfigError(f"--out {to}: must end in .npz.")
    job = open_job(out)
    problems = unfinished(out, job)
    if problems:
        raise explain_unfinished(out, job, problems, tasks)
    labels_N = np.array([picture.label for picture in job.pictures], dtype=np.int64)
    remove_stale(to.parent)
    with writing(to) as file:
        write_npz(file, job.size_px, _images(out, job), labels_N)
    digest = sha256_of(to)
    write_text(to.with_name(f"{to.name}.json"), _record(out, job, to, digest))
    return digest


def _images(out: Path, job: SampleJob) -> Iterator[Bytes]:
    """All images in the job's order, decoded ahead on all cores."""
    packing = job.packing(out)
    threads = min(THREADS, cores()) if packing.encodes else 1

    def decoded(part: SamplePart, places: range) -> list[Bytes]:
        return list(packing.read(part, places))

    def stretches() -> Iterator[tuple[SamplePart, range]]:
        for part in job.parts:
            count = len(part.pictures)
            step = STRETCH if packing.encodes else count
            for first in range(0, count, step):
                yield part, range(first, min(first + step, count))

    with ThreadPoolExecutor(threads, "mvar-decode") as pool:
        ahead: deque[tuple[SamplePart, range, Future[list[Bytes]]]] = deque()
        waiting = stretches()
        digest = hashlib.sha256()
        while True:
            for part, places in itertools.islice(waiting, threads + 1 - len(ahead)):
                ahead.append((part, places, pool.submit(decoded, part, places)))
            if not ahead:
                return
            part, places, images = ahead.popleft()
            for image_HWC in images.result():
                digest.update(image_HWC.data)
                yield image_HWC
            if places.stop == len(part.pictures):
                _require_drawn(out, job, part, digest.hexdigest())
                digest = hashlib.sha256()


def _require_drawn(out: Path, job: SampleJob, part: SamplePart, pixels_sha256: str) -> None:
    record = read_record(out, job, part)
    if record is None or record.pixels_sha256 != pixels_sha256:
        raise ImageError(
            f"samples {out}: the pixels of {part.name} are not those that were drawn. Remove "
            f"{record_path(out, part.number)} and run its task again."
        )


def _record(out: Path, job: SampleJob, to: Path, digest: str) -> str:
    """How the .npz was made: the job, and by what its parts were drawn."""
    makers = Counter[str]()
    for part in job.parts:
        record = read_record(out, job, part)
        if record is not None:
            makers[", ".join(f"{key} {value}" for key, value in sorted(record.made.items()))] += 1
    if len(makers) > 1:
        log.warning(
            "samples %s: drawn by %d kinds of machine, which may round otherwise: %s",
            out,
            len(makers),
            "; ".join(f"{count} parts by {maker}" for maker, count in makers.items()),
        )
    told: dict[str, Any] = {"images": len(job.pictures), "bytes": to.stat().st_size, "sha256": digest}
    tree = {"npz": {"name": to.name} | told, "drawn_by": dict(makers), "job_sha256": job.sha256}
    return json.dumps(tree | {"job": json.loads(job.model_dump_json())}, indent=1) + "\n"
