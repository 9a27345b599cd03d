"""The tokens of a picture's known part, given to the sampler scale by scale; the sampler draws the others.

A token is an average over an area of the feature map, at coarse scales a large one. One that lies across the edge of
the known part is drawn, which leaves the class a say in the layout; or it is given, which keeps the known part best.

What a token adds to the feature map spreads beyond its area, through the bicubic enlargement and the phi convolution.
Where drawn tokens spread into the known part, the picture's own codes ("codes", the way of VAR, arXiv 2404.02905) do
not sum up to it any more. "residual" goes on with the tokenizer's residual encoding (Algorithm 1 there): at each scale
it takes the word nearest to what the map as it really is, drawn tokens included, still lacks, on the known cells alone.
Where nothing is drawn, both are the picture's codes.

Shapes: B images (1: the same for all), C latent channels, h = w side of the feature map, S scales, Lk tokens of scale
k, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.tokenizer.quantizer import Quantizer

Forcing = Literal["residual", "codes"]
Across = Literal["given", "drawn"]
"""What tokens are whose area is known in part."""


@dataclass(frozen=True)
class KnownTokens:
    """What is known of a picture at each scale."""

    cells_S: tuple[Tensor | None, ...]
    """float32 (1, 1, h, w): 1 at cells that tokens of the scale are made of, 0 at others; None: all."""
    tokens_S: tuple[Tensor, ...]
    """bool (1, Lk): the tokens that are given."""

    @classmethod
    def of(
        cls, quantizer: Quantizer, known_hw: Tensor, *, across: Across = "drawn", whole_scales: int = 0
    ) -> KnownTokens:
        """`known`: bool (h, w), cells of the feature map; of the first `whole_scales` scales all are known."""
        cells: list[Tensor | None] = []
        tokens: list[Tensor] = []
        for scale in range(quantizer.pyramid.num_scales):
            whole = scale < whole_scales or bool(known_hw.all())
            known_11hw = (torch.ones_like(known_hw) if whole else known_hw).float()[None, None]
            share_1Lk = quantizer.shrunk(known_11hw, scale).flatten(1)
            cells.append(None if whole else known_11hw)
            # Of tokens with an unknown cell the share is below 1 by far more than rounding.
            tokens.append(share_1Lk > (0 if across == "given" else 1 - 1e-5))
        return cls(tuple(cells), tuple(tokens))


def known_cells(known_HW: Tensor, side: int) -> Tensor:
    """Cells of a feature map all of whose pixels are known: bool (H, W) -> bool (side, side)."""
    unknown_11hw = F.adaptive_max_pool2d((~known_HW).float()[None, None], side)
    return unknown_11hw[0, 0] == 0


class ForcedResidual:
    """At each scale the words nearest to what the map so far lacks, on the known cells (`Forced` of one drawing)."""

    def __init__(self, quantizer: Quantizer, features_BChw: Tensor, known: KnownTokens) -> None:
        self._quantizer, self._known = quantizer, known
        self._rest_BChw = features_BChw.float()

    def given(self, scale: int) -> tuple[Tensor, Tensor]:
        cells_11hw, rest_BChw, shrunk = self._known.cells_S[scale], self._rest_BChw, self._quantizer.shrunk
        if cells_11hw is None:
            rows_BChw = shrunk(rest_BChw, scale)
        else:
            known_11hw = shrunk(cells_11hw, scale)
            rows_BChw = shrunk(rest_BChw * cells_11hw, scale) / known_11hw.where(known_11hw > 0, 1)
        rows_BLC = rows_BChw.flatten(2).transpose(1, 2)
        codes_N = self._quantizer.nearest(rows_BLC.reshape(-1, rows_BLC.shape[2]))
        return self._known.tokens_S[scale], codes_N.view(rows_BLC.shape[:2])

    def added(self, scale: int, vectors_BLkC: Tensor) -> None:
        # One by one, as the encoder does: a sum taken at once would be rounded otherwise.
        self._rest_BChw = self._rest_BChw - self._quantizer.contribution(vectors_BLkC, scale)


class ForcedCodes:
    """The picture's own codes, whatever was drawn around them (`Forced` of one drawing)."""

    def __init__(self, quantizer: Quantizer, features_BChw: Tensor, known: KnownTokens) -> None:
        self._known, self._segment = known, quantizer.pyramid.segment
        self._codes_BL = quantizer.encode(features_BChw)

    def given(self, scale: int) -> tuple[Tensor, Tensor]:
        return self._known.tokens_S[scale], self._codes_BL[:, self._segment(scale)]

    def added(self, scale: int, vectors_BLkC: Tensor) -> None:
        pass
