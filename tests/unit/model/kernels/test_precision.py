"""Matmuls in 16 bits on a CPU that has no instructions for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mvar.model.kernels import precision
from mvar.model.kernels.precision import Linear, product_dtype
from mvar.model.transformer import MVAR
from mvar.testing.engine_bytes import kept_by_autograd

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["instructions", "none"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the CPU claims to multiply 16-bit matrices; a claim changes speed only."""
    monkeypatch.setattr(precision, "_cpu_multiplies", lambda dtype: request.param)
    yield request.param


def gradients(layer: Linear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Result, and gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_rounds_the_float32_result_once(dtype: torch.dtype, autocast: bool, instructions: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(48, 20)
    x_BLC, dy_BLC = torch.randn(2, 5, 48).to(dtype), torch.randn(2, 5, 20).to(dtype)
    rounded = Linear(48, 20)
    rounded.load_state_dict({name: value.to(dtype) for name, value in layer.state_dict().items()})
    wanted = gradients(rounded, x_BLC.float(), dy_BLC.float())
    layer = layer if autocast else layer.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = gradients(layer, x_BLC, dy_BLC)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == layer.weight.dtype
    for ours, exact in zip(found, wanted, strict=True):
        # Once rounded: half a unit in the last place of 8 or 11 bits, and what float32 sums differ by.
        torch.testing.assert_close(ours.float(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11, atol=2e-2)
        if not instructions:
            torch.testing.assert_close(ours.float(), exact.to(dtype).float(), rtol=2**-7, atol=1e-5)


def test_only_a_cpu_without_instructions_multiplies_in_float32(instructions: bool) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for dtype in HALF:
        assert product_dtype(dtype, gpu) == dtype
        assert product_dtype(dtype, cpu) == (dtype if instructions else torch.float32)
    for dtype in (torch.float32, torch.float64):
        assert product_dtype(dtype, cpu) == dtype


def kept_dtypes(model: MVAR, labels_B: Tensor, x_BLC: Tensor) -> set[tuple[torch.dtype, int]]:
    """Dtypes and sizes of what autograd keeps, parameters apart."""
    with kept_by_autograd(model.parameters()) as kept:
        model(labels_B, x_BLC)
    return {(tensor.dtype, tensor.untyped_storage().nbytes()) for tensor in kept.values()}


def test_what_autograd_keeps_does_not_depend_on_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MVAR(2, 3, (1, 2, 3), 16, 8, width=64, heads=2).bfloat16()
    labels_B, x_BLC = torch.tensor([0, 2]), torch.randn(2, 13, 8)
    kept = {}
    for claim in (True, False):
        monkeypatch.setattr(precision, "_cpu_multiplies", lambda dtype, claim=claim: claim)
        kept[claim] = kept_dtypes(model, labels_B, x_BLC)
    extra = {entry for entry in kept[False] - kept[True] if entry[0] == torch.float32}
    assert not extra, "a float32 copy outlives the product"


def test_recomputation_changes_no_bit(instructions: bool) -> None:
    found: dict[str, list[Tensor]] = {}
    for how in ("off", "every", "selective"):
        torch.manual_seed(0)
        model = MVAR(2, 3, (1, 2, 3), 16, 8, width=64, heads=2, activation_checkpointing=how).bfloat16()
        model(torch.tensor([0, 2]), torch.randn(2, 13, 8)).square().mean().backward()
        found[how] = [p.grad for p in model.parameters() if p.grad is not None]
    for how in ("every", "selective"):
        assert len(found[how]) == len(found["off"]) > 20
        assert all(torch.equal(a, b) for a, b in zip(found[how], found["off"], strict=True))
