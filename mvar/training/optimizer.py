"""AdamW: which parameters decay, and who computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mvar.config import OptimConfig
from mvar.errors import BackendError
from mvar.schedule import decays


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for AdamW: parameters that decay, and the rest. Order is the model's."""
    groups: list[dict[str, Any]] = [{"params": [], "decays": True}, {"params": [], "decays": False}]
    for name, parameter in model.named_parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # Sharded parameters look empty.
        groups[0 if decays(name, dimensions) else 1]["params"].append(parameter)
    return groups


def make_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, lr: float, offloaded: dict[str, str]
) -> torch.optim.Optimizer:
    """AdamW as `optim.impl` says; `auto` is torch's fused one, or DeepSpeed's for the CPU where moments are offloaded.

    Raises BackendError where DeepSpeed's extension cannot be compiled, or NVIDIA apex is not installed.
    """
    impl = optim.impl
    if impl == "auto":
        impl = "deepspeed_cpu" if "offload_optimizer" in offloaded else "torch"
    settings: dict[str, Any] = {"lr": lr, "betas": optim.betas, "eps": optim.eps}
    if impl == "torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if impl == "apex":
        return _apex_adam(groups, settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    try:
        if impl == "deepspeed_cpu":
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)  # type: ignore[no-any-return]
        return FusedAdam(groups, adam_w_mode=True, **settings)  # type: ignore[no-any-return]
    except Exception as error:  # Whatever the compiler says.
        raise BackendError(
            f"optim.impl {impl}: DeepSpeed's extension cannot be compiled here ({type(error).__name__}: {error})."
            " Install g++ and ninja (and CUDA for the fused one), or set optim.impl=torch."
        ) from error


def _apex_adam(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise BackendError(
            f"optim.impl apex: NVIDIA apex is not installed here ({error}). Build it with its CUDA extensions"
            " (requirements-gpu.txt), or set optim.impl=torch."
        ) from None
    optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
    return optimizer
