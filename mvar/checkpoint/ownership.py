"""Who holds which elements of which parameter, over all ranks, in few numbers.

Under ZeRO 3 every rank holds a part of every parameter, all parts but the last equally wide: a single row says so, for
any number of ranks. Elsewhere a parameter lies whole on one rank, or on a few neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
    parts = np.concatenate([np.insert(numbers, 3, rank, axis=1) for rank, numbers in enumerate(ranks)])
    place, start, stop, rank = parts[np.lexsort((parts[:, 1], parts[:, 0]))].T
    width, end = stop - start, np.array([_elements(shape) for shape in shapes.values()], dtype=np.int64)[place]
    follows = (np.diff(place) == 0) & (np.diff(rank) == 1) & (start[1:] == stop[:-1])
    follows &= (width[1:] == width[:-1]) | ((width[1:] < width[:-1]) & (stop[1:] == end[1:]))
    first = np.flatnonzero(np.concatenate([np.ones(min(len(parts), 1), dtype=bool), ~follows]))
    count = np.diff(first, append=len(parts))
    found: Ownership = {name: [] for name in names}
    for number, *row in np.stack([place[first], rank[first], count, start[first], width[first]], axis=1).tolist():
        found[names[number]].append((row[0], row[1], row[2], row[3]))
    return found


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def holders(rows: Sequence[Row], shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(rank, first element that it holds, one past its last) of all that hold some of the elements [start, stop)."""
    elements = _elements(shape)
    for first, count, begin, width in rows:
        low, high = max(0, (start - begin) // width), min(count, -((begin - stop) // width))
        for k in range(low, high):
            yield first + k, begin + k * width, min(begin + (k + 1) * width, elements)
