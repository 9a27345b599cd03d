"""Selective recomputation: the same gradients, linear layers computed once, other calls free to differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mvar.model.recompute import keeping_linears


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, operation, types, args=(), options=None):  # type: ignore[no-untyped-def]
        self.products += operation._schema.name in ("aten::mm", "aten::addmm")
        return operation(*args, **(options or {}))


class Net(nn.Module):
    """`gathers`: whether it makes calls of views at its next forward pass, as DeepSpeed does that gathers weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gathers = iter([False, True])

    def forward(self, x: Tensor) -> Tensor:
        if next(self.gathers, False):
            torch.zeros(4).view(2, 2).view(4)
        out: Tensor = self.last(F.gelu(self.first(x)))
        return out


def gradients(net: Net, x: Tensor, *, recompute: bool) -> list[Tensor]:
    if recompute:
        out = checkpoint(net, x, use_reentrant=False, preserve_rng_state=False, context_fn=keeping_linears)
    else:
        out = net(x)
    return list(torch.autograd.grad(out.sum(), [x, *net.parameters()]))


def test_gradients_are_the_same_where_the_repetition_makes_other_calls() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    wanted, found = (gradients(Net(), x, recompute=recompute) for recompute in (False, True))
    assert all(map(torch.equal, wanted, found))


def test_linear_layers_are_computed_once() -> None:
    x, counts = torch.randn(4, 8, requires_grad=True), []
    for recompute in (False, True):
        with Calls() as calls:
            gradients(Net(), x, recompute=recompute)
        counts.append(calls.products)
    assert counts[0] == counts[1] > 0


def test_what_is_changed_in_place_is_not_taken_again() -> None:
    net = Net()

    def changing(x: Tensor) -> Tensor:
        h = net.first(x)
        out: Tensor = net.last(F.gelu(h))
        h.detach().add_(1)
        return out

    x = torch.randn(4, 8, requires_grad=True)
    out = checkpoint(changing, x, use_reentrant=False, preserve_rng_state=False, context_fn=keeping_linears)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()
