"""Chains between matrix products. That compiled ones train the same: tests/integration/test_train_stages.py.

Legend: B batch, L tokens, C width, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.errors import BackendError
from mvar.model.kernels import fused
from mvar.model.kernels.optional import Loaded
from mvar.model.mamba2 import GatedNorm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    yield
    fused.switch(False)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    """Values and gradients."""
    found = []
    for outs in (ours, theirs):
        torch.manual_seed(1)
        torch.testing.assert_close(outs, theirs)
        found.append(torch.autograd.grad([(out * torch.randn_like(out)).sum() for out in outs], inputs))
    torch.testing.assert_close(*found)


def test_the_residual_and_the_norm_after_it_are_their_definitions() -> None:
    x_BLC, out_BLC = randn(2, 5, 8), randn(2, 5, 8)
    gate_BC, scale_BC, shift_BC = randn(2, 8), randn(2, 8), randn(2, 8)
    inputs = [x_BLC, out_BLC, gate_BC, scale_BC, shift_BC]
    added_BLC = x_BLC + gate_BC[:, None] * out_BLC
    deviation_BL1 = (added_BLC.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    normed_BLC = (added_BLC - added_BLC.mean(-1, keepdim=True)) / deviation_BL1
    same(
        fused.residual_norm(*inputs, torch.float64),
        (added_BLC, normed_BLC * (1 + scale_BC[:, None]) + shift_BC[:, None]),
        inputs,
    )
    same((fused.residual(x_BLC, out_BLC, gate_BC),), (x_BLC + gate_BC[:, None] * out_BLC,), inputs[:3])


def test_unit_heads_are_unit_vectors_and_values() -> None:
    qkv_BL3HD, scale_H1 = randn(2, 5, 3, 4, 6), randn(4, 1)
    q, k, v = qkv_BL3HD.unbind(2)
    expected = (q / q.norm(dim=-1, keepdim=True) * scale_H1, k / k.norm(dim=-1, keepdim=True), v)
    same(fused.unit_heads(qkv_BL3HD, scale_H1, torch.float64), expected, [qkv_BL3HD, scale_H1])


def test_the_gated_norm_to_be_compiled_is_the_one_that_runs_eagerly() -> None:
    norm = GatedNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    y, z = randn(2, 5, 6), randn(2, 5, 6)
    same((fused._gated_norm_chain(y, z, norm.weight, 1e-5),), (norm(y, z),), [y, z, norm.weight])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_losses_smooth_what_is_minimised_and_nothing_else(smoothing: float) -> None:
    logits_NV, codes_N = randn(7, 5), torch.randint(5, (7,))
    loss_N, nll_N, correct_N = fused.token_losses(logits_NV, codes_N, smoothing)
    log_NV = F.log_softmax(logits_NV, dim=-1)
    right_N = -log_NV[torch.arange(7), codes_N]
    torch.testing.assert_close(loss_N, (1 - smoothing) * right_N - smoothing * log_NV.mean(-1))
    torch.testing.assert_close(nll_N, right_N.detach())
    assert not nll_N.requires_grad and torch.equal(correct_N, logits_NV.argmax(-1) == codes_N)


def test_a_switch_decides_for_all_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., Any]] = []
    monkeypatch.setattr(fused, "_compiled_form", lambda function: (compiled.append(function), function)[1])
    x, vector = torch.randn(1, 2, 4), torch.randn(1, 4)
    fused.residual(x, x, vector)
    assert not compiled
    fused.switch(True)
    fused.residual(x, x, vector)
    with fused.eager():
        fused.residual(x, x, vector)
    fused.modulated_norm(x, vector, vector, torch.float32)
    assert [function.__name__ for function in compiled] == ["_residual_chain", "_modulated_chain"]


def test_auto_compiles_where_it_pays_and_works_and_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(fused.choose("auto", CPU, 4, 256)) == "compile: off, because the model is small for a CPU"
    monkeypatch.setattr(fused, "load", lambda _: Loaded(None))
    assert fused.choose("auto", CPU, 12, 768).way == "on"
    assert fused.choose("on", CPU, 1, 32).way == "on"
    assert fused.choose("auto", torch.device("cuda"), 1, 32).way == "on"
    monkeypatch.setattr(fused, "load", lambda _: Loaded(None, "no compiler"))
    for setting in ("auto", "off"):
        assert fused.choose(setting, CPU, 12, 768).way == "off"
    assert "no compiler" in str(fused.choose("auto", torch.device("cuda"), 12, 768))
    with pytest.raises(BackendError, match=r"engine\.compile=on.*no compiler"):
        fused.choose("on", CPU, 12, 768)
