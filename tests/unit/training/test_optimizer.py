"""Who computes AdamW, and over which groups of parameters."""

from __future__ import annotations

from typing import Any

import torch

from mvar.config import OptimConfig
from mvar.model.transformer import MVAR
from mvar.training.optimizer import make_optimizer, parameter_groups
from tests.golden import golden_json


def test_parameter_groups_are_the_published_ones() -> None:
    expected = golden_json("schedules", "param_groups_mvar_tiny.json")
    model = MVAR(depth=2, num_classes=10, patch_nums=(1, 2, 3, 4), vocab_size=64, latent_channels=8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = parameter_groups(model)
    assert decaying["decays"] and not others["decays"]
    assert {names[id(p)] for p in decaying["params"]} == set(expected["decay"])
    assert {names[id(p)] for p in others["params"]} == set(expected["no_decay"])


def test_torch_runs_adamw_unless_moments_are_offloaded() -> None:
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(3, requires_grad=True)], "decays": True}]
    optimizer = make_optimizer(groups, OptimConfig(), 1e-3, {})
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.95)
