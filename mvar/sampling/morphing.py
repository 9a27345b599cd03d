"""A path from one class to another, at the same seeds: frames whose logits go over from the first class to the second.

The logits with a class are mixed, not the classes' embeddings: every point of the path is a product of two conditions
that the model knows, (p first)^(1-s) (p second)^s, and its ends are plain sampling of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mvar.images.arrays import Bytes
from mvar.sampling.drawing import draw_few
from mvar.sampling.painter import Painter
from mvar.sampling.pictures import Picture
from mvar.sampling.sampler import Forced, Toward


def draw_path(
    painter: Painter,
    pictures: Sequence[Picture],
    second: int,
    steps: int,
    forced: Callable[[], Forced] | None = None,
) -> Bytes:
    """Frames of each picture, from its own class to class `second`: uint8 (steps, N, H, W, 3). Raises MvarError."""
    label = torch.tensor([second])
    frames = []
    for share in np.linspace(0, 1, steps):
        drawn = draw_few(pictures, painter.variant(forced=forced, toward=Toward(label, float(share))))
        frames.append(np.stack([drawn[picture] for picture in pictures]))
    return np.stack(frames)
