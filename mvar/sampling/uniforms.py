"""Uniform numbers as a pure function of counters, alike on every device.

Shapes: B images, L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar.randomness import GOLDEN, finalise

TOKENS, VOCABULARY = 1, 2
"""Streams of numbers."""


def token_uniforms(seeds_B: Tensor, scale: int, tokens: int) -> Tensor:
    """One number in (0, 1) for each token of a scale: float64 (B, tokens)."""
    hash_BL = _token_hash(seeds_B, TOKENS, scale, tokens)
    return (_shift_right(hash_BL, 32).double() + 0.5) / 2**32


def vocabulary_uniforms(seeds_B: Tensor, scale: int, tokens: int, vocab: int) -> Tensor:
    """One number in (0, 1) for each token of a scale and each entry of the vocabulary: float32 (B, tokens, V)."""
    entries_V = torch.arange(vocab, device=seeds_B.device)
    hash_BLV = _mixed(_token_hash(seeds_B, VOCABULARY, scale, tokens).unsqueeze(-1) ^ entries_V)
    return (_shift_right(hash_BLV, 41).float() + 0.5) / 2**23


def _token_hash(seeds_B: Tensor, stream: int, scale: int, tokens: int) -> Tensor:
    hash_B = _mixed(_mixed(_mixed(seeds_B) ^ stream) ^ scale)
    return _mixed(hash_B.unsqueeze(-1) ^ torch.arange(tokens, device=seeds_B.device))


def _mixed(x: Tensor) -> Tensor:
    """A step of SplitMix64 (Steele, Lea and Flood 2014), on int64 that wraps around."""
    return finalise(x + signed(GOLDEN), _shift_right, signed)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(number: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
