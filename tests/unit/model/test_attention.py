"""Attention inside each scale. Legend: B batch, L tokens, C width, H heads, D head width."""

import functools
import inspect
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from mvar.errors import BackendError
from mvar.model import attention, recompute
from mvar.model.attention import AttentionBackend, ScaleAttention, choose, varlen_layout
from mvar.model.kernels import scale_attention_triton
from mvar.model.kernels.optional import load
from mvar.scales import PATCH_NUMS_256, PATCH_NUMS_512, ScalePyramid
from tests import attention_interpreter

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


@pytest.fixture
def no_memory() -> Iterator[None]:
    """Imports and choices are remembered for a process: forget them before and after."""
    for forget in (load, choose):
        forget.cache_clear()
    yield
    for forget in (load, choose):
        forget.cache_clear()


def by_segments(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """What a kernel for packed sequences computes, after a check of what such kernels demand."""
    assert q.shape == k.shape == v.shape and q.dim() == 3, "(tokens, heads, width)"
    assert q.dtype == k.dtype == v.dtype and all(t.stride(-1) == 1 for t in (q, k, v))
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and bounds.device == q.device
    segments = list(pairwise(bounds.tolist()))
    assert segments[0][0] == 0 and segments[-1][1] == len(q) and all(stop > start for start, stop in segments)
    assert longest == max(stop - start for start, stop in segments)
    pieces = []
    for start, stop in segments:
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * scale
        pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop]))
    return torch.cat(pieces)


def install(name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a reference in the place of a kernel for packed sequences; returns the arguments of its calls, by name."""
    calls: list[dict[str, Any]] = []
    if name == "varlen":
        signature = inspect.signature(varlen.varlen_attn)
    else:  # flash-attn 2.8's, which cannot be installed here

        def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None,
        ): ...  # fmt: skip

        signature = inspect.signature(flash_attn_varlen_func)

    def kernel(*args: Any, **options: Any) -> Tensor:
        given = signature.bind(*args, **options)  # raises where the real one would
        calls.append(dict(given.arguments))
        q, k, v, bounds, bounds_k, longest, longest_k = given.args[:7]
        assert bounds is bounds_k and longest == longest_k
        scale = given.arguments["scale" if name == "varlen" else "softmax_scale"]
        return by_segments(q, k, v, bounds, longest, scale)

    if name == "varlen":
        monkeypatch.setattr(varlen, "varlen_attn", functools.wraps(varlen.varlen_attn)(kernel))
    else:
        package = ModuleType("flash_attn")
        package.flash_attn_varlen_func = kernel  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", package)
    return calls


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_packed_kernels_are_called_as_they_demand_and_equal_sdpa(
    monkeypatch: pytest.MonkeyPatch, name: AttentionBackend, l2_norm: bool
) -> None:
    calls = install(name, monkeypatch)
    monkeypatch.setattr(attention, "_unfit", lambda *_: "")
    torch.manual_seed(0)
    packed = ScaleAttention(48, 3, l2_norm=l2_norm, backend=name).double()
    sdpa = ScaleAttention(48, 3, l2_norm=l2_norm, backend="sdpa").double()
    for parameter in packed.parameters():
        torch.nn.init.normal_(parameter)
    sdpa.load_state_dict(packed.state_dict())
    x = torch.randn(2, 30, 48, dtype=torch.float64)
    outs = [layer(x, LENGTHS) for layer in (packed, sdpa)]
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
    for out in outs:
        out.square().sum().backward()
    for ours, theirs in zip(packed.parameters(), sdpa.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    assert len(calls) == 1
    assert [t.tolist() for t in calls[0].values() if isinstance(t, Tensor) and t.dim() == 1] == [
        [0, 1, 5, 14, 30, 31, 35, 44, 60]
    ] * 2


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("strict", [False, True])
def test_flash_attention_adds_in_a_fixed_order_where_torch_is_told_to(
    monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    calls = install("flash", monkeypatch)
    monkeypatch.setattr(attention, "_unfit", lambda *_: "")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: strict)
    ScaleAttention(64, 1, backend="flash")(torch.randn(1, 1, 64), (1,))
    assert calls[0]["deterministic"] is strict


GPU = torch.device("cuda")


@pytest.mark.usefixtures("no_memory")
def test_auto_takes_our_kernels_then_torchs_then_flash_attn_then_one_call_a_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose("auto", torch.bfloat16, GPU, 64).way == "triton"
    choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert choose("auto", torch.bfloat16, GPU, 64).way == "varlen"
    assert choose("triton", torch.bfloat16, GPU, 64).way == "triton"
    choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choose("auto", torch.bfloat16, GPU, 64).way == "varlen"
    with pytest.raises(BackendError, match="compute capability 9"):
        choose("triton", torch.bfloat16, GPU, 64)
    choose.cache_clear()
    load.cache_clear()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    told = choose("auto", torch.bfloat16, GPU, 64)
    assert told.way == "sdpa" and "varlen" in told.reason and "flash_attn" in told.reason
    choose.cache_clear()
    load.cache_clear()
    install("flash", monkeypatch)
    assert choose("auto", torch.bfloat16, GPU, 64).way == "flash"


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    ("dtype", "device", "head_width", "words"),
    [
        (torch.float32, GPU, 64, "float32"),
        (torch.bfloat16, torch.device("cpu"), 64, "cpu"),
        (torch.float16, GPU, 36, "36"),
        (torch.float16, torch.device("cuda:1"), 64, "cuda:1 has less"),
    ],
)
def test_what_packed_kernels_cannot_take_goes_one_scale_at_a_time_and_says_why(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, device: torch.device, head_width: int, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index is None else (7, 5))
    told = choose("auto", dtype, device, head_width)
    assert told.way == "sdpa" and words in told.reason
    with pytest.raises(BackendError, match=words):
        choose("varlen", dtype, device, head_width)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("l2_norm", [True, False])
def test_our_own_kernels_are_called_with_the_projection_and_equal_sdpa(
    monkeypatch: pytest.MonkeyPatch, l2_norm: bool
) -> None:
    def attend(qkv: Tensor, scale: Tensor | None, lengths: tuple[int, ...], softmax: float, floor: float) -> Tensor:
        assert qkv.is_contiguous() and qkv.shape == (2, 30, 3, 3, 16) and floor == 1e-12
        assert (scale is not None) == l2_norm and (scale is None or scale.shape == (3,))
        return attention_interpreter.by_definition(qkv, scale, lengths, softmax)

    monkeypatch.setattr(scale_attention_triton, "attend", attend)
    monkeypatch.setattr(attention, "_unfit", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    torch.manual_seed(0)
    ours = ScaleAttention(48, 3, l2_norm=l2_norm, backend="triton").double()
    sdpa = ScaleAttention(48, 3, l2_norm=l2_norm, backend="sdpa").double()
    sdpa.load_state_dict(ours.state_dict())
    x = torch.randn(2, 30, 48, dtype=torch.float64)
    torch.testing.assert_close(ours(x, LENGTHS), sdpa(x, LENGTHS), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("no_memory")
def test_flash_asked_for_by_name_and_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(BackendError, match=r"attention_backend=flash.*requirements-gpu\.txt"):
        ScaleAttention(64, 1, backend="flash")


@pytest.mark.usefixtures("no_memory")
def test_a_torch_without_a_scale_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value: None)
    with pytest.raises(BackendError, match=r"attention_backend=varlen.*torch 2\.11 or newer"):
        ScaleAttention(64, 1, backend="varlen")


@pytest.mark.usefixtures("no_memory")
def test_a_packed_kernel_asked_for_by_name_refuses_what_it_cannot_run() -> None:
    layer = ScaleAttention(64, 1, backend="varlen")
    with pytest.raises(BackendError, match="tensors are on cpu"):
        layer(torch.zeros(1, 1, 64), (1,))


def test_selective_recomputation_keeps_the_results_of_every_attention_kernel() -> None:
    ours = [torch.ops.torch_attn._varlen_attn.default, torch.ops.aten._scaled_dot_product_flash_attention.default]
    assert all(recompute._is_kept(operation) for operation in ours)
    assert not recompute._is_kept(torch.ops.aten.mul.Tensor)
