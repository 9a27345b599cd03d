"""A number that stands for all bits of a tensor, computed where the tensor lies.

The bit patterns are taken as integers, each is multiplied by an odd number that belongs to its place, and all are added
up modulo 2^64: in whatever order a device adds, with the same result. An odd factor loses no bit, so one element that
differs always shows; of differences in many, one in some 2^64 does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mvar.randomness import GOLDEN, hash64

CHUNK = 1 << 20
"""Elements hashed at once: what they are multiplied by takes 8 MiB, and a product as much."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NEXT = GOLDEN - 2**64
"""As an int64; odd."""


@torch.no_grad()
def hashes_of(tensors: Sequence[Tensor]) -> Tensor:
    """int64, one for each tensor, on their device. Values and their order count; shapes and padding do not."""
    return torch.stack([_hash_of(tensor) for tensor in tensors])


def hash_of_all(tensors: Sequence[Tensor]) -> int:
    """One number for all of them."""
    return int(_hash_of(hashes_of(tensors)))


def _hash_of(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(CHUNK):
        total = total * _NEXT + (chunk * _factors(bits.device)[: len(chunk)]).sum()
    return total


@cache
def _factors(device: torch.device) -> Tensor:
    factors = hash64(0, "bits", np.arange(CHUNK)) | np.uint64(1)
    return torch.from_numpy(factors.view(np.int64)).to(device)
