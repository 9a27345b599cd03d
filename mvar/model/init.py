"""The weights a training starts from. Every parameter is a pure function of (seed, its name, its shape).

So it does not matter in which order, on how many ranks or under which ZeRO stage parameters are filled. C is the
model's width, D its depth. Two recipes, `fixed` and `published`; they differ where the published one forgets something:
`fixed` also divides Mamba's output projection by sqrt(2D), also scales the third gate's rows by `init_gamma`, and with
shared conditioning also scales the shared layer, as it does each block's own.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mvar.config import ModelConfig
from mvar.model.attention import INITIAL_LOG_SCALE
from mvar.model.block import BRANCHES
from mvar.model.mamba2 import CONV_WIDTH
from mvar.model.transformer import MVAR

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4
"""Mamba's step sizes at the start: log-uniform between the first two, never below the third."""
A_MIN, A_MAX = 1.0, 16.0
"""Mamba's decay rates at the start: uniform."""


@dataclass(frozen=True)
class Initializer:
    """Initial values for the model that `config` describes: its depth, width and `init...` keys."""

    seed: int
    config: ModelConfig

    def value(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """The initial float32 value, on the CPU, of the parameter `name` of MVAR."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        leaf = name.removeprefix("blocks.").partition(".")[2] if name.startswith("blocks.") else name
        value = self._draw(leaf, tuple(shape), generator)
        scale = self._scale(leaf)
        if scale is not None:
            value *= scale
        elif leaf in ("ada_lin.1.weight", "ada_gss", "shared_ada_lin.1.weight"):
            self._scale_vectors(leaf, value)
        return value

    def _draw(self, leaf: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(shape, generator=generator) * (high - low) + low

        if leaf == "attn.scale_mul_1H11":
            return torch.full(shape, INITIAL_LOG_SCALE)
        if leaf == "mamba.A_log":
            return uniform(A_MIN, A_MAX).log()
        if leaf == "mamba.dt_bias":
            dt = uniform(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp_min(DT_FLOOR)
            return dt + torch.log(-torch.expm1(-dt))  # softplus of this is dt
        if leaf in ("mamba.D", "mamba.norm.weight"):
            return torch.ones(shape)
        if leaf.startswith("mamba.conv1d."):
            return uniform(-(CONV_WIDTH**-0.5), CONV_WIDTH**-0.5)
        if leaf.endswith("bias"):
            return torch.zeros(shape)
        width = self.config.resolved_width
        std = width**-0.5 if leaf == "ada_gss" else (3 * width) ** -0.5
        # The published normal distribution is cut at +-2, dozens of standard deviations away.
        return torch.randn(shape, generator=generator).mul_(std).clamp_(-2, 2)

    def _scale(self, leaf: str) -> float | None:
        if leaf in ("attn.proj.weight", "ffn.fc2.weight"):
            return 1 / math.sqrt(2 * self.config.depth)
        if leaf == "mamba.out_proj.weight" and self.config.init == "fixed":
            return 1 / math.sqrt(2 * self.config.depth)
        if leaf == "head.weight":
            return self.config.init_head
        return self.config.init_conditioning if leaf == "head_nm.ada_lin.1.weight" else None

    def _scale_vectors(self, leaf: str, value: Tensor) -> None:
        """Gates start small, scales and shifts moderate. The nine vectors are rows of a weight, or ada_gss itself."""
        config, width = self.config, self.config.resolved_width
        if leaf == "shared_ada_lin.1.weight" and config.init == "published":
            return
        rows = value.view(-1, width) if leaf == "ada_gss" else value.view(3 * BRANCHES, width, -1)
        gates = BRANCHES if config.init == "fixed" else BRANCHES - 1
        rows[:gates] *= config.init_gamma
        rows[gates:] *= config.init_conditioning


@torch.no_grad()
def init_weights_(model: MVAR, seed: int, config: ModelConfig | None = None, **init: str | float) -> None:
    """Fill every parameter of `model` in place, in whatever dtype and on whatever device it is.

    `config`: where its `init...` keys are taken from, those that are given by themselves excepted, such as
    `init_gamma=0.3`; depth and width are the model's. Raises TypeError for another keyword.
    """
    unknown = [key for key in init if not key.startswith("init") or key not in ModelConfig.model_fields]
    if unknown:
        raise TypeError(f"init_weights_: got an unexpected keyword argument {unknown[0]!r}")
    own = (config or ModelConfig()).model_copy(update={**init, "depth": model.depth, "width": model.width})
    initializer = Initializer(seed, own)
    for name, parameter in model.named_parameters():
        parameter.copy_(initializer.value(name, parameter.shape))
