"""Parts written beside the drawing: images are encoded by threads and written by another, and the model goes on."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from mvar.cgroups import cores
from mvar.images.arrays import Bytes
from mvar.sampling.job import PartRecord, SampleJob
from mvar.sampling.packing import SamplePart, encode_png
from mvar.threads import helper

AHEAD = 4
"""Batches that may wait for the writer before the model has to."""
ENCODERS = 8
"""Threads that encode, at most."""


class PartsWriter:
    """Takes the images of one part after the other, batch by batch in order; a context that ends when all is written.

    `made`: device and versions, for the records. Errors of the writing are raised by `put` and at the end.
    """

    def __init__(self, out: Path, job: SampleJob, made: Mapping[str, str]) -> None:
        self._out, self._job, self._made = out, job, made
        self._packing = job.packing(out)
        self._queue: queue.Queue[tuple[SamplePart, Bytes] | None] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.waited_s = 0.0
        """How long the drawing waited for the writing."""

    def __enter__(self) -> PartsWriter:
        self._thread = helper(self._run, "mvar-write-parts")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._send(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def put(self, part: SamplePart, images_BHWC: Bytes) -> None:
        """Hand over a batch."""
        since_s = time.monotonic()
        self._send((part, images_BHWC))
        self.waited_s += time.monotonic() - since_s
        if self._error is not None:
            raise self._error

    def _send(self, item: tuple[SamplePart, Bytes] | None) -> None:
        while self._error is None:
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(min(ENCODERS, cores()), "mvar-encode-png") as pool:
                self._write_all(pool)
        except BaseException as error:  # Handed to the drawing, which raises it.
            self._error = error

    def _write_all(self, pool: ThreadPoolExecutor) -> None:
        images: list[Bytes] = []
        pngs: list[Future[bytes]] = []
        while (item := self._queue.get()) is not None:
            part, images_BHWC = item
            images += list(images_BHWC)
            if self._packing.encodes:
                pngs += [pool.submit(encode_png, image_HWC) for image_HWC in images_BHWC]
            if len(images) == len(part.pictures):
                self._write(part, images, [png.result() for png in pngs])
                images, pngs = [], []

    def _write(self, part: SamplePart, images: list[Bytes], pngs: list[bytes]) -> None:
        pixels = hashlib.sha256()
        for image_HWC in images:
            pixels.update(image_HWC.data)
        self._packing.write(part, images, pngs)
        record = PartRecord.of(self._job, part, self._packing.digest(part), pixels.hexdigest(), self._made)
        record.write(self._out)
