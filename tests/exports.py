"""Weights of models made in tests, as `mvar export` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mvar.checkpoint.sharding import write_safetensors
from mvar.checkpoint.weights import Weights
from mvar.config import ModelConfig


def save_weights(path: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    write_safetensors(path, Weights(path, config, shapes, lambda name: state[name].detach()))
