"""Pictures for the tokenizer's training: the batch of a step as a pure function of (seed, step).

Legend: B images, H = W side in pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvar.images.sources import Item, Source
from mvar.images.views import Frame, centre_view, random_crop_view
from mvar.randomness import permuted
from mvar.tokenizer.training.left_out import LeftOut

Pixels = npt.NDArray[np.uint8]


class Pictures:
    """Random crops of a source's training images, in a new order every epoch, as one endless stream.

    An epoch's view of an image is view number `epoch` (mvar.images.views). Images stay in memory, resized, while they
    fit into `ram_gib`. Nothing else is kept: any step can be asked for at any time. `workers`: threads that decode.
    `part`: places of the global batch that are wanted here, all by default. `left_out` says what becomes of damaged
    images.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        resize: float,
        batch: int,
        seed: int,
        *,
        part: range | None = None,
        ram_gib: float = 4.0,
        workers: int = 2,
        left_out: LeftOut | None = None,
    ) -> None:
        self.items = source.splits["train"]
        self.size, self.resize, self.batch_size, self.seed = size, resize, batch, seed
        self._read = source.reader
        self._kept: dict[int, Image.Image] = {}
        self._room_bytes = int(ram_gib * 2**30)
        self._workers = workers
        self._left_out = LeftOut() if left_out is None else left_out
        self._part = range(batch) if part is None else part

    @property
    def steps_per_epoch(self) -> float:
        return len(self.items) / self.batch_size

    def batch(self, step: int, pool: ThreadPoolExecutor | None = None) -> Pixels:
        """uint8 (B, H, W, 3) of optimizer step `step` (from 0): the wanted part of its global batch."""
        positions = step * self.batch_size + np.asarray(self._part)
        epochs = positions // len(self.items)
        indices = permuted(self.seed, epochs, positions % len(self.items), len(self.items))
        wanted = zip(indices.tolist(), epochs.tolist(), strict=True)
        return np.stack(list((pool.map if pool else map)(self._picture, wanted)))

    def batches(self, first: int, end: int) -> Generator[Pixels, None, None]:
        """Batches of steps `first` to `end - 1`; the next is made while the caller works on one."""
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(self._workers) as pool:
            waiting: Any = None
            for step in range(first, end + 1):
                coming = ahead.submit(self.batch, step, pool) if step < end else None
                if waiting is not None:
                    yield waiting.result()
                waiting = coming

    def _picture(self, wanted: tuple[int, int]) -> Pixels:
        index, epoch = wanted
        index, image = self._left_out.whole(self.items, index, self._image)
        return random_crop_view(image, self.size, self.seed, self.items[index].key, epoch, self.resize)

    def _image(self, index: int) -> Image.Image:
        """What crops are made of (see Frame); resizing it again changes nothing."""
        if index in self._kept:
            return self._kept[index]
        image = Frame.of(self._read(self.items[index].path), self.size, self.resize).image
        needed_bytes = image.width * image.height * 4  # Pillow holds RGB in four bytes.
        if needed_bytes <= self._room_bytes:
            self._room_bytes -= needed_bytes
            self._kept[index] = image
        return image


def centre_views(
    source: Source,
    items: Sequence[Item],
    indices: Sequence[int],
    size: int,
    resize: float,
    left_out: LeftOut,
    workers: int = 2,
) -> Pixels:
    """Centre crops of some of the items, uint8 (N, H, W, 3); `left_out` says what becomes of damaged ones."""

    def view(index: int) -> Pixels:
        return centre_view(source.reader(items[index].path), size, resize)

    with ThreadPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(lambda index: left_out.whole(items, index, view)[1], indices)))
