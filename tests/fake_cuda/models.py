"""What these tests compute with: a small transformer and a small tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from mvar.model.transformer import MVAR
from mvar.schedule import CurriculumPoint
from mvar.tokenizer.vqvae import VQVAE
from mvar.training.objective import Losses, Objective
from tests.fake_cuda.backward import gradients
from tests.fake_cuda.machine import GPU, LAYOUT, Seen, numbers, on_host

PATCH_NUMS = (1, 2, 4)
TOKENS = 21
IMAGES = 2
DEPTH = 2


def transformer(dtype: torch.dtype = torch.float32, **options: Any) -> MVAR:
    return MVAR(DEPTH, 5, PATCH_NUMS, 16, 4, width=64, heads=2, **options).to(dtype)


def tokenizer() -> VQVAE:
    return VQVAE(32, 4, 16, PATCH_NUMS, channel_mult=(1, 1)).eval()


def learn(seen: Seen, model: MVAR, curriculum: CurriculumPoint | None = None) -> Losses:
    """One step, forward and backward, after which everything must lie on the GPU, and nothing has left it."""
    objective = Objective(on_host(tokenizer).quantizer, GPU, label_smoothing=0.1)
    seen.crossings.clear()  # those of moving the models
    drop_DGB = torch.ones(DEPTH, 3, IMAGES, device=GPU)
    losses = objective(model, numbers(IMAGES, TOKENS), numbers(IMAGES), drop_DGB, curriculum)
    assert {one.device for one in (losses.loss, losses.loss_BS, losses.correct_BS)} == {GPU}
    found = gradients(losses.loss)
    assert found.keys() == set(model.parameters())
    assert all((found[p].device, found[p].dtype) == (GPU, p.dtype) for p in model.parameters())
    assert seen.crossings in ([], [LAYOUT])
    return losses
