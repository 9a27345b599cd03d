"""Initial weights: pure functions of (seed, name), and what the two recipes make of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.config import InitRecipe, ModelConfig
from mvar.model.init import Initializer, init_weights_
from mvar.model.transformer import MVAR


def model(**changes: object) -> MVAR:
    arguments: dict[str, object] = {"patch_nums": (1, 2), "vocab_size": 32, "latent_channels": 4, "width": 128}
    return MVAR(2, 10, **(arguments | changes))  # type: ignore[arg-type]


def filled(seed: int = 0, init: InitRecipe = "fixed", **changes: object) -> dict[str, Tensor]:
    made = model(**changes)
    init_weights_(made, seed, ModelConfig(init=init))
    return dict(made.state_dict())


def test_every_parameter_is_a_function_of_seed_and_name() -> None:
    torch.manual_seed(5)
    first = filled()
    torch.manual_seed(6)
    torch.randn(100)
    again, other = filled(), filled(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    alike = {name for name in first if torch.equal(first[name], other[name])}
    assert all(name.endswith(("bias", "scale_mul_1H11", "mamba.D", "norm.weight")) for name in alike)
    assert "blocks.0.mamba.conv1d.bias" not in alike
    assert not torch.equal(first["blocks.0.ffn.fc1.weight"], first["blocks.1.ffn.fc1.weight"])


@pytest.mark.parametrize("shared", [False, True])
def test_one_parameter_at_a_time_gives_the_same(shared: bool) -> None:
    """What an engine does that holds only a part of each parameter."""
    for name, value in filled(seed=3, shared_conditioning=shared).items():
        alone = Initializer(3, ModelConfig(depth=2, width=128)).value(name, value.shape)
        assert alone.dtype == torch.float32
        assert torch.equal(alone, value)


def test_keys_may_be_given_by_themselves() -> None:
    made, same = model(), model()
    init_weights_(made, 3, init_gamma=0.3, init="published")
    init_weights_(same, 3, ModelConfig(init_gamma=0.3, init="published"))
    for name, value in made.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        init_weights_(made, 3, depth=1)


def test_parameters_keep_their_dtype() -> None:
    made = model().bfloat16()
    init_weights_(made, 0)
    assert all(parameter.dtype == torch.bfloat16 for parameter in made.parameters())
    assert torch.equal(made.state_dict()["head.weight"], filled()["head.weight"].bfloat16())


def test_matrices_have_the_published_spread() -> None:
    state, std = filled(), math.sqrt(1 / (3 * 128))
    for name in ("pos_1LC", "class_emb.weight", "blocks.0.attn.mat_qkv.weight", "blocks.1.mamba.in_proj.weight"):
        assert state[name].std().item() == pytest.approx(std, rel=0.1)
    assert state["head.weight"].std().item() == pytest.approx(0.02 * std, rel=0.1)
    assert state["head_nm.ada_lin.1.weight"].std().item() == pytest.approx(0.5 * std, rel=0.1)
    for name in ("word_embed.bias", "head.bias", "blocks.0.attn.q_bias", "blocks.0.ada_lin.1.bias"):
        assert not state[name].any()
    assert bool((state["blocks.0.attn.scale_mul_1H11"] == math.log(4)).all())


@pytest.mark.parametrize("init", ["fixed", "published"])
def test_the_published_recipe_forgets_mambas_output_and_the_third_gate(init: InitRecipe) -> None:
    state, std = filled(init=init), math.sqrt(1 / (3 * 128))
    shrunk = std / math.sqrt(2 * 2)
    assert state["blocks.1.attn.proj.weight"].std().item() == pytest.approx(shrunk, rel=0.1)
    assert state["blocks.1.ffn.fc2.weight"].std().item() == pytest.approx(shrunk, rel=0.1)
    expected = shrunk if init == "fixed" else std
    assert state["blocks.1.mamba.out_proj.weight"].std().item() == pytest.approx(expected, rel=0.1)

    vectors = state["blocks.0.ada_lin.1.weight"].view(9, 128, 128)
    factors = [1e-3, 1e-3, 1e-3 if init == "fixed" else 0.5, *[0.5] * 6]
    for vector, factor in zip(vectors, factors, strict=True):
        assert vector.std().item() == pytest.approx(factor * std, rel=0.1)


def test_shared_conditioning_starts_with_small_gates_too() -> None:
    state = filled(shared_conditioning=True)
    for vectors, std in (
        (state["blocks.0.ada_gss"].view(9, -1), 128**-0.5),
        (state["shared_ada_lin.1.weight"].view(9, -1), (3 * 128) ** -0.5),
    ):
        for vector, factor in zip(vectors, [*[1e-3] * 3, *[0.5] * 6], strict=True):
            assert vector.std().item() == pytest.approx(factor * std, rel=0.35)


def test_mamba_keeps_its_own_start() -> None:
    state = filled(width=2048, heads=16)
    decay, step = state["blocks.0.mamba.A_log"].exp(), F.softplus(state["blocks.0.mamba.dt_bias"])
    assert bool(((decay >= 1) & (decay <= 16)).all())
    assert decay.min() < 4 and decay.max() > 13
    assert bool(((step > 0.99e-3) & (step < 0.101)).all())
    assert step.min() < 3e-3 and step.max() > 0.03  # spread over two decades, not around a mean
    assert bool((state["blocks.0.mamba.D"] == 1).all())
    assert bool((state["blocks.0.mamba.norm.weight"] == 1).all())
    for name in ("weight", "bias"):
        taps = state[f"blocks.0.mamba.conv1d.{name}"]
        assert 0.45 < taps.abs().max() <= 0.5
