"""Attention inside each scale. Legend: B batch, L tokens, C width, H heads, D head width."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mvar.errors import BackendError
from mvar.model import attention
from mvar.model.attention import ScaleAttention, varlen_layout
from mvar.scales import PATCH_NUMS_256, PATCH_NUMS_512, ScalePyramid

LENGTHS = (1, 4, 9, 16)


def by_definition(layer: ScaleAttention, x_BLC: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Masked softmax attention, written out."""
    batch, total, width = x_BLC.shape
    bias = torch.cat((layer.q_bias, torch.zeros(width, dtype=x_BLC.dtype), layer.v_bias))
    qkv = (x_BLC @ layer.mat_qkv.weight.t() + bias).view(batch, total, 3, layer.heads, -1)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    if layer.l2_norm:
        scale = layer.scale_mul_1H11.clamp(max=math.log(100)).exp()
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        scores = q * scale @ k.transpose(-1, -2)
    else:
        scores = q @ k.transpose(-1, -2) * 0.25 / math.sqrt(width // layer.heads)
    scale_L = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scores = scores.masked_fill(scale_L[:, None] != scale_L[None, :], -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, total, width)
    return out @ layer.proj.weight.t() + layer.proj.bias


@pytest.mark.parametrize("l2_norm", [True, False])
def test_attention_equals_its_definition_with_gradients(l2_norm: bool) -> None:
    torch.manual_seed(0)
    layer = ScaleAttention(24, 3, l2_norm=l2_norm).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    if l2_norm:
        layer.scale_mul_1H11.data[0, :, 0, 0] = torch.tensor([0.5, 2.0, 9.0])  # the last is above the ceiling
    x = torch.randn(2, 30, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 30, 24, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    ours, reference = layer(x, LENGTHS), by_definition(layer, x, LENGTHS)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((reference * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", range(4))
def test_a_token_attends_to_its_whole_scale_and_to_nothing_else(scale: int) -> None:
    torch.manual_seed(0)
    layer = ScaleAttention(64, 2).double()
    pyramid = ScalePyramid((1, 2, 3, 4))
    at = pyramid.segment(scale)
    x = torch.randn(1, pyramid.total, 64, dtype=torch.float64)
    changed = x.clone()
    changed[:, at.stop - 1] += 1  # the last token of the scale
    difference = (layer(x, pyramid.lengths) - layer(changed, pyramid.lengths)).abs().amax(-1)[0]
    assert bool((difference[at] > 0).all())
    difference[at] = 0
    assert not difference.any()


@pytest.mark.parametrize(("patch_nums", "longest"), [(PATCH_NUMS_256, 256), (PATCH_NUMS_512, 1024)])
def test_varlen_layout_marks_every_scale_of_every_image_and_the_longest(
    patch_nums: tuple[int, ...], longest: int
) -> None:
    pyramid = ScalePyramid(patch_nums)
    bounds, found = varlen_layout(pyramid.lengths, batch=3)
    assert found == longest
    assert bounds[0] == 0
    assert bounds[-1] == 3 * pyramid.total
    assert [b - a for a, b in pairwise(bounds)] == list(pyramid.lengths) * 3


def test_varlen_layout_of_a_few_scales_has_their_own_longest() -> None:
    assert varlen_layout((9, 16), batch=2) == ([0, 9, 25, 34, 50], 16)


def test_flash_backend_calls_the_varlen_kernel_with_the_layout_and_equals_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(q, k, v, bounds_q, bounds_k, longest_q, longest_k, softmax_scale, causal):  # type: ignore[no-untyped-def]
        calls.append((bounds_q.tolist(), bounds_k.tolist(), longest_q, longest_k, softmax_scale, causal))
        pieces = []
        for start, stop in pairwise(bounds_q.tolist()):
            scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * softmax_scale
            pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop]))
        return torch.cat(pieces)

    monkeypatch.setattr(attention, "_flash_attention", lambda: kernel)
    monkeypatch.setattr(ScaleAttention, "_use_flash", lambda self, q: self.backend == "flash")
    torch.manual_seed(0)
    flash = ScaleAttention(24, 3, l2_norm=False, backend="flash").double()
    sdpa = ScaleAttention(24, 3, l2_norm=False, backend="sdpa").double()
    sdpa.load_state_dict(flash.state_dict())
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    torch.testing.assert_close(flash(x, LENGTHS), sdpa(x, LENGTHS), rtol=1e-10, atol=1e-10)
    bounds = [0, 1, 5, 14, 30, 31, 35, 44, 60]
    assert calls == [(bounds, bounds, 16, 16, 0.25 / math.sqrt(8), False)]


def test_flash_asked_for_by_name_and_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    with pytest.raises(BackendError, match=r"flash-attn.*requirements-gpu\.txt"):
        ScaleAttention(64, 1, backend="flash")


def test_flash_asked_for_by_name_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_flash_attention", lambda: None)
    layer = ScaleAttention(64, 1, backend="flash")
    with pytest.raises(BackendError, match="float32 on cpu"):
        layer(torch.zeros(1, 1, 64), (1,))
