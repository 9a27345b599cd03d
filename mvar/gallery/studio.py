"""Models that were picked, kept ready, and pictures drawn from them scale by scale.

A drawing may be given up between any two scales, by a browser that is gone: nothing is held while a scale is shown. One
scale of one drawing is computed at a time, on a CPU by one thread, as `mvar sample` does it: so the bits are the same.

Legend: B images, H, W pixels, C latent channels.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from mvar.checkpoint.fingerprint import fingerprint
from mvar.errors import BackendError, ConfigError
from mvar.gallery.entries import Exhibit
from mvar.gallery.wish import Wish
from mvar.images.arrays import Bytes, to_uint8
from mvar.log import tell
from mvar.model.transformer import MVAR
from mvar.sampling.canvas import Canvas
from mvar.sampling.classes import class_names
from mvar.sampling.editing import Editing
from mvar.sampling.loading import ModelPair
from mvar.sampling.painter import decoded
from mvar.sampling.precision import SamplePrecision, arithmetic, choose
from mvar.sampling.sampler import ScaleSample, generate_scales
from mvar.tokenizer.vqvae import VQVAE

KEPT = 2
"""Models in memory at once: two can be compared."""


@dataclass(frozen=True)
class Growth:
    """What pictures look like after a scale. `images`: uint8 (B, H, W, 3), in the order of the wish."""

    scale: int
    scales: int
    images_BHWC: Bytes

    @property
    def last(self) -> bool:
        return self.scale + 1 == self.scales


@dataclass(frozen=True)
class ReadyModel:
    """A model that is ready to draw."""

    model: MVAR
    tokenizer: VQVAE
    tokenizer_sha256: str
    precision: SamplePrecision
    names: tuple[str, ...] | None
    """Of its classes, where they are known."""

    @property
    def num_classes(self) -> int:
        return self.model.num_classes


class Studio:
    """Draws what is wished for. All methods may be called from any thread."""

    def __init__(self, device: torch.device, precision: str = "auto", names: Path | None = None) -> None:
        """`names`: file of class names or code store, for all models."""
        self.device, self.precision = device, precision
        self._names = names
        self._ready: OrderedDict[Exhibit, ReadyModel] = OrderedDict()
        self._turn = threading.Lock()

    def open(self, entry: Exhibit) -> ReadyModel:
        """Load it, unless it is there already; of others the one that was used last is kept. Raises MvarError."""
        with self._turn:
            if entry not in self._ready:
                while len(self._ready) >= KEPT:
                    self._ready.popitem(last=False)
                self._ready[entry] = self._load(entry)
            self._ready.move_to_end(entry)
            return self._ready[entry]

    def _load(self, entry: Exhibit) -> ReadyModel:
        pair = ModelPair.load(entry.weights, entry.tokenizer, step=entry.step, ema=entry.ema)
        chosen = choose(self.precision, self.device, pair.trained)
        tell([chosen])
        precision = cast(SamplePrecision, chosen.way)
        tokenizer = pair.tokenizer.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return ReadyModel(
            pair.model(precision, self.device),
            tokenizer.requires_grad_(False),
            fingerprint(pair.tokenizer.state_dict()),
            precision,
            class_names(entry.weights, self._names, pair.num_classes),
        )

    def frames(self, entry: Exhibit, wish: Wish) -> Iterator[Growth]:
        """The pictures after each scale, coarse to fine. Raises MvarError."""
        ready = self.open(entry)
        labels_B = torch.tensor([picture.label for picture in wish.pictures])
        steps = generate_scales(ready.model, ready.tokenizer, labels_B, wish.options, wish.seeds)
        yield from self._scales(ready, [steps])

    def _scales(self, ready: ReadyModel, batches: Sequence[Iterator[ScaleSample]]) -> Iterator[Growth]:
        """All batches, a scale of each in turn."""
        scales = ready.model.pyramid.num_scales
        for scale in range(scales):
            parts = []
            for steps in batches:
                with self._computing(ready):
                    f_hat_BChw = next(steps).f_hat_BChw
                    if scale + 1 == scales:
                        next(steps, None)  # It looks whether all was finite.
                    parts.append(to_uint8(decoded(ready.tokenizer, f_hat_BChw, ready.precision)))
            yield Growth(scale, scales, np.concatenate(parts))

    def edited(self, exhibit: Exhibit, canvas: Canvas, wish: Wish) -> Iterator[Growth]:
        """A picture with a part redrawn, as often as is wished for, after each scale. Raises MvarError.

        On a CPU pictures are drawn one by one, as `mvar edit` does it, though in step.
        """
        ready = self.open(exhibit)
        labels_B = torch.tensor([picture.label for picture in wish.pictures])
        size = 1 if self.device.type == "cpu" else len(labels_B)
        with self._computing(ready):
            editing = Editing(ready.tokenizer, canvas.picture_HWC, canvas.redrawn_HW)
            batches = [
                generate_scales(
                    *(ready.model, ready.tokenizer, labels_B[first : first + size], wish.options),
                    *(wish.seeds[first : first + size],),
                    forced=editing.forced(),
                )
                for first in range(0, len(labels_B), size)
            ]
        for grown in self._scales(ready, batches):
            yield dataclasses.replace(grown, images_BHWC=editing.finish(grown.images_BHWC))

    def side_by_side(self, left: tuple[Exhibit, Wish], right: tuple[Exhibit, Wish]) -> Iterator[tuple[Growth, Growth]]:
        """The same classes and seeds in two ways, scale by scale in turn. Raises MvarError."""
        one, other = self.open(left[0]), self.open(right[0])
        if one.tokenizer_sha256 != other.tokenizer_sha256:
            raise ConfigError(
                f"{left[0].label} and {right[0].label} speak the codes of different tokenizers ({left[0].tokenizer}, "
                f"{right[0].tokenizer}), so the same seeds mean other pictures. Choose two checkpoints of one "
                "tokenizer."
            )
        yield from zip(self.frames(*left), self.frames(*right), strict=True)

    @contextmanager
    def _computing(self, ready: ReadyModel) -> Iterator[None]:
        """This thread alone computes, in the model's arithmetic."""
        with self._turn, torch.no_grad():
            if self.device.type == "cpu":
                torch.set_num_threads(1)
            arithmetic(ready.precision, self.device).apply()
            try:
                yield
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                raise BackendError("the GPU's memory is too small for so many images at once. Ask for fewer.") from None
