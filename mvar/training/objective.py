"""What training minimises: cross entropy of every token of all scales, given the coarser scales (teacher forcing).

Shapes: B images, L tokens of all scales, V vocabulary, S scales, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.model.token_loss import TokenLosses
from mvar.run.world import on_device
from mvar.scales import ScalePyramid
from mvar.schedule import CurriculumPoint
from mvar.tokenizer.quantizer import Quantizer

ModelCall = Callable[..., Any]
"""An MVAR, or the DeepSpeed engine around one, called for losses: see MVAR.forward."""


@dataclass(frozen=True)
class Losses:
    """What one batch gave. All but `loss` are detached."""

    loss: Tensor
    """Mean over all tokens, nats, float32: what is minimised (with label smoothing, if there is any)."""
    loss_BS: Tensor
    """Sum of cross entropies over the tokens of each scale, float64."""
    correct_BS: Tensor
    """Tokens of each scale whose likeliest word is the right one, float64."""


class Objective:
    """Codes and labels -> losses, through the frozen quantizer (no parameters of the run) and the model.

    `label_smoothing` is for training: evaluation asks for plain cross entropies.
    """

    def __init__(self, quantizer: Quantizer, device: torch.device, label_smoothing: float = 0.0) -> None:
        self.pyramid = ScalePyramid(tuple(quantizer.patch_nums))
        self.quantizer = quantizer.to(device).requires_grad_(False).eval()
        self.device, self.label_smoothing = device, label_smoothing

    def __call__(
        self,
        model: ModelCall,
        codes_BL: Tensor,
        labels_B: Tensor,
        drop_path_DGB: Tensor | None = None,
        curriculum: CurriculumPoint | None = None,
    ) -> Losses:
        """`codes_BL`, `labels_B`: int64, labels already dropped; `drop_path_DGB`: see MVAR.forward.

        `curriculum`: with fewer scales than there are, only their tokens are computed; other sums are 0.
        """
        codes_BL = on_device(codes_BL, self.device)
        curriculum = curriculum or CurriculumPoint(self.pyramid.num_scales)
        begin, end = (self.pyramid.offsets[scale] for scale in (curriculum.scales - 1, curriculum.scales))
        with torch.no_grad():
            x_BLC = self.quantizer.inputs_from_codes(codes_BL)[:, : end - self.pyramid.lengths[0]]
        drop = None if drop_path_DGB is None else on_device(drop_path_DGB, self.device)
        found = model(
            on_device(labels_B, self.device),
            x_BLC,
            drop_path_DGB=drop,
            scales=range(curriculum.scales),
            codes_BL=codes_BL[:, :end],
            label_smoothing=self.label_smoothing if torch.is_grad_enabled() else 0.0,
        )
        losses = TokenLosses(*found)
        loss = losses.loss_BL.mean()
        if end < self.pyramid.total:  # The mean over all tokens, of which those of the scales to come count nothing.
            newest, known = losses.loss_BL[:, begin:].sum(), losses.loss_BL[:, :begin].sum()
            loss = (known + curriculum.newest_weight * newest) / codes_BL.numel()
        return Losses(loss, self._by_scale(losses.nll_BL), self._by_scale(losses.correct_BL))

    def _by_scale(self, values_BL: Tensor) -> Tensor:
        values_BL = F.pad(values_BL.double(), (0, self.pyramid.total - values_BL.shape[1]))
        parts = torch.split(values_BL, list(self.pyramid.lengths), dim=1)
        return torch.stack([part.sum(dim=1) for part in parts], dim=1)
