"""Cross entropy of many tokens without all their logits at once.

The head and the loss run over chunks of tokens. In training a chunk's logits are not kept but computed again in the
backward pass (one more product with the head's weight, about a hundredth of a step). So there is one chunk of float32
logits at a time instead of all: with 64 images of 256 px and 4,096 words 128 MiB instead of 0.7 GiB, three times over.

Shapes: B batch, L tokens, C width, V vocabulary, N = B L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvar.model.kernels import fused

CHUNK = 8192
"""Tokens whose logits exist together."""


class TokenLosses(NamedTuple):
    """Of every token: `loss` is what training minimises, `nll` the plain cross entropy in nats, detached."""

    loss_BL: Tensor
    nll_BL: Tensor
    correct_BL: Tensor
    """bool: the likeliest word is the right one."""


def token_losses(head: nn.Module, features_BLC: Tensor, codes_BL: Tensor, smoothing: float) -> tuple[Tensor, ...]:
    """TokenLosses, as a plain tuple, of the words `codes_BL` given what the head is fed. float32.

    `smoothing`: share of the target that is spread evenly over all words (label smoothing, arXiv 1512.00567 section 7).
    """
    features, codes = features_BLC.flatten(0, 1).split(CHUNK), codes_BL.flatten().split(CHUNK)
    again = len(codes) > 1 and torch.is_grad_enabled()
    parts = []
    for features_NC, codes_N in zip(features, codes, strict=True):
        if again:
            found = checkpoint(
                _losses, head, features_NC, codes_N, smoothing, use_reentrant=False, preserve_rng_state=False
            )
            parts.append(found)
        else:
            parts.append(_losses(head, features_NC, codes_N, smoothing))
    return tuple(torch.cat(part).view_as(codes_BL) for part in zip(*parts, strict=True))


def _losses(head: nn.Module, features_NC: Tensor, codes_N: Tensor, smoothing: float) -> TokenLosses:
    return TokenLosses(*fused.token_losses(head(features_NC), codes_N, smoothing))
