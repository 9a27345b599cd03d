"""On a device that is not the CPU, nothing is left on the CPU and the host reads nothing.

torch's meta device has shapes and dtypes and no values: whatever reads one, or mixes it with a tensor of the CPU, is an
error. What kernels of a GPU compute: tests/gpu.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar.config import ActivationCheckpointing
from mvar.model.transformer import MVAR
from mvar.sampling.options import SamplingOptions
from mvar.sampling.sampler import Toward, draw_scales
from mvar.tokenizer.vqvae import VQVAE
from mvar.training.objective import Objective

ELSEWHERE = torch.device("meta")
PATCH_NUMS = (1, 2, 3, 4)
IMAGES = 2


def made(**options: Any) -> tuple[MVAR, VQVAE]:
    model = MVAR(2, 5, PATCH_NUMS, 16, 4, width=64, heads=2, **options)
    return model.to(ELSEWHERE), VQVAE(32, 4, 16, PATCH_NUMS, channel_mult=(1, 1)).to(ELSEWHERE).eval()


def numbers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=ELSEWHERE)


@pytest.mark.parametrize("options", [{}, {"shared_conditioning": True}, {"attn_l2_norm": False}])
@pytest.mark.parametrize("checkpointing", ["off", "every", "selective"])
def test_a_training_step_stays_there(checkpointing: ActivationCheckpointing, options: dict[str, Any]) -> None:
    model, tokenizer = made(activation_checkpointing=checkpointing, **options)
    objective = Objective(tokenizer.quantizer, ELSEWHERE, label_smoothing=0.1)
    drop_DGB = torch.ones(2, 3, IMAGES, device=ELSEWHERE)
    losses = objective(model, numbers(IMAGES, model.pyramid.total), numbers(IMAGES), drop_DGB)
    losses.loss.backward()
    assert {one.device for one in (losses.loss, losses.loss_BS, losses.correct_BS)} == {ELSEWHERE}
    assert all(p.grad is not None and p.grad.device == ELSEWHERE for p in model.parameters())


@pytest.mark.parametrize("toward", [None, Toward(numbers(IMAGES), 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawing_between_classes_stays_there(dtype: torch.dtype, toward: Toward | None) -> None:
    model, tokenizer = made()
    model.store_matmuls_(dtype)
    options = SamplingOptions(cfg=1.5, top_k=8, top_p=0.9)
    with torch.no_grad():
        *_, last = draw_scales(model, tokenizer.quantizer, numbers(IMAGES), numbers(IMAGES), options, toward=toward)
        pixels_BCHW = tokenizer.decode_latent(last.f_hat_BChw)
    assert (pixels_BCHW.device, tuple(pixels_BCHW.shape)) == (ELSEWHERE, (IMAGES, 3, 8, 8))


def test_tokenizing_stays_there() -> None:
    _, tokenizer = made()
    codes_BL = tokenizer.encode(torch.zeros(IMAGES, 3, 8, 8, device=ELSEWHERE))
    assert (codes_BL.device, tuple(codes_BL.shape)) == (ELSEWHERE, (IMAGES, 30))
    assert tokenizer.decode(codes_BL).device == ELSEWHERE


@pytest.mark.parametrize("left", ["lvl_embed", "head", "word_embed"])
def test_a_part_that_was_left_on_the_cpu_is_seen(left: str) -> None:
    """So the tests above can fail."""
    model, tokenizer = made()
    setattr(model, left, getattr(MVAR(2, 5, PATCH_NUMS, 16, 4, width=64, heads=2), left))
    with pytest.raises(RuntimeError, match="device"):
        Objective(tokenizer.quantizer, ELSEWHERE)(model, numbers(IMAGES, 30), numbers(IMAGES))


def test_making_models_without_values_does_not_load_torch_s_compiler() -> None:
    """It takes seconds, and every start of a command that reads weights makes such models."""
    made_there = (
        "import sys, torch; from mvar.model.transformer import MVAR; from mvar.tokenizer.vqvae import VQVAE\n"
        "with torch.device('meta'):\n"
        "    MVAR(1, 5, (1, 2), 16, 4, width=32), MVAR(1, 5, (1, 2), 16, 4, width=32, shared_conditioning=True)\n"
        "    VQVAE(32, 4, 16, (1, 2), channel_mult=(1,))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", made_there], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
