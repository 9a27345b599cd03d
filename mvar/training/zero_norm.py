"""The gradient's norm in a few kernels, where DeepSpeed 0.19 asks for it parameter by parameter.

ZeRO 1 and 2 look at each gradient's extremes and then take its norm, eleven kernels a parameter: at depth 16 some 3,600
that take the host longer to launch than the device to run, while the device has nothing else to do. A norm over all
gradients says both how long they are and whether they are finite, and DeepSpeed skips a step for a norm that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Norm = Callable[..., Tensor]


def shorten(zero: Any) -> None:
    """Give a ZeRO optimizer our norm. One that keeps its gradients elsewhere, or has another way, is left as it is."""
    kind = type(zero).__name__
    if kind == "DeepSpeedZeroOptimizer" and not zero.cpu_offload:
        zero.check_overflow = lambda partition_gradients=True: None  # The norm tells.
        zero.get_grad_norm_direct = _norm_over(lambda _: zero.dp_process_group)
    elif kind == "DeepSpeedZeroOptimizer_Stage3" and not zero.offload_optimizer:
        zero.get_grad_norm_direct = _norm_over(lambda params: zero._get_param_partition_group(params[0]))


def _norm_over(group_of: Callable[[Sequence[nn.Parameter]], Any]) -> Norm:
    def norm(gradients: Sequence[Tensor], params: Sequence[nn.Parameter], norm_type: float = 2) -> Tensor:
        """Over all ranks, float32; -1 where it is not finite, as DeepSpeed has it."""
        assert norm_type == 2 and params
        kept = [gradient.detach() for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        device = params[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        if kept:
            total = torch.stack(torch._foreach_norm(kept, 2, torch.float64)).square().sum()
        total = total.float()
        dist.all_reduce(total, group=group_of(params))
        length = total.sqrt()
        return torch.where(length.isfinite(), length, -1.0)

    return norm
