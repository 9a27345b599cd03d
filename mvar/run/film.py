"""The grids that a run drew while it was trained, as one film."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mvar.images.arrays import enlarge, save_film
from mvar.images.pixels import read_rgb
from mvar.log import log
from mvar.run.folder import RunFolder

FILM = "film.webp"
"""Among the grids of a run."""
MOST_FRAMES = 60
"""Grids of a film, evenly spaced."""
WIDTH_PX = 384
"""Of a film, at least about: small grids are enlarged."""


def write_film(run: RunFolder, path: Path) -> bool:
    """An animated WebP of the run's grids, oldest first; False where there are fewer than two that are alike.

    Grids of another size than the newest are left out with a warning. Raises ImageError, WriteError.
    """
    # By length first: from a billion steps on names are longer.
    grids = sorted(run.samples.glob("step-*.png"), key=lambda grid: (len(grid.name), grid.name))
    places = np.linspace(0, len(grids) - 1, min(len(grids), MOST_FRAMES)).round().astype(int)
    frames_NHWC = [np.asarray(read_rgb(grids[place])) for place in places]
    alike_NHWC = [frame for frame in frames_NHWC if frame.shape == frames_NHWC[-1].shape]
    if len(alike_NHWC) < len(frames_NHWC):
        log.warning("%s: %d grids of another size are left out.", path, len(frames_NHWC) - len(alike_NHWC))
    if len(alike_NHWC) < 2:
        return False
    factor = max(1, WIDTH_PX // alike_NHWC[0].shape[1])
    save_film(path, [enlarge(frame, factor) for frame in alike_NHWC])
    return True
