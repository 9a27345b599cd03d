"""Gradients between autograd and the optimizer, in fewer passes over them than DeepSpeed 0.19 makes.

ZeRO 2 copies a gradient into a bucket, joins the bucket for the sum over ranks and takes it apart, copies this rank's
share out of it (or adds it to zeros that it wrote before), and joins the shares for the optimizer. Here the bucket is
summed as it is, and a share is copied once: to its place in the flat vector that the optimizer reads.

ZeRO 1 to 3 look at each gradient's extremes and then take its norm, eleven kernels a parameter: at depth 16 some 3,600
that take the host longer to launch than a GPU to run. A norm over all gradients says both how long they are and whether
they are finite, and DeepSpeed skips a step for a norm that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Norm = Callable[..., Tensor]

ROW = 1 << 14
"""Elements whose squares are summed in float32, before all is summed in float64: wrong by 1e-8 of the norm."""


def shorten(zero: Any) -> None:
    """Give a ZeRO optimizer the shorter ways. One that keeps its gradients off the device is left as it is."""
    kind = type(zero).__name__
    if kind == "DeepSpeedZeroOptimizer" and not zero.cpu_offload:
        zero.check_overflow = lambda partition_gradients=True: None  # The norm tells.
        zero.get_grad_norm_direct = _norm_over(lambda _: zero.dp_process_group)
        if zero.partition_gradients and zero.contiguous_gradients and zero.use_multi_rank_bucket_allreduce:
            _keep_flat(zero)
    elif kind == "DeepSpeedZeroOptimizer_Stage3" and not zero.offload_optimizer:
        zero.get_grad_norm_direct = _norm_over(lambda params: zero._get_param_partition_group(params[0]))


class FlatGradients(list[Tensor]):
    """This rank's share of a group's gradients, in the order of the optimizer's flat weights.

    A list of one vector, `flat_partition`, which is where DeepSpeed looks for it. Gradients that nothing was taken for
    are zero once `complete` was called.
    """

    def __init__(self, zero: Any, group: int) -> None:
        size, rank = int(zero.partition_size[group]), dist.get_rank(group=zero.real_dp_process_group[group])
        parameters = zero.params_in_partition[group]
        device = zero.single_partition_of_fp32_groups[group].device
        self.flat_partition = torch.empty(size, dtype=zero.gradient_accumulation_dtype, device=device)
        super().__init__([self.flat_partition])
        self._places: dict[int, tuple[int, Tensor]] = {}
        end = 0
        for parameter in parameters:
            number = zero.get_param_id(parameter)
            first = int(zero.grad_start_offset[group][rank][number])
            at = int(zero.grad_partition_insertion_offset[group][rank][number])
            count = min(parameter.numel() - first, size - at)
            self._places[number] = first, self.flat_partition.narrow(0, at, count)
            self.flat_partition[end:at] = 0  # Padding.
            end = at + count
        self.flat_partition[end:] = 0
        self._missing = set(self._places)

    def take(self, number: int, gradient: Tensor) -> None:
        """Add this rank's share of a whole, flat gradient of parameter `number`."""
        if number not in self._places:
            return
        first, place = self._places[number]
        share = gradient.narrow(0, first, len(place))
        if number in self._missing:
            place.copy_(share)
            self._missing.remove(number)
        else:
            place.add_(share)

    def complete(self) -> Tensor:
        """The flat vector."""
        for number in self._missing:
            self._places[number][1].zero_()
        self._missing.clear()
        return self.flat_partition


def _keep_flat(zero: Any) -> None:
    """Through the form that DeepSpeed has for fp32 sums of 16-bit gradients."""

    def take_all(summed: Tensor, bucket_dtype: torch.dtype) -> None:
        begin = 0
        for group, index, number in zero.ipg_buckets[bucket_dtype].params:
            count = zero.bit16_groups[group][index].numel()
            zero._get_compact_grad_partition_buffer(group).take(number, summed.narrow(0, begin, count))
            begin += count

    zero._use_compact_grad_partition_buffer = lambda _group: True
    zero._build_compact_grad_partition_buffer = lambda group: FlatGradients(zero, group)
    zero._add_full_reduction_to_compact_grad_partition = take_all
    zero.reduce_scatter = False  # The whole bucket is summed over all ranks either way.
    zero.postscale_gradients = dist.get_world_size(group=zero.dp_process_group) == 1  # Before, so that fp16 lasts.


def _norm_over(group_of: Callable[[Sequence[nn.Parameter]], Any]) -> Norm:
    def norm(gradients: Sequence[Tensor], params: Sequence[nn.Parameter], norm_type: float = 2) -> Tensor:
        """Over all ranks, float32; -1 where it is not finite, as DeepSpeed has it."""
        assert norm_type == 2 and params
        if isinstance(gradients, FlatGradients):
            total = _square_of_flat(gradients.complete())
        else:
            kept = [gradient.detach() for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
            total = _sum_of_squares(torch._foreach_norm(kept, 2, torch.float64) if kept else [], params[0].device)
        total = total.float()
        dist.all_reduce(total, group=group_of(params))
        length = total.sqrt()
        return torch.where(length.isfinite(), length, -1.0)

    return norm


def _square_of_flat(flat: Tensor) -> Tensor:
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return _sum_of_squares([rows, rest], flat.device)


def _sum_of_squares(norms: Iterable[Tensor], device: torch.device) -> Tensor:
    flat = [norm.double().flatten() for norm in norms]
    return torch.cat(flat).square().sum() if flat else torch.zeros((), dtype=torch.float64, device=device)
