"""Where gradients lie, and their norm in a few kernels. That trainings stay as they were, stage by stage:
tests/integration/test_train_stages.py."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mvar.training.zero_gradients import ROW, FlatGradients, shorten


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def optimizer(kind: str, **settings: Any) -> Any:
    return type(kind, (SimpleNamespace,), {})(dp_process_group=None, **settings)


@pytest.mark.parametrize("kind", ["DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"])
def test_the_norm_is_that_of_all_gradients_but_padding(kind: str) -> None:
    zero = optimizer(
        kind,
        cpu_offload=False,
        offload_optimizer=False,
        partition_gradients=False,
        _get_param_partition_group=lambda _: None,
    )
    shorten(zero)
    gradients = [torch.randn(3, 4), torch.randn(5).bfloat16().float(), torch.full((2,), 9.0)]
    gradients[2]._zero_padding = True  # type: ignore[attr-defined]
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    expected = torch.cat([g.flatten().double() for g in gradients[:2]]).norm()
    found = zero.get_grad_norm_direct(gradients, params)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(expected), rel=1e-7)
    for bad in (torch.inf, -torch.inf, torch.nan):
        gradients[0][1, 2] = bad
        assert float(zero.get_grad_norm_direct(gradients, params)) == -1
    assert float(zero.get_grad_norm_direct([], params)) == 0


def test_gradients_that_lie_elsewhere_are_left_to_deepspeed() -> None:
    for kind, settings in (
        ("DeepSpeedZeroOptimizer", {"cpu_offload": True}),
        ("DeepSpeedZeroOptimizer_Stage3", {"offload_optimizer": True}),
        ("BF16_Optimizer", {}),
    ):
        zero = optimizer(kind, **settings)
        shorten(zero)
        assert not hasattr(zero, "get_grad_norm_direct") and not hasattr(zero, "check_overflow")


class Zero(SimpleNamespace):
    """What of a ZeRO 2 optimizer holds parameters: three, of which this rank has the end of the first, the second whole
    and the beginning of the third, in a share of 14 elements with two of padding between and one at the end."""

    def __init__(self) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (8, 3, 9)]
        super().__init__(
            partition_size=[14],
            params_in_partition=[parameters],
            real_dp_process_group=[None],
            single_partition_of_fp32_groups=[torch.zeros(14)],
            gradient_accumulation_dtype=torch.float32,
            grad_start_offset=[{0: {0: 5, 1: 0, 2: 0}}],
            grad_partition_insertion_offset=[{0: {0: 0, 1: 3, 2: 8}}],
            get_param_id=lambda wanted: next(i for i, p in enumerate(parameters) if p is wanted),
        )


def test_a_share_of_gradients_lies_where_the_optimizer_reads_it() -> None:
    gradients = FlatGradients(Zero(), 0)
    first, second, third = torch.arange(8.0), torch.tensor([10.0, 20.0, 30.0]), torch.arange(100.0, 109.0)
    gradients.take(0, first)
    gradients.take(2, third.bfloat16())
    gradients.take(0, first)  # Of the next micro-batch.
    gradients.take(7, second)  # Another rank's.
    expected = [10.0, 12, 14, 0, 0, 0, 0, 0, 100, 101, 102, 103, 104, 105]
    assert gradients.complete().tolist() == expected
    assert gradients.flat_partition.data_ptr() == gradients[0].data_ptr()


def test_the_norm_of_a_flat_vector_is_exact_at_any_length() -> None:
    zero = optimizer("DeepSpeedZeroOptimizer", cpu_offload=False, partition_gradients=False)
    shorten(zero)
    for count in (14, ROW, 3 * ROW + 7):
        gradients = FlatGradients(Zero(), 0)
        gradients.flat_partition = torch.randn(count) * 3
        gradients._missing.clear()
        expected = float(gradients.flat_partition.double().norm())
        params = [torch.nn.Parameter(torch.zeros(1))]
        assert float(zero.get_grad_norm_direct(gradients, params)) == pytest.approx(expected, rel=1e-6)
        gradients.flat_partition[-1] = torch.nan
        assert float(zero.get_grad_norm_direct(gradients, params)) == -1
