"""What the tokenizer's training minimises: a list of named, weighted terms.

A term is any callable from a `Reconstruction` to a scalar, a frozen network too. The adversarial term is no entry of
the list: it learns, and its weight depends on the others (see mvar.tokenizer.training.discriminator).

Legend: B images, C channels, H = W side of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mvar.tokenizer.quantizer import Quantized


@dataclass(frozen=True)
class Reconstruction:
    """A batch and what the tokenizer made of it: float32 pictures in [-1, 1], the reconstructed ones not clamped."""

    images_BCHW: Tensor
    reconstructed_BCHW: Tensor
    quantized: Quantized


class LossTerm(NamedTuple):
    """`function` gives a scalar, a mean over the images; the total adds `weight` times it.

    On a CPU it may be called from several threads at once, each with a part of the batch. `of_latents`: it looks at
    what was quantized, not at the reconstructed pictures, so the decoder learns nothing from it.
    """

    name: str
    weight: float
    function: Callable[[Reconstruction], Tensor]
    of_latents: bool = False


def absolute_error(batch: Reconstruction) -> Tensor:
    """Mean |difference| of pixels: keeps edges crisp."""
    return (batch.reconstructed_BCHW - batch.images_BCHW).abs().mean()


def squared_error(batch: Reconstruction) -> Tensor:
    """Mean squared difference of pixels: what PSNR measures."""
    return (batch.reconstructed_BCHW - batch.images_BCHW).square().mean()


def codebook_error(batch: Reconstruction) -> Tensor:
    """How far words and phi are from the features."""
    return batch.quantized.codebook_loss


def commitment_error(batch: Reconstruction) -> Tensor:
    """How far the features are from their words."""
    return batch.quantized.commitment_loss


def total_loss(terms: Sequence[LossTerm], batch: Reconstruction) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, with its gradient, and every term alone, unweighted and detached."""
    values = {term.name: term.function(batch) for term in terms}
    total = sum((term.weight * values[term.name] for term in terms), start=batch.reconstructed_BCHW.new_zeros(()))
    return total, {name: value.detach() for name, value in values.items()}
