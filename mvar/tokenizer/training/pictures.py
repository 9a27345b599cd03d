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
from mvar.images.views import centre_view, random_crop_view, resize_shorter_side
from mvar.randomness import permuted

Pixels = npt.NDArray[np.uint8]


class Pictures:
    """Random crops of a source's training images, in a new order every epoch, as one endless stream.

    An epoch's view of an image is view number `epoch` (mvar.images.views). Images stay in memory, resized, while they
    fit into `ram_gib`. Nothing else is kept: any step can be asked for at any time. `workers`: threads that decode.
    `part`: places of the global batch that are wanted here, all by default.
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
    ) -> None:
        self.items = source.splits["train"]
        self.size, self.resize, self.batch_size, self.seed = size, resize, batch, seed
        self._read = source.reader
        self._kept: dict[int, Image.Image] = {}
        self._room_bytes = int(ram_gib * 2**30)
        self._workers = workers
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
        item = self.items[index]
        return random_crop_view(self._image(index, item), self.size, self.seed, item.key, epoch, self.resize)

    def _image(self, index: int, item: Item) -> Image.Image:
        """The resized image; resizing it again changes nothing."""
        if index in self._kept:
            return self._kept[index]
        image = resize_shorter_side(self._read(item.path), self.size, self.resize)
        needed_bytes = image.width * image.height * 4  # Pillow holds RGB in four bytes.
        if needed_bytes <= self._room_bytes:
            self._room_bytes -= needed_bytes
            self._kept[index] = image
        return image


def centre_views(source: Source, items: Sequence[Item], size: int, resize: float, workers: int = 2) -> Pixels:
    """Centre crops of some images, uint8 (N, H, W, 3)."""
    with ThreadPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(lambda item: centre_view(source.reader(item.path), size, resize), items)))
