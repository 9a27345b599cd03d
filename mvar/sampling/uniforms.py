"""Uniform numbers as a pure function of counters, alike on every device.

Shapes: B images, L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS, VOCABULARY = 1, 2
"""Streams of numbers."""


def token_uniforms(seeds_B: Tensor, scale: int, tokens: int) -> Tensor:
    """One number in (0, 1) for each token of a scale: float64 (B, tokens)."""
    hash_BL = _token_hash(seeds_B, TOKENS, scale, tokens)
    return (_shift_right(hash_BL, 32).double() + 0.5) / 2**32


def vocabulary_uniforms(seeds_B: Tensor, scale: int, tokens: int, words: int) -> Tensor:
    """One number in (0, 1) for each token of a scale and each word: float32 (B, tokens, words)."""
    entries_V = torch.arange(words, device=seeds_B.device)
    hash_BLV = _mixed(_token_hash(seeds_B, VOCABULARY, scale, tokens).unsqueeze(-1) ^ entries_V)
    return (_shift_right(hash_BLV, 41).float() + 0.5) / 2**23


def _token_hash(seeds_B: Tensor, stream: int, scale: int, tokens: int) -> Tensor:
    hash_B = _mixed(_mixed(_mixed(seeds_B) ^ stream) ^ scale)
    return _mixed(hash_B.unsqueeze(-1) ^ torch.arange(tokens, device=seeds_B.device))


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on int64 that wraps around."""
    x = x + signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(number: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
