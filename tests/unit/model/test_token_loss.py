"""Losses without all logits at once: the same numbers and gradients, less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.model import token_loss
from mvar.model.kernels.precision import WideLinear
from mvar.model.token_loss import TokenLosses, token_losses


def case() -> tuple[WideLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    return WideLinear(16, 40), torch.randn(3, 30, 16, requires_grad=True), torch.randint(40, (3, 30))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 30, 1000])
def test_chunks_change_neither_losses_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk: int, smoothing: float
) -> None:
    head, x_BLC, codes_BL = case()
    logits_BLV = head(x_BLC)
    expected = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten(), label_smoothing=smoothing)
    wanted = torch.autograd.grad(expected, [x_BLC, *head.parameters()])
    monkeypatch.setattr(token_loss, "CHUNK", chunk)
    found = TokenLosses(*token_losses(head, x_BLC, codes_BL, smoothing))
    torch.testing.assert_close(found.loss_BL.mean(), expected)
    plain_N = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten(), reduction="none")
    torch.testing.assert_close(found.nll_BL.flatten(), plain_N.detach())
    assert torch.equal(found.correct_BL, logits_BLV.argmax(-1) == codes_BL)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss_BL.mean(), [x_BLC, *head.parameters()]), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_logits_are_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK", 10)
    head, x_BLC, codes_BL = case()
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel() if tensor.shape[-1:] == (40,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_losses(head, x_BLC, codes_BL, 0.0)
    assert largest == 0
    with torch.no_grad():
        assert token_losses(head, x_BLC, codes_BL, 0.0)[0].shape == (3, 30)
