"""Weights for use: of a run, a checkpoint, an exported .safetensors or a published .pth; and how they are exported.

Needs no process group and no GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvar.checkpoint import RECORD, Reader, folder_of, problem_of, steps_in, verify, write_tensors
from mvar.config import ModelConfig
from mvar.errors import CheckpointError
from mvar.partition import WEIGHT

MODEL_KEY = "mvar.model"
"""Key of an exported file's metadata: JSON of the ModelConfig."""


def load_weights(path: Path, *, step: int | None = None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and float32 weights of a run folder, a checkpoint folder, a .safetensors or a published .pth.

    Needs no process group, and memory for little more than the weights. Of a run folder the newest checkpoint that
    verifies is taken, or that of `step`. Raises CheckpointError.
    """
    if path.is_dir():
        return _weights_of_folder(_checkpoint_in(path, step))
    if step is not None:
        raise CheckpointError(f"{path}: a step can be chosen from a run folder only, and this is none.")
    if path.suffix == ".pth":
        from mvar.published import read_published

        return read_published(path)
    return _weights_of_file(path)


def _checkpoint_in(path: Path, step: int | None) -> Path:
    if (path / RECORD).is_file():
        verify(path)
        return path
    checkpoints = path / "checkpoints"
    steps = steps_in(checkpoints)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"{path}: no checkpoint of step {step}; there are {steps or 'none'}.")
        verify(folder_of(checkpoints, step))
        return folder_of(checkpoints, step)
    for candidate in reversed(steps):
        problem = problem_of(folder_of(checkpoints, candidate))
        if problem is None:
            return folder_of(checkpoints, candidate)
        print(f"mvar: WARNING: damaged checkpoint passed over: {problem}", file=sys.stderr)
    raise CheckpointError(f"{path}: no usable checkpoint in it. Give a run folder, a checkpoint folder or a file.")


def _weights_of_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    reader = Reader(folder)
    shapes = reader.record.shapes
    state = {name: reader.read(name, WEIGHT, 0, torch.Size(s).numel()).view(s) for name, s in shapes.items()}
    return ModelConfig.model_validate(reader.record.model), state


def _weights_of_file(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if MODEL_KEY not in metadata:
                raise CheckpointError(f"{path}: no weights written by `mvar export` (metadata has no {MODEL_KEY}).")
            config = ModelConfig.model_validate_json(metadata[MODEL_KEY])
            return config, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}).") from None
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{path}: its {MODEL_KEY} is no model configuration: {error}") from None


def save_weights(path: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Write weights as one safetensors file, float32, the ModelConfig in its metadata: complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        layout = [(name, tuple(value.shape)) for name, value in state.items()]
        write_tensors(temporary, layout, state.values(), {MODEL_KEY: config.model_dump_json(), "format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
