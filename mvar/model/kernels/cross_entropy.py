"""Cross entropy of chosen words, with what is reported beside it.

One pass over the logits on a GPU, plain torch elsewhere; both compute wide and take pure tensors.
Shapes: N tokens of all images, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.model.kernels.launch import usable


def cross_entropy(logits_NV: Tensor, codes_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: the loss with label smoothing; the plain cross entropy in nats, detached; whether the likeliest
    word is the right one.

    `codes_N`: int64 in [0, V). On a GPU any other gives NaN.
    """
    if usable(logits_NV, width=logits_NV.shape[-1]):
        from mvar.model.kernels.cross_entropy_triton import fused

        return fused(logits_NV, codes_N, smoothing)
    return plain_cross_entropy(logits_NV, codes_N, smoothing)


def plain_cross_entropy(logits_NV: Tensor, codes_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy` in torch's own operations."""
    loss_N = F.cross_entropy(logits_NV, codes_N, reduction="none", label_smoothing=smoothing)
    with torch.no_grad():
        nll_N = F.cross_entropy(logits_NV, codes_N, reduction="none") if smoothing else loss_N.detach()
        correct_N = logits_NV.argmax(dim=-1) == codes_N
    return loss_N, nll_N, correct_N
