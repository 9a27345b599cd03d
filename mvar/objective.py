"""What training minimises: cross entropy of every token of all scales, given the coarser scales (teacher forcing).

Shapes: B images, L tokens of all scales, V vocabulary, S scales, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.scales import ScalePyramid
from mvar.tokenizer.quantizer import Quantizer

ModelCall = Callable[..., Tensor]
"""An MVAR, or the DeepSpeed engine around one: (labels_B, x_BLC, drop_path_DGB=...) -> logits_BLV."""


@dataclass(frozen=True)
class Losses:
    """What one batch gave. All but `loss` are detached."""

    loss: Tensor
    """Mean cross entropy over all tokens, nats, float32: what is minimised."""
    loss_BS: Tensor
    """Sum of cross entropies over the tokens of each scale, float64."""
    correct_BS: Tensor
    """Tokens of each scale whose likeliest word is the right one, float64."""


class Objective:
    """Codes and labels -> losses, through the frozen quantizer (no parameters of the run) and the model."""

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        self.pyramid = ScalePyramid(tuple(quantizer.patch_nums))
        self.quantizer = quantizer.to(device).requires_grad_(False).eval()
        self.device = device

    def __call__(
        self, model: ModelCall, codes_BL: Tensor, labels_B: Tensor, drop_path_DGB: Tensor | None = None
    ) -> Losses:
        """`codes_BL`, `labels_B`: int64, labels already dropped; `drop_path_DGB`: see MVAR.forward."""
        codes_BL = codes_BL.to(self.device)
        with torch.no_grad():
            x_BLC = self.quantizer.inputs_from_codes(codes_BL)
        drop = None if drop_path_DGB is None else drop_path_DGB.to(self.device)
        logits_BLV = model(labels_B.to(self.device), x_BLC, drop_path_DGB=drop)
        loss_BL = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten(), reduction="none").view_as(codes_BL)
        correct_BL = logits_BLV.detach().argmax(dim=-1) == codes_BL
        return Losses(loss_BL.mean(), self._by_scale(loss_BL.detach()), self._by_scale(correct_BL))

    def _by_scale(self, values_BL: Tensor) -> Tensor:
        parts = torch.split(values_BL.double(), list(self.pyramid.lengths), dim=1)
        return torch.stack([part.sum(dim=1) for part in parts], dim=1)
