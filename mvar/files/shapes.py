"""What differs between the tensors that a file holds and those that it should, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 3
"""Differences that a message names; the rest is counted."""
Shapes = Mapping[str, Sequence[int]]


def differing(found: Shapes, expected: Shapes) -> str | None:
    """The first differences of names and shapes, and how many more there are; None if there are none."""
    lines = [f"{name}: missing" for name in expected if name not in found]
    lines += [f"{name}: not expected" for name in found if name not in expected]
    lines += [
        f"{name}: got shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more if lines else None
