"""Python's garbage collector in a training: at fixed steps, so that no rank pauses while the others wait for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 100
"""Steps between two collections. A step leaves a few dozen objects in cycles, and no tensor."""


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Inside, nothing is collected but by `collect`, and what there was before is not looked at again."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect() -> None:
    """All that came to be inside."""
    gc.collect()
