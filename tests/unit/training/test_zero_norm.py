"""The gradient's norm in a few kernels. That trainings stay as they were: tests/integration/test_train_stages.py."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mvar.training.zero_norm import shorten


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def optimizer(kind: str, **settings: Any) -> Any:
    return type(kind, (SimpleNamespace,), {})(dp_process_group=None, **settings)


@pytest.mark.parametrize("kind", ["DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"])
def test_the_norm_is_that_of_all_gradients_but_padding(kind: str) -> None:
    zero = optimizer(kind, cpu_offload=False, offload_optimizer=False, _get_param_partition_group=lambda _: None)
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
