"""A picture of a user's, redrawn in part: what is known of it is forced on the sampler, and put back into the result.

The pixels that are to be redrawn are hidden first: what was there is nowhere in the result. Then the picture is
encoded, and the tokens of its known part are given (see `mvar.sampling.forcing`).

The decoder has normalisation and attention over the whole map, so a drawn token changes every pixel, if only faintly
far away. Therefore the known part is put back: from `edge_px` pixels beyond the redrawn area on, the result is the
tokenizer's reconstruction of the picture (or the picture itself), byte for byte; within it goes over.

Shapes: B images, C channels, H = W side of the picture in pixels, h = w side of the feature map.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mvar.errors import ConfigError
from mvar.images.arrays import Bytes, from_uint8, to_uint8
from mvar.model.kernels.arithmetic import ieee
from mvar.model.transformer import MVAR
from mvar.sampling.canvas import Redrawn
from mvar.sampling.forcing import Across, ForcedCodes, ForcedResidual, Forcing, known_cells, known_tokens
from mvar.sampling.options import DEFAULTS, SamplingOptions
from mvar.sampling.sampler import Forced, generate_latent
from mvar.tokenizer.vqvae import VQVAE

Keep = Literal["reconstruction", "pixels", "nothing"]


@dataclass(frozen=True)
class EditOptions:
    """How the known part is kept. Raises ConfigError for what cannot be."""

    forcing: Forcing = "residual"
    """Known tokens are quantized anew against what was drawn around them, or the picture's own codes."""
    across: Across = "drawn"
    """Tokens that lie across the edge are drawn, which leaves freedom, or given, which keeps the known part best."""
    keep: Keep = "reconstruction"
    """What is put back: the tokenizer's reconstruction, the picture's own pixels, or nothing: as the codes decode."""
    edge_px: int | None = None
    """Pixels beyond the redrawn area in which what is drawn goes over into what is kept; None: half a cell."""
    vary: int | None = None
    """Scales before this one are the picture's everywhere: the same layout, new detail. Nothing is hidden then."""

    def __post_init__(self) -> None:
        for name, known in (("forcing", Forcing), ("across", Across), ("keep", Keep)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(get_args(known))}.")
        if self.edge_px is not None and self.edge_px < 0:
            raise ConfigError(f"edge {self.edge_px}: expected a number of pixels, from 0.")


class Editing:
    """A picture, encoded and ready to be redrawn, on the tokenizer's device.

    `picture`: uint8 (H, W, 3) of the tokenizer's size; `redrawn`: bool (H, W). Raises ConfigError.
    """

    def __init__(
        self, tokenizer: VQVAE, picture_HWC: Bytes, redrawn_HW: Redrawn, options: EditOptions | None = None
    ) -> None:
        self.options = options = options or EditOptions()
        self._quantizer = quantizer = tokenizer.quantizer
        size, scales = tokenizer.image_size, quantizer.pyramid.num_scales
        if picture_HWC.shape != (size, size, 3) or redrawn_HW.shape != (size, size):
            raise ConfigError(
                f"edit: got a picture of shape {picture_HWC.shape} and a mask of shape {redrawn_HW.shape}, expected"
                f" ({size}, {size}, 3) and ({size}, {size}): this tokenizer takes {size} px pictures."
            )
        if options.vary is not None and not 1 <= options.vary < scales:
            raise ConfigError(f"vary {options.vary}: the scales that can be redrawn from are 1 to {scales - 1}.")
        if not redrawn_HW.any():
            raise ConfigError("mask: empty, so nothing is to be redrawn. Mark what is, with white or a box.")
        redrawn = torch.from_numpy(np.array(redrawn_HW, dtype=bool))
        known_hw = known_cells(~redrawn, quantizer.side)
        if options.vary is None and not bool(known_hw.any()):
            cell = tokenizer.downsampling
            raise ConfigError(
                f"mask: full, or nearly: no cell of {cell} x {cell} pixels lies outside of it, so nothing is known of"
                " the picture. Mark less, give vary, or draw a new picture with mvar sample."
            )
        device = quantizer.embedding.weight.device
        shown_1CHW = from_uint8(np.array(picture_HWC)[None])
        if options.vary is None:
            shown_1CHW = hidden(shown_1CHW, redrawn)
        with torch.no_grad(), ieee(device):
            self._features_1Chw = tokenizer.features(shown_1CHW.to(device))
        self._tokens_S = known_tokens(
            quantizer, known_hw.to(device), across=options.across, whole_scales=options.vary or 0
        )
        self.picture_HWC, self._redrawn_HW = np.array(picture_HWC), redrawn_HW
        codes_1L = quantizer.encode(self._features_1Chw)
        self.reconstruction_HWC = to_uint8(tokenizer.decode(codes_1L))[0]
        """What the tokenizer makes of the picture, hidden parts painted over."""
        edge_px = tokenizer.downsampling // 2 if options.edge_px is None else options.edge_px
        self.drawn_share_HW = drawn_share(redrawn, edge_px)
        """float32 (H, W), of what is drawn in each pixel of the result: 1 where it is redrawn, 0 beyond the edge."""
        self._kept_HWC = self.picture_HWC if options.keep == "pixels" else self.reconstruction_HWC

    def forced(self) -> Forced:
        """The tokens that are given, for one drawing."""
        kind = ForcedResidual if self.options.forcing == "residual" else ForcedCodes
        return kind(self._quantizer, self._features_1Chw, self._tokens_S)

    def marked(self, picture_HWC: Bytes) -> Bytes:
        """A picture with what is redrawn paled, to look at, unless that is all: uint8 (H, W, 3)."""
        if self._redrawn_HW.all():
            return picture_HWC
        marked: Bytes = np.where(self._redrawn_HW[..., None], picture_HWC // 4 + 160, picture_HWC).astype(np.uint8)
        return marked

    def finish(self, drawn_BHWC: Bytes) -> Bytes:
        """Put the known part back into pictures: uint8 (B, H, W, 3)."""
        if self.options.keep == "nothing":
            return drawn_BHWC
        share_HW1 = self.drawn_share_HW[..., None].astype(np.float64)
        mixed_BHWC = share_HW1 * drawn_BHWC + (1 - share_HW1) * self._kept_HWC
        mixed: Bytes = mixed_BHWC.round().astype(np.uint8)
        return mixed


def edit(
    model: MVAR,
    tokenizer: VQVAE,
    picture_HWC: Bytes,
    redrawn_HW: Redrawn,
    labels_B: Tensor,
    options: SamplingOptions = DEFAULTS,
    seeds: Iterable[int] | None = None,
    how: EditOptions | None = None,
) -> Bytes:
    """Redraw a part of a picture, once for each label: uint8 (B, H, W, 3).

    `picture`: uint8 (H, W, 3) of the tokenizer's size; `redrawn`: bool (H, W); `labels_B`: int64 classes, `num_classes`
    for none; `options`, `seeds`: as in `generate`. `mvar.sampling.canvas.Canvas` makes both of files. Raises
    ConfigError for arguments that do not fit together, MvarError for logits that are not finite.
    """
    editing = Editing(tokenizer, picture_HWC, redrawn_HW, how)
    latent_BChw = generate_latent(model, tokenizer, labels_B, options, seeds, forced=editing.forced())
    return editing.finish(to_uint8(tokenizer.decode_latent(latent_BChw)))


def hidden(images_1CHW: Tensor, redrawn_HW: Tensor) -> Tensor:
    """A picture (1, C, H, W) with what is to be redrawn, bool (H, W), painted over from its edges inward.

    Ring by ring, each pixel is the mean of the neighbours painted before, so the encoder meets no edge that is none.
    """
    known_11HW = (~redrawn_HW).float()[None, None]
    painted_1CHW = images_1CHW * known_11HW
    while bool((known_11HW == 0).any()):
        near_11HW = F.avg_pool2d(known_11HW, 3, stride=1, padding=1)
        if not bool((near_11HW > known_11HW).any()):  # Nothing is known at all.
            break
        mean_1CHW = F.avg_pool2d(painted_1CHW, 3, stride=1, padding=1) / near_11HW.where(near_11HW > 0, 1)
        ring_11HW = (known_11HW == 0) & (near_11HW > 0)
        painted_1CHW = torch.where(ring_11HW, mean_1CHW, painted_1CHW)
        known_11HW = (near_11HW > 0).float()
    return painted_1CHW


def drawn_share(redrawn_HW: Tensor, edge_px: int) -> NDArray[np.float32]:
    """1 in the redrawn area, bool (H, W), falling linearly to 0 at more than `edge_px` pixels from it: float32."""
    reached_11HW = redrawn_HW.float()[None, None]
    total_11HW = reached_11HW.clone()
    for _ in range(edge_px):
        reached_11HW = F.max_pool2d(reached_11HW, 3, stride=1, padding=1)
        total_11HW += reached_11HW
    share: NDArray[np.float32] = (total_11HW[0, 0] / (edge_px + 1)).numpy()
    return share
