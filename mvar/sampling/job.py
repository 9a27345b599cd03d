"""A job of sampling: what all its tasks have to agree on before one draws, and which of its parts are complete.

    OUT/sample.json         the job: everything that an image depends on; written by the first task
    OUT/.parts/*.json       a record for each part that is complete, written after its images
    OUT/last-run.json       into how many tasks it was last divided, to name those that have to run again

The images of a part and the batches inside it are fixed by the job, so that a part's bytes do not depend on the task
that draws it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pydantic

from mvar.errors import ConfigError, MvarError
from mvar.files.disk import write_file, write_once
from mvar.run.tasks import array_list, differences
from mvar.sampling.packing import PACKINGS, Kind, Packing, SamplePart
from mvar.sampling.pictures import Picture, in_turn
from mvar.sampling.precision import SamplePrecision

RECORD = "sample.json"
CLASSES = "classes"
"""Its key for the names of the classes."""
RECORDS = ".parts"
"""Folder of the parts' records: hidden, so that nobody takes it for a class."""
LAST_RUN = "last-run.json"
FORMAT_VERSION = 1
_TOLD = {"classes", "made"}
"""Keys that are noted for readers, and may differ from task to task."""


class SampleJob(pydantic.BaseModel):
    """Everything that decides what the images look like, and how they are cut into parts."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    format: Literal["mvar-sample-job"] = "mvar-sample-job"
    format_version: int = FORMAT_VERSION
    weights: str
    """Digest of all values of the weights, see `mvar.checkpoint.fingerprint`."""
    tokenizer: str
    options: dict[str, Any]
    """The fields of SamplingOptions."""
    seed: int
    precision: SamplePrecision
    device: str
    compiled: bool
    batch: int
    """Images drawn together: another size can round a logit differently."""
    part: int
    """Images of a part."""
    kind: Kind
    size_px: int
    counts: dict[int, int]
    """Class -> images of it."""
    classes: tuple[str, ...] | None = None
    """Names of all classes of the model, where they are known."""
    made: dict[str, Any] = {}
    """By what the first task drew: versions, weights' path, device."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tasks have to agree on, as plain JSON."""
        tree: dict[str, Any] = json.loads(self.model_dump_json(exclude=_TOLD))
        return tree

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def pictures(self) -> list[Picture]:
        return in_turn(self.counts)

    @cached_property
    def parts(self) -> list[SamplePart]:
        """All parts; their places in the list are their numbers."""
        starts = range(0, len(self.pictures), self.part)
        return [
            SamplePart(number, first, tuple(self.pictures[first : first + self.part]))
            for number, first in enumerate(starts)
        ]

    def packing(self, out: Path) -> Packing:
        return PACKINGS[self.kind](out, self.size_px)

    @classmethod
    def read(cls, out: Path) -> SampleJob | None:
        """The job of a folder; None where there is none yet. Raises ConfigError."""
        path = out / RECORD
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}). Choose another folder.") from None
        except ValueError as error:
            raise ConfigError(
                f"{path}: not a job of this version ({str(error).splitlines()[0]}). Choose another folder, or remove "
                "this one."
            ) from None

    def write_first(self, out: Path) -> None:
        """Make this the folder's job, unless it has one. Raises WriteError."""
        write_once(out / RECORD, (self.model_dump_json(indent=1) + "\n").encode())

    def check(self, out: Path) -> None:
        """Raise ConfigError, which names what differs, unless this is the folder's job."""
        pinned = SampleJob.read(out)
        if pinned is None:
            raise ConfigError(f"{out / RECORD}: vanished while the job was begun. Run it again.")
        if pinned.identity != self.identity:
            differing = differences(pinned.identity, self.identity, "the folder", "this command")
            raise ConfigError(
                f"--out {out}: holds another job. Differing: {'; '.join(_shortened(differing))}. Choose another "
                "folder, or remove it."
            )


class PartRecord(pydantic.BaseModel):
    """The JSON of a part: written after its images, so its presence says that they were complete."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    number: int
    job_sha256: str
    bytes: int
    sha256: str
    """Of its files, one after the other."""
    pixels_sha256: str
    """Of its images' bytes (N, H, W, 3) before they were packed."""
    settings: dict[str, Any]
    """Of the job, to name what differs if it was another."""
    made: dict[str, str]
    """Device and versions: other ones may round otherwise."""

    @classmethod
    def of(
        cls, job: SampleJob, part: SamplePart, found: tuple[int, str], pixels: str, made: Mapping[str, str]
    ) -> PartRecord:
        return cls(
            number=part.number,
            job_sha256=job.sha256,
            bytes=found[0],
            sha256=found[1],
            pixels_sha256=pixels,
            settings=settings(job),
            made=dict(made),
        )

    def write(self, out: Path) -> None:
        write_file(record_path(out, self.number), (self.model_dump_json() + "\n").encode())


def settings(job: SampleJob) -> dict[str, Any]:
    """A job's identity without what takes a line a class."""
    return {key: value for key, value in job.identity.items() if key != "counts"}


def record_path(out: Path, number: int) -> Path:
    return out / RECORDS / f"part-{number:06d}.json"


def read_record(out: Path, job: SampleJob, part: SamplePart) -> PartRecord | None:
    """The record of a part; None where it is missing or damaged. Raises ConfigError where it is another job's."""
    path = record_path(out, part.number)
    try:
        record = PartRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    if record.job_sha256 != job.sha256:
        differing = differences(record.settings, settings(job), "the part", "the folder's job") or [
            "counts: other images of the classes"
        ]
        raise ConfigError(
            f"{path}: {part.name} was drawn by another job. Differing: {'; '.join(_shortened(differing))}. Remove "
            f"{path} and run its task again, or give the folder that was drawn by one job."
        )
    return record if record.number == part.number else None


def problem_of(out: Path, job: SampleJob, part: SamplePart) -> str | None:
    """Why a part has to be drawn again, in words; None if it is whole. Raises ConfigError: it is another job's."""
    record = read_record(out, job, part)
    if record is None:
        return "not drawn"
    try:
        found = job.packing(out).digest(part)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None if found == (record.bytes, record.sha256) else "damaged"


def tasks_of(out: Path, job: SampleJob) -> int:
    """Into how many tasks a job was last divided."""
    try:
        return max(1, int(json.loads((out / LAST_RUN).read_bytes())["tasks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return len(job.parts)


def note_tasks(out: Path, tasks: int) -> None:
    write_file(out / LAST_RUN, (json.dumps({"tasks": tasks}) + "\n").encode())


def explain_unfinished(out: Path, job: SampleJob, problems: Mapping[int, str], tasks: int | None = None) -> MvarError:
    """The error that names parts which have to be drawn again, and their tasks."""
    tasks = tasks_of(out, job) if tasks is None else tasks
    again = array_list({number % tasks for number in problems})
    listed = ", ".join(f"{job.parts[number].name} ({why})" for number, why in sorted(problems.items())[:5])
    more = ", ..." * (len(problems) > 5)
    missing = sum(len(job.parts[number].pictures) for number in problems)
    return ConfigError(
        f"samples {out}: {len(problems)} of {len(job.parts)} parts, {missing:,} of {len(job.pictures):,} images, are "
        f"missing or damaged: {listed}{more}. Run these tasks again: --array={again} (with --tasks {tasks})"
    )


def _shortened(lines: Sequence[str]) -> list[str]:
    return [*lines[:6], *([f"and {len(lines) - 6} more"] if len(lines) > 6 else [])]
