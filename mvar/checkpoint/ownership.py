"""Who holds which elements of which parameter, over all ranks, in few numbers.

Under ZeRO 3 every rank holds a part of every parameter, all parts but the last equally wide: a single row says so, for
any number of ranks. Elsewhere a parameter lies whole on one rank, or on a few neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvar.checkpoint.partition import Piece

Row = tuple[int, int, int, int]
"""(first rank, ranks, first element, width): rank `first rank + k` holds the `width` elements from `first element +
k * width` on, as far as the parameter goes."""
Ownership = dict[str, list[Row]]
"""Of every parameter."""


def numbers_of(pieces: Sequence[Piece], names: Sequence[str]) -> NDArray[np.int64]:
    """A rank's pieces, to be sent: (pieces, 3), the parameter's place in `names`, first element, one past the last."""
    places = {name: place for place, name in enumerate(names)}
    rows = [(places[piece.name], piece.start, piece.stop) for piece in pieces]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def ownership_of(ranks: Sequence[NDArray[np.int64]], shapes: Mapping[str, tuple[int, ...]]) -> Ownership:
    """What all ranks hold together: `ranks[r]` is what rank r says by `numbers_of`."""
    names = list(shapes)
    rows = np.concatenate([np.insert(numbers, 3, rank, axis=1) for rank, numbers in enumerate(ranks)])
    found: Ownership = {name: [] for name in names}
    for place, start, stop, rank in rows[np.lexsort((rows[:, 1], rows[:, 0]))].tolist():
        _add(found[names[place]], start, stop, rank, _elements(shapes[names[place]]))
    return found


def _add(rows: list[Row], start: int, stop: int, rank: int, elements: int) -> None:
    if rows:
        first, count, begin, width = rows[-1]
        follows = rank == first + count and start == begin + count * width
        if follows and (stop - start == width or (stop == elements and stop - start < width)):
            rows[-1] = (first, count + 1, begin, width)
            return
    rows.append((rank, 1, start, stop - start))


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def holders(rows: Sequence[Row], shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(rank, first element that it holds, one past its last) of all that hold some of the elements [start, stop)."""
    elements: Any = _elements(shape)
    for first, count, begin, width in rows:
        low, high = max(0, (start - begin) // width), min(count, -((begin - stop) // width))
        for k in range(low, high):
            yield first + k, begin + k * width, min(begin + (k + 1) * width, elements)
