"""How large a model is, read off the model itself: the real class, built on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mvar.config import ModelConfig
from mvar.model.transformer import MVAR
from mvar.scales import ScalePyramid
from mvar.schedule import decays

IMAGENET_IMAGES = 1_281_167
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Sizes:
    """A model's parameters and geometry."""

    model: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter, in the model's order."""

    @classmethod
    def of(cls, model: ModelConfig) -> Sizes:
        """Nothing is allocated. Without `num_classes` the model has ImageNet's."""
        model = model.model_copy(update={"num_classes": model.num_classes or IMAGENET_CLASSES})
        assert model.num_classes is not None
        # Kernels are a matter of running it; any machine may plan for any other.
        portable = model.model_copy(
            update={"attention_backend": "auto", "mamba_backend": "auto", "norm_backend": "torch"}
        )
        with torch.device("meta"):
            built = MVAR.from_config(portable, num_classes=model.num_classes)
        return cls(model, {name: tuple(p.shape) for name, p in built.named_parameters()})

    @property
    def parameters(self) -> int:
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Elements of each parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def groups(self) -> tuple[list[int], list[int]]:
        """Elements of each parameter of the optimizer's two groups: those that decay, and the rest."""
        found: tuple[list[int], list[int]] = ([], [])
        for name, shape in self.shapes.items():
            found[0 if decays(name, len(shape)) else 1].append(math.prod(shape))
        return found

    @property
    def width(self) -> int:
        return self.model.resolved_width

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return self._pyramid.lengths

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self._pyramid.total

    @property
    def _pyramid(self) -> ScalePyramid:
        return ScalePyramid(self.model.patch_nums)
