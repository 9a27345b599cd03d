"""Selective activation checkpointing: what linear layers and attention gave is kept, all between is recomputed.

A block's linear layers cost nearly all of its time and leave about half of its memory; norms, gates, activations, the
convolution and Mamba's scan are cheap to do again.

torch has such contexts too, and wants the repetition to make every single call again, also those that it does not keep.
Under ZeRO 3 it does not: DeepSpeed gathers weights within a block when they are not there, which is not always so.
"""

from __future__ import annotations

from collections import defaultdict, deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mvar.config import ActivationCheckpointing

_LINEAR = {"aten::mm", "aten::addmm", "mvar::linear_by_fp32"}
"""Linear layers. Batched products are Mamba's scan, which works in place and is done again as a whole."""
_ATTENTION = ("aten::_scaled_dot_product_", "torch_attn::_varlen_attn", "flash_attn::")


def recomputes(setting: ActivationCheckpointing, index: int) -> bool:
    """Whether block number `index` is recomputed in the backward pass: every one, or every n-th."""
    return setting != "off" and (setting in ("every", "selective") or index % int(setting) == 0)


def keeping_linears() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of torch.utils.checkpoint: what surrounds the forward pass and its repetition."""
    kept: _Kept = defaultdict(deque)
    return _Keeping(kept), _Reusing(kept)


_Kept = defaultdict[Any, deque[tuple[Any, list[int]]]]
"""Of each operation what its calls gave, in their order, and how often each of these tensors had been changed then."""


class _Mode(TorchDispatchMode):
    """Below autograd, which sees the same calls either way."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What torch.compile makes is called within, and made outside."""
        return True


class _Keeping(_Mode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        found = operation(*args, **(options or {}))
        if _is_kept(operation):
            alias = tree_map_only(Tensor, _alias, found)
            self._kept[operation].append((alias, _versions(alias)))
        return found


class _Reusing(_Mode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        if not _is_kept(operation):
            return operation(*args, **(options or {}))
        found, versions = self._kept[operation].popleft()
        if _versions(found) != versions:
            raise RuntimeError(f"what {operation} gave was changed in place before the backward pass")
        return found


def _is_kept(operation: torch._ops.OpOverload) -> bool:
    name = operation._schema.name
    return name in _LINEAR or name.startswith(_ATTENTION)


def _alias(tensor: Tensor) -> Tensor:
    """Without autograd's part, which would hold everything that holds this; changes in place count for both."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(found: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
