"""Care of the codebook while it is trained: a start made of encoder outputs, usage, new life for dead words.

Legend: V words, S scales, L tokens of all scales, Lk tokens of scale k, B images, N rows, C latent channels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mvar.randomness import uniform
from mvar.tokenizer.quantizer import Quantizer


class Rows(Protocol):
    """Vectors (N, C): a tensor, or rows that lie on several ranks (mvar.tokenizer.training.parallel)."""

    def __len__(self) -> int: ...

    def __getitem__(self, places_W: Tensor) -> Tensor:
        """(W, C)."""


START_ROUNDS = 4
"""Rounds of the start: residuals of finer scales are only known once the coarser ones have words."""


@torch.no_grad()
def start_codebook_(quantizer: Quantizer, f_BChw: Tensor, seed: int) -> None:
    """Set all words to vectors that the encoder produces, and usage to uniform. A pure function of (weights, f, seed).

    The first round draws words from averages of the feature map over the areas of each scale; each further round gives
    the words that nobody uses to what the others leave over.
    """
    lengths_S = torch.tensor(quantizer.pyramid.lengths, dtype=torch.float32, device=f_BChw.device)
    quantizer.ema_vocab_hit_SV.copy_((lengths_S / quantizer.vocab_size)[:, None])
    rows_NC = torch.cat(
        [quantizer.shrunk(f_BChw.float(), k).flatten(2).mT.flatten(0, 1) for k in range(len(lengths_S))]
    )
    entries_V = torch.arange(quantizer.vocab_size, device=f_BChw.device)
    quantizer.embedding.weight[entries_V] = _drawn(rows_NC, entries_V, seed, "codebook_start", 0)
    for number in range(1, START_ROUNDS):
        quantized = quantizer(f_BChw)
        unused_W = (torch.bincount(quantized.codes_BL.flatten(), minlength=quantizer.vocab_size) == 0).nonzero()[:, 0]
        rows_NC = torch.cat(quantized.residuals_k)
        quantizer.embedding.weight[unused_W] = _drawn(rows_NC, unused_W, seed, "codebook_start", number)


@torch.no_grad()
def count_usage_(quantizer: Quantizer, counts_SV: Tensor, images: int, decay: float) -> None:
    """Move the moving average of uses per image, by scale and word, towards a batch with these counts (float32)."""
    quantizer.ema_vocab_hit_SV.mul_(decay).add_(counts_SV / images, alpha=1 - decay)


def usage_SV(quantizer: Quantizer, codes_BL: Tensor) -> Tensor:
    """How often each scale uses each word, float32 counts."""
    segments = [codes_BL[:, quantizer.pyramid.segment(k)] for k in range(quantizer.pyramid.num_scales)]
    return torch.stack([torch.bincount(codes.flatten(), minlength=quantizer.vocab_size) for codes in segments]).float()


@torch.no_grad()
def revive_(quantizer: Quantizer, residuals_NC: Rows, below: float, seed: int, step: int) -> Tensor:
    """Replace dead words by residuals that a batch had to quantize. Returns the words, int64 (W,).

    Residuals are drawn by a hash of (seed, step, word).
    A word is dead if it is used less than `below` times as often as it would be if all were used alike. A revived word
    starts with the usage of the average word.
    """
    used_V = quantizer.ema_vocab_hit_SV.sum(dim=0)
    dead_W = (used_V < below * used_V.mean()).nonzero()[:, 0]
    quantizer.embedding.weight[dead_W] = _drawn(residuals_NC, dead_W, seed, "revive", step)
    quantizer.ema_vocab_hit_SV[:, dead_W] = quantizer.ema_vocab_hit_SV.mean(dim=1, keepdim=True)
    return dead_W


def _drawn(rows_NC: Rows, entries_W: Tensor, seed: int, stream: str, step: int) -> Tensor:
    """One of the rows for each word."""
    picks = (uniform(seed, stream, step, entries_W.cpu().numpy()) * len(rows_NC)).astype(np.int64)
    return rows_NC[torch.from_numpy(picks).to(entries_W.device)]
