"""Selective activation checkpointing: what linear layers and attention gave is kept, all between is recomputed.

A block's linear layers cost nearly all of its time and leave about half of its memory; norms, gates, activations, the
convolution and Mamba's scan are cheap to do again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mvar.config import ActivationCheckpointing

_LINEAR = {"aten::mm", "aten::addmm", "mvar::linear_by_fp32"}
"""Linear layers. Batched products are Mamba's scan, which works in place and is done again as a whole."""
_ATTENTION = ("aten::_scaled_dot_product_", "torch_attn::_varlen_attn", "flash_attn::")


def recomputes(setting: ActivationCheckpointing, index: int) -> bool:
    """Whether block number `index` is recomputed in the backward pass: every one, or every n-th."""
    return setting != "off" and (setting in ("every", "selective") or index % int(setting) == 0)


def keeping_linears() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of torch.utils.checkpoint: what surrounds the forward pass and its repetition."""
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(_context: Any, operation: torch._ops.OpOverload, *_args: Any, **_options: Any) -> CheckpointPolicy:
    name = operation._schema.name
    kept = name in _LINEAR or name.startswith(_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
