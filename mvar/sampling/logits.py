"""From logits to codes: the unlikely ones filtered out, one drawn for each token, or code vectors mixed.

Shapes: B images, L tokens, K likeliest codes, V vocabulary, C latent channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar.model.kernels.arithmetic import running_sum
from mvar.sampling.uniforms import vocabulary_uniforms


def filter_logits(logits_BLV: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for what is not among the `top_k` largest (ties stay), then for the tail that holds 1 - `top_p`.

    A code goes if the probability of all codes up to and including it, the least likely first, is at most 1 - top_p. Of
    equally likely codes the lowest index goes first.
    """
    vocab = logits_BLV.shape[-1]
    count = top_k if 0 < top_k < vocab else vocab
    nucleus = 0 < top_p < 1
    if count == vocab and not nucleus:
        return logits_BLV
    ascending_BLK = logits_BLV.topk(count, dim=-1).values.flip(-1)
    threshold_BL1, ties_BL1 = ascending_BLK[..., :1], None
    if nucleus:
        threshold_BL1, ties_BL1 = _nucleus(logits_BLV, ascending_BLK, 1 - top_p)
    removed_BLV = logits_BLV < threshold_BL1
    # Ties are rare. Where the host computes it may look; a device would be waited for.
    if ties_BL1 is not None and (ties_BL1.device.type != "cpu" or bool(ties_BL1.any())):
        tied_BLV = logits_BLV == threshold_BL1
        removed_BLV |= tied_BLV & (tied_BLV.cumsum(dim=-1, dtype=torch.int32) <= ties_BL1)
    return logits_BLV.masked_fill(removed_BLV, -torch.inf)


def _nucleus(logits_BLV: Tensor, ascending_BLK: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """The least likely code's logit outside the tail, and how many codes of just that logit belong to the tail.

    `ascending`: the largest logits, sorted. Words that tie with the smallest of them count too, though not listed.
    """
    least_BL1 = ascending_BLK[..., :1]
    listed_BL1 = (ascending_BLK == least_BL1).sum(-1, keepdim=True)
    unlisted_BL1 = (logits_BLV == least_BL1).sum(-1, keepdim=True) - listed_BL1
    weights_BLK = (ascending_BLK - ascending_BLK[..., -1:]).exp()
    total_BL1 = weights_BLK.sum(-1, keepdim=True) + unlisted_BL1 * weights_BLK[..., :1]
    share_BLK = weights_BLK / total_BL1
    below_BLK = running_sum(share_BLK, -1) + unlisted_BL1 * share_BLK[..., :1]
    gone_BL1 = (below_BLK <= tail).sum(-1, keepdim=True).clamp_max(ascending_BLK.shape[-1] - 1)
    threshold_BL1 = ascending_BLK.gather(-1, gone_BL1)
    places_K = torch.arange(ascending_BLK.shape[-1], device=ascending_BLK.device)
    ties_BL1 = ((ascending_BLK == threshold_BL1) & (places_K < gone_BL1)).sum(-1, keepdim=True)
    unlisted_gone_BL1 = (tail / share_BLK[..., :1]).floor().clamp_max(unlisted_BL1).to(ties_BL1.dtype)
    unlisted_gone_BL1 = torch.where(gone_BL1 > 0, unlisted_BL1, unlisted_gone_BL1)
    return threshold_BL1, torch.where(threshold_BL1 == least_BL1, ties_BL1 + unlisted_gone_BL1, ties_BL1)


def draw_codes(logits_BLV: Tensor, uniforms_BL: Tensor) -> Tensor:
    """Inverse of the cumulative distribution, in the vocabulary's order: int64 (B, L).

    float64 sums and the fixed order keep rounding of the logits from changing a draw, but for about one in a million.
    """
    cumulated_BLV = running_sum(logits_BLV.softmax(dim=-1), -1, torch.float64)
    aim_BL1 = (uniforms_BL * cumulated_BLV[..., -1]).unsqueeze(-1)
    # Without the bound, logits that are not finite would name a word that there is none of.
    return torch.searchsorted(cumulated_BLV, aim_BL1, right=True).squeeze(-1).clamp_max(logits_BLV.shape[-1] - 1)


def mix_code_vectors(logits_BLV: Tensor, vectors_VC: Tensor, seeds_B: Tensor, scale: int, progress: float) -> Tensor:
    """A Gumbel-softmax mixture of code vectors for each token, sharper from scale to scale: (B, L, C) float32."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    uniforms_BLV = vocabulary_uniforms(seeds_B, scale, logits_BLV.shape[1], logits_BLV.shape[2])
    noise_BLV = -torch.log(-torch.log(uniforms_BLV))
    weights_BLV = ((logits_BLV * (1 + progress) + noise_BLV) / temperature).softmax(dim=-1)
    return weights_BLV.float() @ vectors_VC.float()
