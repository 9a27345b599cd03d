"""Every backend of attention inside a scale, forward and backward, against float64 on the CPU.

Shapes: B images, L tokens, C width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import get_args

import pytest
import torch
from torch import Tensor

from mvar.errors import BackendError
from mvar.model.attention import AttentionBackend, ScaleAttention
from tests.gpu.parity import BANDS, LENGTHS_256, MODES, Mode, assert_near, backend_or_skip, place, results

pytestmark = pytest.mark.gpu

WIDTH, HEADS, IMAGES = 192, 3, 3


@lru_cache
def reference(l2_norm: bool) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Weights, input, cotangent and results in float64."""
    generator = torch.Generator().manual_seed(0)
    module = ScaleAttention(WIDTH, HEADS, l2_norm=l2_norm, backend="sdpa").double()
    for parameter in module.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05
    x_BLC, cotangent_BLC = (
        torch.randn(IMAGES, sum(LENGTHS_256), WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    found = results(module, lambda x: module(x, LENGTHS_256), x_BLC, cotangent_BLC)
    return module.state_dict(), x_BLC, cotangent_BLC, found


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("l2_norm", [True, False], ids=["l2_norm", "scaled"])
@pytest.mark.parametrize("backend", get_args(AttentionBackend))
def test_attention_equals_float64(device: torch.device, backend: AttentionBackend, l2_norm: bool, mode: Mode) -> None:
    weights, x_BLC, cotangent_BLC, wanted = reference(l2_norm)
    module = backend_or_skip(lambda: ScaleAttention(WIDTH, HEADS, l2_norm=l2_norm, backend=backend))
    place(module, weights, device, mode)
    x_BLC = x_BLC.to(device, mode.dtype if mode.stored else torch.float32)

    def run(x: Tensor) -> Tensor:
        with mode.running(device):
            return module(x, LENGTHS_256)  # type: ignore[no-any-return]

    try:
        found = results(module, run, x_BLC, cotangent_BLC)
    except BackendError as refused:
        pytest.skip(str(refused))
    assert_near(found, wanted, BANDS[mode.dtype])
