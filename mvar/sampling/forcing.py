"""The tokens of a picture's known part, given to the sampler scale by scale; the sampler draws the others.

A token is an average over an area of the feature map, at coarse scales a large one. One that lies across the edge of
the known part is drawn, which leaves the class a say in the layout; or it is given, which keeps the known part best.

What a token adds to the feature map spreads beyond its area, through the bicubic enlargement and the phi convolution.
Where drawn tokens spread into the known part, the picture's own codes ("codes", the way of VAR, arXiv 2404.02905) do
not sum up to it any more. "residual" goes on with the tokenizer's residual encoding (Algorithm 1 there): at each scale
it takes the word nearest to what the map as it really is, drawn tokens included, still lacks. Where nothing is drawn,
both are the picture's codes.

Shapes: B images (1: the same for all), C latent channels, h = w side of the feature map, S scales, Lk tokens of scale
k, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.tokenizer.quantizer import Quantizer

Forcing = Literal["residual", "codes"]
Across = Literal["given", "drawn"]
"""What tokens are whose area is known in part."""


def known_tokens(
    quantizer: Quantizer, known_hw: Tensor, *, across: Across = "drawn", whole_scales: int = 0
) -> tuple[Tensor, ...]:
    """Which tokens of each scale are given, bool (1, Lk): those of known cells, and of the first `whole_scales` all.

    `known`: bool (h, w), cells of the feature map.
    """
    tokens_S: list[Tensor] = []
    for scale in range(quantizer.pyramid.num_scales):
        known = torch.ones_like(known_hw) if scale < whole_scales else known_hw
        share_1Lk = quantizer.shrunk(known.float()[None, None], scale).flatten(1)
        # Of tokens with an unknown cell the share is below 1 by far more than rounding.
        tokens_S.append(share_1Lk > (0 if across == "given" else 1 - 1e-5))
    return tuple(tokens_S)


def known_cells(known_HW: Tensor, side: int) -> Tensor:
    """Cells of a feature map all of whose pixels are known: bool (H, W) -> bool (side, side)."""
    unknown_11hw = F.adaptive_max_pool2d((~known_HW).float()[None, None], side)
    return unknown_11hw[0, 0] == 0


class ForcedResidual:
    """At each scale the words nearest to what the map so far lacks (`Forced` of one drawing).

    `features` (B, C, h, w): what the tokenizer quantizes of the picture; `tokens_S`: which are given.
    """

    def __init__(self, quantizer: Quantizer, features_BChw: Tensor, tokens_S: Sequence[Tensor]) -> None:
        self._quantizer, self._tokens_S = quantizer, tokens_S
        self._rest_BChw = features_BChw.float()

    def given(self, scale: int) -> tuple[Tensor, Tensor]:
        rows_BLkC = self._quantizer.shrunk(self._rest_BChw, scale).flatten(2).transpose(1, 2)
        codes_N = self._quantizer.nearest(rows_BLkC.reshape(-1, rows_BLkC.shape[2]))
        return self._tokens_S[scale], codes_N.view(rows_BLkC.shape[:2])

    def added(self, scale: int, vectors_BLkC: Tensor) -> None:
        # One by one, as the encoder does: a sum taken at once would be rounded otherwise.
        self._rest_BChw = self._rest_BChw - self._quantizer.contribution(vectors_BLkC, scale)


class ForcedCodes:
    """The picture's own codes, whatever was drawn around them (`Forced` of one drawing); see ForcedResidual."""

    def __init__(self, quantizer: Quantizer, features_BChw: Tensor, tokens_S: Sequence[Tensor]) -> None:
        self._tokens_S, self._segment = tokens_S, quantizer.pyramid.segment
        self._codes_BL = quantizer.encode(features_BChw)

    def given(self, scale: int) -> tuple[Tensor, Tensor]:
        return self._tokens_S[scale], self._codes_BL[:, self._segment(scale)]

    def added(self, scale: int, vectors_BLkC: Tensor) -> None:
        pass
