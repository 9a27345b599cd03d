"""Tells weights apart, whatever kind of file they were read from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over every name, shape and value of the tensors, as float32 unless they are whole numbers.

    So a checkpoint and its fp32 export have the same one. Tensors are digested in parallel.
    """
    names = sorted(state)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _digest(state[name]), names)
        lines = [f"{name} {list(state[name].shape)} {digest}\n" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(value: Tensor) -> str:
    plain = value.detach().cpu()
    plain = (plain.float() if plain.is_floating_point() else plain).contiguous()
    return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
