"""Pictures of a model that are looked at as they are drawn, and kept nowhere.

Legend: N pictures, B of a block, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mvar.images.arrays import Bytes
from mvar.sampling.painter import Painter
from mvar.sampling.pictures import Picture


class DrawnPictures:
    """What `painter` draws of `pictures`, as `evaluation.pictures.PictureSet`; blocks are the painter's batches."""

    def __init__(self, where: str, pictures: Sequence[Picture], painter: Painter, size_px: int) -> None:
        self.where, self._pictures, self._painter, self._size_px = where, pictures, painter, size_px

    @property
    def size(self) -> tuple[int, int]:
        return self._size_px, self._size_px

    @property
    def labels_N(self) -> NDArray[np.int64]:
        return np.array([picture.label for picture in self._pictures], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._pictures)

    def blocks(self, batch: int) -> Iterator[Bytes]:
        """uint8 (B, H, W, 3). Raises MvarError."""
        step = self._painter.batch
        yield from self._painter.draw(
            self._pictures[first : first + step] for first in range(0, len(self._pictures), step)
        )
