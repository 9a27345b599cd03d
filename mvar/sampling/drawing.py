"""One task of a job: its parts that are not complete are drawn, in order, and written as they come."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import PIL
import torch

from mvar.files.disk import remove_stale
from mvar.images.arrays import Bytes
from mvar.log import log
from mvar.run.progress import ProgressLine
from mvar.sampling.job import RECORDS, SampleJob, problem_of
from mvar.sampling.packing import SamplePart
from mvar.sampling.painter import Painter
from mvar.sampling.pictures import Picture
from mvar.sampling.writer import PartsWriter
from mvar.version import __version__


def draw_share(out: Path, job: SampleJob, task: int, tasks: int, painter: Callable[[], Painter]) -> None:
    """Draw the parts of one task, skipping those that are complete. `painter` is asked for if there are any.

    Raises MvarError.
    """
    mine = job.parts[task::tasks]
    log.info(
        "sample: %d images of %d classes in %d parts, %s, %d at once",
        *(len(job.pictures), len(job.counts), len(job.parts), job.precision, job.batch),
    )
    for folder in {out, out / RECORDS, *(path.parent for part in mine for path in job.packing(out).files(part))}:
        remove_stale(folder)
    waiting = [part for part in mine if problem_of(out, job, part) is not None]
    log.info(
        "sample %d/%d: %d parts are this task's, %d of them complete", task, tasks, len(mine), len(mine) - len(waiting)
    )
    if not waiting:
        return
    drawer = painter()
    progress = ProgressLine(f"sample {task}/{tasks}", sum(len(part.pictures) for part in waiting))
    with PartsWriter(out, job, made_by(drawer.device)) as writer:
        batches = [(part, own) for part in waiting for own in _batches(part, job.batch)]
        with closing(drawer.draw(own for _, own in batches)) as drawn:
            for (part, own), images_BHWC in zip(batches, drawn, strict=True):
                writer.put(part, images_BHWC)
                progress.add(len(own))
    log.info("%s: done; the model waited %.1f s for the writing", progress.what, writer.waited_s)


def draw_few(pictures: Sequence[Picture], painter: Painter) -> dict[Picture, Bytes]:
    """Some images, kept in memory."""
    batches = [pictures[first : first + painter.batch] for first in range(0, len(pictures), painter.batch)]
    drawn = painter.draw(batches)
    return {
        picture: image
        for own, images in zip(batches, drawn, strict=True)
        for picture, image in zip(own, images, strict=True)
    }


def made_by(device: torch.device) -> dict[str, str]:
    """What rounding depends on besides the job."""
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "torch": torch.__version__, "pillow": PIL.__version__, "mvar": __version__}


def _batches(part: SamplePart, size: int) -> Iterator[tuple[Picture, ...]]:
    for first in range(0, len(part.pictures), size):
        yield part.pictures[first : first + size]
