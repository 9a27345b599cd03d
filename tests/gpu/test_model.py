"""The whole transformer: each combination of backends against float64, and the official implementation's numbers.

Shapes: B images, L tokens, C width, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvar import MVAR
from mvar.errors import BackendError
from mvar.model.attention import AttentionBackend
from mvar.model.conditioning import NormBackend
from mvar.model.init import init_weights_
from mvar.model.kernels import fused
from mvar.model.mamba2 import MambaBackend
from tests.golden import golden, golden_json
from tests.gpu.parity import BANDS, MODES, TF32, Band, Mode, assert_near, backend_or_skip, error, place

pytestmark = pytest.mark.gpu

IMAGES = 2
BACKENDS = list(product(get_args(AttentionBackend), get_args(MambaBackend)))
GEOMETRY: dict[str, Any] = {"depth": 2, "num_classes": 10, "vocab_size": 512, "width": 256, "heads": 4}


@lru_cache
def reference() -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Weights, (labels, inputs, codes), and in float64: losses of all tokens and gradients of their sum."""
    model = MVAR(**GEOMETRY, attention_backend="sdpa", mamba_backend="torch")
    init_weights_(model, 0, init_gamma=0.3, init_head=1.0, init_conditioning=1.0)
    model.double()
    generator = torch.Generator().manual_seed(1)
    labels_B = torch.randint(0, 11, (IMAGES,), generator=generator)
    x_BLC = torch.randn(IMAGES, model.pyramid.total - 1, 32, generator=generator)
    codes_BL = torch.randint(0, 512, (IMAGES, model.pyramid.total), generator=generator)
    return (
        model.state_dict(),
        (labels_B, x_BLC, codes_BL),
        losses_and_gradients(model, labels_B, x_BLC.double(), codes_BL),
    )


def losses_and_gradients(model: MVAR, labels_B: Tensor, x_BLC: Tensor, codes_BL: Tensor) -> dict[str, Tensor]:
    loss_BL, *_ = model(labels_B, x_BLC, codes_BL=codes_BL)
    loss_BL.sum().backward()  # not the mean: in float16 its gradients would vanish, without a loss scale
    found = {"losses": loss_BL.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[f"grad of {name}"] = parameter.grad
    return found


def check(device: torch.device, mode: Mode, band: Band, **options: Any) -> None:
    weights, (labels_B, x_BLC, codes_BL), wanted = reference()
    model = backend_or_skip(lambda: MVAR(**GEOMETRY, **options))
    assert isinstance(model, MVAR)
    place(model, weights, device, mode)
    if mode.stored:
        model.pos_start.data = model.pos_start.to(mode.dtype)  # the compute dtype is read off it
    try:
        with mode.running(device):
            found = losses_and_gradients(model, labels_B.to(device), x_BLC.to(device), codes_BL.to(device))
    except BackendError as refused:
        pytest.skip(str(refused))
    assert_near(found, wanted, band)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("attention", "mamba"), BACKENDS)
def test_model_equals_float64(
    device: torch.device, attention: AttentionBackend, mamba: MambaBackend, mode: Mode
) -> None:
    exact = mode.dtype == torch.float32
    band = TF32 if exact and mamba == "mamba_ssm" else Band(BANDS[mode.dtype].value * 2, BANDS[mode.dtype].few * 2)
    check(device, mode, band, attention_backend=attention, mamba_backend=mamba)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_fused_chains_equal_float64(device: torch.device, mode: Mode) -> None:
    """The kernels that engine.compile switches on: our own, and what torch.compile makes."""
    if device.type == "cpu":
        pytest.skip("compiling takes minutes on a CPU; tests/unit does it for single chains")
    fused.switch(True)
    try:
        check(device, mode, Band(BANDS[mode.dtype].value * 2, BANDS[mode.dtype].few * 2))
    finally:
        fused.switch(False)


@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_apex_norms_equal_float64(device: torch.device, mode: Mode) -> None:
    pytest.importorskip("apex", reason="NVIDIA apex is not installed")
    assert "apex" in get_args(NormBackend)
    check(device, mode, Band(BANDS[mode.dtype].value * 2, BANDS[mode.dtype].few * 2), norm_backend="apex")


@pytest.mark.parametrize("recompute", ["every", "selective", 2])
def test_recomputation_changes_no_bit(device: torch.device, recompute: Any) -> None:
    weights, (labels_B, x_BLC, codes_BL), _ = reference()
    found = []
    for setting in ("off", recompute):
        model = MVAR(**GEOMETRY, activation_checkpointing=setting)
        mode = Mode(torch.bfloat16)
        place(model, weights, device, mode)
        with mode.running(device):
            found.append(losses_and_gradients(model, labels_B.to(device), x_BLC.to(device), codes_BL.to(device)))
    assert torch.equal(found[0]["losses"], found[1]["losses"])
    # Kernels that add up gradients with atomics differ by rounding from run to run.
    assert_near(found[1], {name: value.double() for name, value in found[0].items()}, Band(1e-2, 1e-1))


@pytest.mark.parametrize("part", ["mvar_tiny", "mvar_ten_scales"])
def test_the_official_models_numbers_are_reproduced(device: torch.device, part: str) -> None:
    """In plain fp32: logits within 1e-5 of the largest, gradients within 1e-4, as on a CPU."""
    if part == "mvar_tiny":
        model, files = MVAR(2, 10, (1, 2, 3, 4), 64, 8), ["state.safetensors"]
    else:
        model, files = MVAR(3, 10), ["state_blocks.safetensors", "state_rest.safetensors"]
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in golden(part, *files).items()})
    model.to(device)
    train, norms = golden(part, "train.safetensors"), golden_json(part, "meta.json")["grads"]
    logits_BLV = model(train["label"].to(device), train["x_wo_first"].to(device))
    if part == "mvar_tiny":
        assert relative_to_largest(logits_BLV, train["logits"]) < 1e-5
    else:
        assert relative_to_largest(logits_BLV[:, train["logits_pos"]], train["logits_at"]) < 1e-5
        assert torch.equal(logits_BLV.argmax(-1).cpu(), train["logits_argmax"])
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), train["gt_idx"].flatten().to(device))
    assert loss.item() == pytest.approx(train["loss"].item(), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm().item() == pytest.approx(norms[name]["l2"], rel=1e-4), name
        if f"grad.{name}" in train:
            assert error(parameter.grad, train[f"grad.{name}"]) < 1e-4, name


def relative_to_largest(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.detach().double().cpu() - wanted).abs().max() / wanted.abs().max())
