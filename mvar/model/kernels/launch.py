"""When our Triton kernels can be taken, and how their work is cut. Importable without Triton.

Nothing is timed to choose a configuration: warps follow from the width, runs of rows from the shape alone, so that a
sum is taken in the same order on every card and in every run.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 8192
"""Elements of a row that fit into the registers of one program."""
WARPS_MAX = 16
ELEMENTS_PER_THREAD = 8
THREADS_PER_WARP = 32


def obstacle(*tensors: Tensor | None, width: int = 1) -> str | None:
    """Why our kernels cannot take these tensors, None if they can. `width`: elements of a row."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cuda and not _interpreted():
            return f"tensors on {tensor.device}, not on a CUDA device"
        if tensor.dtype not in DTYPES:
            return f"no kernels for {tensor.dtype}"
    if width > WIDEST:
        return f"rows of {width} elements, more than {WIDEST}"
    return None if _installed() else "the package triton is not installed"


def usable(*tensors: Tensor | None, width: int = 1) -> bool:
    """Whether our kernels can take these tensors; `obstacle` says why not."""
    return obstacle(*tensors, width=width) is None


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def block(width: int) -> int:
    """The power of two that a row of `width` fits into."""
    return 1 << (width - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a program that holds `elements` of each tensor at once."""
    return min(WARPS_MAX, max(1, elements // (ELEMENTS_PER_THREAD * THREADS_PER_WARP)))


def cut(items: int, programs: int, multiple: int = 1) -> tuple[int, int]:
    """How many runs, and how many items in each but the last, when `programs` shall share `items`."""
    each = -(-items // max(1, min(programs, -(-items // multiple))))
    each = -(-each // multiple) * multiple
    return -(-items // each), each


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which kernels start on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rows(x_BLC: Tensor) -> Tensor:
    """(B, L, C) as (B*L, C) whose rows are contiguous and evenly spaced; a copy only where the strides demand it."""
    if x_BLC.stride(-1) == 1 or x_BLC.shape[-1] == 1:
        try:
            return x_BLC.view(-1, x_BLC.shape[-1])
        except RuntimeError:
            pass  # rows that no single stride reaches
    return x_BLC.contiguous().view(-1, x_BLC.shape[-1])
