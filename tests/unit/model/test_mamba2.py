"""Mamba-2 in torch: against the official implementation, and against the plain recurrence in float64.

Legend: B batch, L tokens, H heads, P head width, N state.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mvar.model.kernels import mamba_ssm
from mvar.model.kernels.mamba_ops import causal_conv
from mvar.model.kernels.ssd import WHOLE, chunk_length, ssd
from mvar.model.mamba2 import DECAYS, CausalConv, GatedNorm, Mamba2, MambaState
from mvar.scales import PATCH_NUMS_256, ScalePyramid
from tests.golden import golden


class Inputs(NamedTuple):
    x_BLHP: Tensor
    dt_BLH: Tensor
    A_H: Tensor
    B_BLN: Tensor
    C_BLN: Tensor
    D_H: Tensor


def random_inputs(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    def between(low: float, high: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=dtype) * (high - low) + low).requires_grad_()

    return Inputs(
        normal(2, length, 3, 4),
        between(1e-3, 0.5, 2, length, 3),
        between(-16, -0.1, 3),
        normal(2, length, 5),
        normal(2, length, 5),
        normal(3),
    )


def recurrence(inputs: Inputs, state_BHPN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, a token at a time."""
    x, dt, A, B, C, D = inputs
    state = x.new_zeros(2, 3, 4, 5) if state_BHPN is None else state_BHPN
    outs = []
    for t in range(x.shape[1]):
        gain = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        state = state * (dt[:, t] * A).exp()[..., None, None] + gain
        outs.append((state * C[:, t, None, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outs, dim=1), state


def worst(ours: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest reference value."""
    ours, reference = ours.detach(), reference.detach()
    return float((ours - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 127, 128, 129, 170, 680])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunked_sum_equals_the_recurrence_at_many_lengths(length: int, with_state: bool) -> None:
    inputs = random_inputs(length)
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_() if with_state else None
    y, final = ssd(*inputs, state)
    expected_y, expected_final = recurrence(inputs, state)
    assert worst(y, expected_y) < 1e-12
    assert final is not None
    assert worst(final, expected_final) < 1e-12


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (3, 4), (4, 4), (5, 4), (17, 4), (40, 7), (64, 64)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("use", ["outputs", "outputs and state", "state"])
def test_gradients_of_the_chunked_sum_equal_those_of_the_recurrence(
    length: int, chunk: int, with_state: bool, use: str
) -> None:
    inputs = random_inputs(length)
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_() if with_state else None
    weights = torch.randn(2, length, 3, 4, dtype=torch.float64)
    state_weights = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    wanted = [*inputs, state] if state is not None else [*inputs]

    def gradients(y: Tensor, final: Tensor) -> list[Tensor]:
        loss = y.new_zeros(())
        if use != "state":
            loss = loss + (y * weights).sum()
        if use != "outputs":
            loss = loss + (final * state_weights).sum()
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]

    y, final = ssd(*inputs, state, chunk=chunk)
    assert final is not None
    for ours, reference in zip(gradients(y, final), gradients(*recurrence(inputs, state)), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cuts", [(1, 4, 9, 16), (30,), (29, 1), (7, 7, 7, 9), (1,) * 30])
def test_state_carried_over_any_split_equals_one_pass(cuts: tuple[int, ...]) -> None:
    inputs = random_inputs(30)
    whole, expected_final = ssd(*inputs, chunk=8)
    state, parts, start = None, [], 0
    for cut in cuts:
        x, dt, A, B, C, D = inputs
        at = slice(start, start + cut)
        y, state = ssd(x[:, at], dt[:, at], A, B[:, at], C[:, at], D, state, chunk=8)
        parts.append(y)
        start += cut
    assert worst(torch.cat(parts, dim=1), whole) < 1e-13
    assert state is not None and expected_final is not None
    assert worst(state, expected_final) < 1e-13


def test_extreme_decays_stay_finite() -> None:
    """Decays that underflow and step sizes of zero, in float32: no NaN, forward or backward."""
    inputs = random_inputs(200, dtype=torch.float32)
    x, dt, A, B, C, D = (t.detach().clone() for t in inputs)
    dt[:, ::3] = 0
    dt[:, 1::7] = 300.0
    A[0] = -200.0
    ours = Inputs(*(t.requires_grad_() for t in (x, dt, A, B, C, D)))
    y, final = ssd(*ours)
    assert final is not None
    (y.sum() + final.sum()).backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in ours)
    expected, _ = recurrence(Inputs(*(t.detach().double() for t in ours)))
    # A running sum of logarithms near -1e5 has two digits after the point in float32; official kernels sum alike.
    assert worst(y.double(), expected) < 1e-2


def test_chunks_are_never_longer_than_their_bounds_and_waste_little() -> None:
    for length in range(1, 3000):
        chunk = chunk_length(length)
        assert 1 <= chunk <= min(length, WHOLE)
        assert -length % chunk < -(-length // chunk), "padding stays below one token a chunk"


@pytest.mark.parametrize("length", [680, 2240])
def test_published_pyramids_need_no_padding(length: int) -> None:
    assert length % chunk_length(length) == 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("with_tail", [False, True])
def test_convolution_equals_its_definition_with_gradients(length: int, with_tail: bool) -> None:
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) if with_tail else None
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    before = torch.zeros(2, 3, 6, dtype=torch.float64) if tail is None else tail
    rows = torch.cat((before, x), dim=1)
    expected = sum((rows[:, tap : tap + length] * weight[:, tap] for tap in range(4)), start=bias)
    torch.testing.assert_close(causal_conv(x, tail, weight, bias), torch.nn.functional.silu(expected))
    arguments = (x, tail, weight, bias) if with_tail else (x, weight, bias)
    assert torch.autograd.gradcheck(lambda *a: causal_conv(a[0], tail if with_tail else None, *a[-2:]), arguments)


def test_gated_norm_equals_its_definition_with_gradients() -> None:
    norm = GatedNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    y, z = (torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gated = y * torch.nn.functional.silu(z)
    expected = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(y, z), expected)
    assert torch.autograd.gradcheck(lambda y, z, w: norm(y, z), (y, z, norm.weight))


def golden_module(dtype: torch.dtype) -> tuple[Mamba2, dict[str, Tensor]]:
    io = golden("mamba2", "io.safetensors")
    module = Mamba2(128, backend="torch")
    module.load_state_dict({name[6:]: value.float() for name, value in io.items() if name.startswith("state.")})
    return module.to(dtype), io


def test_outputs_and_states_equal_the_official_implementation() -> None:
    module, io = golden_module(torch.float32)
    state = MambaState()
    y = module(io["u"].float(), state)
    assert worst(y, io["y"]) < 1e-5
    assert state.ssm_BHPN is not None and state.tail_BVK is not None
    assert state.ssm_BHPN.dtype == state.tail_BVK.dtype == torch.float32
    assert worst(state.ssm_BHPN, io["ssm_state"]) < 1e-5
    assert worst(state.ssm_BHPN.double(), io["ssm_state_f64"]) < 1e-5
    assert worst(state.tail_BVK, io["conv_state"]) < 1e-5
    official_cache = io["conv_state_official_width4"].transpose(1, 2)[:, 1:]
    assert worst(state.tail_BVK, official_cache) < 1e-5


def test_carried_states_equal_the_official_ones_after_every_scale() -> None:
    module, io = golden_module(torch.float64)
    pyramid = ScalePyramid(PATCH_NUMS_256)
    state = MambaState()
    for scale in range(pyramid.num_scales):
        y = module(io["u"][:, pyramid.segment(scale)].double(), state)
        assert state.ssm_BHPN is not None
        assert worst(state.ssm_BHPN[0], io["ssm_state_sample0_after_scale"][scale].double()) < 1e-6
        assert worst(y, io["y"][:, pyramid.segment(scale)].double()) < 1e-5


def test_gradients_equal_the_official_implementation() -> None:
    module, io = golden_module(torch.float32)
    u = io["u"].float().requires_grad_()
    (module(u) * io["grad_y"].float()).sum().backward()
    assert u.grad is not None
    assert worst(u.grad, io["grad.u"]) < 1e-4
    for name, expected in golden("mamba2", "grads.safetensors").items():
        gradient = module.get_parameter(name.removeprefix("grad.")).grad
        assert gradient is not None
        assert worst(gradient, expected) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32_and_keeps_its_state_wide(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Mamba2(64)
    u = torch.randn(2, 150, 64)
    expected = module(u)
    state = MambaState()
    y = module.to(dtype)(u.to(dtype), state)
    assert y.dtype == dtype
    assert worst(y.float(), expected) < 0.03
    assert state.ssm_BHPN is not None and state.ssm_BHPN.dtype == torch.float32
    assert state.tail_BVK is not None and state.tail_BVK.dtype == torch.float32


def test_convolution_keeps_the_published_shapes() -> None:
    assert {name: tuple(p.shape) for name, p in CausalConv(10).named_parameters()} == {
        "weight": (10, 1, 4),
        "bias": (10,),
    }


@pytest.mark.parametrize("carried", [False, True])
def test_exact_decays_replace_values_and_leave_gradients(carried: bool) -> None:
    torch.manual_seed(0)
    wide, narrow = Mamba2(64, backend="torch"), Mamba2(64, backend="torch")
    decays = torch.randn(3, 2)
    with torch.no_grad():
        for name, value in zip(DECAYS, decays, strict=True):
            getattr(wide, name).copy_(value)
    narrow.load_state_dict(wide.state_dict())
    with torch.no_grad():
        for name in DECAYS:
            getattr(narrow, name).copy_(getattr(narrow, name).bfloat16())
    u_BLC = torch.randn(2, 14, 64)

    def run(mixer: Mamba2) -> Tensor:
        return mixer(u_BLC, MambaState() if carried else None)

    assert not torch.equal(run(narrow), run(wide))
    narrow.exact_3H = decays
    assert torch.equal(run(narrow), run(wide))
    for mixer in (wide, narrow):
        run(mixer).square().mean().backward()
    for name in DECAYS:
        assert torch.equal(getattr(narrow, name).grad, getattr(wide, name).grad)
    assert narrow.state_dict().keys() == wide.state_dict().keys()


@pytest.mark.parametrize("rows", [644, 648])
@pytest.mark.parametrize(("images", "tokens"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_the_convolutions_kernel_gets_rows_that_begin_where_it_wants_them(
    monkeypatch: pytest.MonkeyPatch, rows: int, images: int, tokens: int
) -> None:
    """At multiples of 8 elements, also for one token of one image, whose strides torch does not care about."""
    seen: list[Tensor] = []

    def conv(x_BKL: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(x_BKL)
        return x_BKL

    kernels = mamba_ssm.Kernels(conv, None, None, True)
    monkeypatch.setattr(mamba_ssm, "entry_points", lambda: kernels)
    x_BLK = torch.randn(images, tokens, rows)[..., 256:640]
    found_BLK = mamba_ssm.convolve(x_BLK, torch.zeros(384, 4), torch.zeros(384), None)
    (x_BKL,) = seen
    assert x_BKL.stride(1) == 1 and x_BKL.stride(0) % 8 == 0 and x_BKL.stride(2) % 8 == 0
    assert torch.equal(found_BLK, x_BLK)
