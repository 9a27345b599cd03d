"""A training step on a GPU, forward and backward: all tensors lie there, whatever computes, and the host reads none."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, get_args

import pytest
import torch

from mvar.config import ActivationCheckpointing, AttentionBackend, MambaBackend
from mvar.schedule import CurriculumPoint
from tests.fake_cuda.machine import AMPERE, gpu, placed
from tests.fake_cuda.models import learn, transformer

pytestmark = pytest.mark.fake_cuda

CHAINS = {"cross_entropy", "gated_norm", "residual_norm"}


@pytest.mark.parametrize(
    ("weights", "autocast", "attention"),
    [
        (torch.float32, False, "qk_norm"),
        (torch.float32, True, "scale_attention"),
        (torch.bfloat16, False, "scale_attention"),
        (torch.float16, False, "scale_attention"),
    ],
)
def test_every_precision_launches_our_kernels(weights: torch.dtype, autocast: bool, attention: str) -> None:
    with gpu() as seen:
        model = placed(lambda: transformer(weights, mamba_backend="torch"))
        with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
            learn(seen, model)
    assert seen.kernels() == CHAINS | {attention}


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("checkpointing", ["off", "every", "selective", 2])
def test_every_recomputation_stays_there(checkpointing: ActivationCheckpointing, chains: bool) -> None:
    with gpu(chains=chains) as seen:
        learn(seen, placed(lambda: transformer(torch.bfloat16, activation_checkpointing=checkpointing)))


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("backend", get_args(AttentionBackend))
def test_every_kind_of_attention_stays_there(backend: AttentionBackend, l2_norm: bool) -> None:
    with gpu() as seen:
        learn(seen, placed(lambda: transformer(torch.bfloat16, attention_backend=backend, attn_l2_norm=l2_norm)))


def test_an_older_gpu_takes_other_kernels_and_stays_there() -> None:
    with gpu(capability=AMPERE) as seen:
        learn(seen, placed(lambda: transformer(torch.bfloat16)))
    assert "qk_norm" in seen.kernels() and "scale_attention" not in seen.kernels()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", get_args(MambaBackend))
def test_every_kind_of_mixer_stays_there(backend: MambaBackend, weights: torch.dtype) -> None:
    with gpu() as seen:
        learn(seen, placed(lambda: transformer(weights, mamba_backend=backend)))


@pytest.mark.parametrize(
    ("options", "curriculum"),
    [({"shared_conditioning": True}, None), ({}, CurriculumPoint(2, 0.5))],
)
def test_every_form_of_model_and_objective_stays_there(
    options: dict[str, Any], curriculum: CurriculumPoint | None
) -> None:
    with gpu() as seen:
        learn(seen, placed(lambda: transformer(torch.bfloat16, **options)), curriculum)
