"""Weights for use: of a run, a checkpoint, an exported .safetensors (one file or several), or a published .pth.

Everything is read by name, one parameter at a time, so memory need not hold a model. Needs no process group and no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from mvar.checkpoint.choosing import newest_good, problem_of, verify
from mvar.checkpoint.loading import CheckpointReader
from mvar.checkpoint.partition import WEIGHT
from mvar.checkpoint.record import RECORD
from mvar.config import ModelConfig, Precision
from mvar.errors import CheckpointError
from mvar.run.names import folder_of, steps_in
from mvar.scales import ScalePyramid

PUBLISHED_PRECISION: Precision = "fp16"
"""What the published weights were trained and sampled in."""
MODEL_KEY = "mvar.model"
"""Key of an exported file's metadata: JSON of the ModelConfig."""
PRECISION_KEY = "mvar.precision"
"""The same: the arithmetic of the training, where it is known."""
SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
"""Of an export in several files: which file holds which parameter."""


@dataclass(frozen=True)
class Weights:
    """The weights of one model. `read(name)` gives a parameter, float32 on the CPU, and raises CheckpointError."""

    path: Path
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    precision: Precision | None = None
    """The arithmetic that they were trained in, where that is known."""
    step: int | None = None
    """Of a checkpoint."""


def open_weights(path: Path, *, step: int | None = None, kind: str = WEIGHT, digests: bool = True) -> Weights:
    """Weights of a run folder, a checkpoint folder, an export (.safetensors or its folder) or a published .pth.

    Of a run folder the newest checkpoint that verifies is taken, or that of `step`. `kind`: "weight", or "ema" for the
    moving average of a checkpoint that has one. `digests`: whether a checkpoint's files are read through to verify
    them. Raises CheckpointError.
    """
    folder = path.is_dir()
    exported = folder and ((path / SHARD_INDEX).is_file() or (path / SINGLE_FILE).is_file())
    if folder and not exported:
        return _of_checkpoint(_checkpoint_in(path, step, digests), kind)
    if step is not None:
        raise CheckpointError(f"{path}: a step can be chosen from a run folder only, and this is none.")
    if kind != WEIGHT:
        raise CheckpointError(f"{path}: only a checkpoint can hold {kind!r}. Give a run or a checkpoint folder.")
    if path.suffix == ".pth":
        from mvar.checkpoint.published import read_published

        config, state = read_published(path)  # Mapped, not read.
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        return Weights(path, config, shapes, _named(path, state), PUBLISHED_PRECISION)
    if exported:
        return _of_shards(path) if (path / SHARD_INDEX).is_file() else _of_file(path / SINGLE_FILE)
    return _of_file(path)


def load_weights(path: Path, *, step: int | None = None, kind: str = WEIGHT) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and float32 weights, all in memory; see `open_weights`. Raises CheckpointError."""
    weights = open_weights(path, step=step, kind=kind)
    return weights.config, {name: weights.read(name) for name in weights.shapes}


def _named(path: Path, state: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        if name not in state:
            raise CheckpointError(f"{path}: has no parameter {name}.")
        return state[name].float()

    return read


def _checkpoint_in(path: Path, step: int | None, digests: bool) -> Path:
    if (path / RECORD).is_file():
        verify(path, digests=digests)
        return path
    checkpoints = path / "checkpoints"
    steps = steps_in(checkpoints)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"{path}: no checkpoint of step {step}; there are {steps or 'none'}.")
        verify(folder_of(checkpoints, step), digests=digests)
        return folder_of(checkpoints, step)
    found = newest_good(checkpoints, steps, lambda folder: problem_of(folder, digests=digests))
    if found is not None:
        return found
    raise CheckpointError(f"{path}: no usable checkpoint in it. Give a run folder, a checkpoint folder or a file.")


def _of_checkpoint(folder: Path, kind: str) -> Weights:
    reader = CheckpointReader(folder)
    record = reader.record
    if kind not in record.kinds:
        raise CheckpointError(f"{folder}: holds {', '.join(record.kinds)}, but not {kind!r}.")

    def read(name: str) -> Tensor:
        if name not in record.shapes:
            raise CheckpointError(f"{folder}: has no parameter {name}.")
        shape = torch.Size(record.shapes[name])
        return reader.read(name, kind, 0, shape.numel()).view(shape)

    precision = _precision(record.config.get("engine", {}).get("precision"))
    return Weights(
        folder, ModelConfig.model_validate(record.model), record.shapes, read, precision, record.progress.step
    )


def _precision(name: object) -> Precision | None:
    return cast(Precision, name) if name in get_args(Precision) else None


def _of_shards(folder: Path) -> Weights:
    index = folder / SHARD_INDEX
    try:
        tree = json.loads(index.read_text(encoding="utf-8"))
        files: dict[str, str] = tree["weight_map"]
        if outside := [file for file in files.values() if Path(file).name != file]:
            raise CheckpointError(f"{index}: names {outside[0]}, which is outside of its folder. Export again.")
        parts = {file: _of_file(folder / file) for file in sorted(set(files.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not the index of an export ({error}). Export again.") from None
    for name, file in files.items():
        if name not in parts[file].shapes:
            raise CheckpointError(f"{folder / file}: parameter {name} is missing, which {index.name} says is in it.")

    def read(name: str) -> Tensor:
        if name not in files:
            raise CheckpointError(f"{folder}: has no parameter {name}.")
        return parts[files[name]].read(name)

    shapes = {name: parts[file].shapes[name] for name, file in files.items()}
    first = next(iter(parts.values()))
    return Weights(folder, first.config, shapes, read, first.precision)


def _of_file(path: Path) -> Weights:
    try:
        file: Any = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        if MODEL_KEY not in metadata:
            raise CheckpointError(f"{path}: no weights written by `mvar export` (metadata has no {MODEL_KEY}).")
        config = ModelConfig.model_validate_json(metadata[MODEL_KEY])
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}).") from None
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{path}: its {MODEL_KEY} is no model configuration: {error}") from None

    def read(name: str) -> Tensor:
        try:
            value: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: parameter {name} cannot be read ({error}).") from None
        return value.float()

    return Weights(path, config, shapes, read, _precision(metadata.get(PRECISION_KEY)))


# --- beginning from weights ------------------------------------------------------------------------------------------

_MUST_AGREE = (
    "num_classes",
    "depth",
    "resolved_width",
    "resolved_heads",
    "vocab_size",
    "latent_channels",
    "attn_l2_norm",
    "shared_conditioning",
)


def initial_values(
    path: Path, model: ModelConfig, *, kind: str = WEIGHT, digests: bool = True
) -> Callable[[str, tuple[int, ...]], Tensor]:
    """What a training of `model` begins from: a function from a parameter's name and shape to its float32 value.

    `path` as for `open_weights`. The pyramid may be another one (256 -> 512 px): then the position embeddings of each
    scale are resampled and the level embeddings keep their scale's number (see `fitted`). Everything else must agree.
    Parameters are read when asked for, one at a time. Raises CheckpointError, here or from the function.
    """
    weights = open_weights(path, kind=kind, digests=digests)
    _require_alike(weights, model)
    old, new = ScalePyramid(weights.config.patch_nums), ScalePyramid(model.patch_nums)

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in weights.shapes:
            raise CheckpointError(f"{path}: has no parameter {name}, which the model needs.")
        found = fitted(name, weights.read(name), old, new)
        if tuple(found.shape) != tuple(shape):
            raise CheckpointError(f"{path}: {name} has shape {tuple(found.shape)}, the model's has {tuple(shape)}.")
        return found

    return value


def _require_alike(weights: Weights, model: ModelConfig) -> None:
    lines = []
    for key in _MUST_AGREE:
        there, here = getattr(weights.config, key), getattr(model, key)
        if there != here:
            lines.append(f"  {key.removeprefix('resolved_')}: {there} there, {here} in model")
    if lines:
        raise CheckpointError(
            f"{weights.path}: weights of another model cannot be begun from:\n"
            + "\n".join(lines)
            + "\nOnly model.patch_nums may differ. Give model these keys' values of the weights, or begin without them."
        )


def fitted(name: str, value: Tensor, old: ScalePyramid, new: ScalePyramid) -> Tensor:
    """A parameter of a model with pyramid `old`, made to fit `new`. The same pyramid: the same bits.

    pos_1LC (1, L, C): each new scale's map is resampled from one old scale's (bicubic, antialiased where it shrinks).
    With equally many scales this is the one of the same number, otherwise the one whose side, as a share of the finest
    map's, is nearest; of two, the coarser. pos_start (1, L of scale 0, C) is resampled alike. lvl_embed.weight (S, C):
    a scale keeps its number's; scales beyond the old ones take the last one's.
    """
    if old == new:
        return value
    if name == "pos_start":
        return _resampled(value, old.patch_nums[0], new.patch_nums[0])
    if name == "pos_1LC":
        maps = []
        for scale, side in enumerate(new.patch_nums):
            partner = _partner(scale, old, new)
            maps.append(_resampled(value[:, old.segment(partner)], old.patch_nums[partner], side))
        return torch.cat(maps, dim=1)
    if name == "lvl_embed.weight":
        return value[torch.arange(new.num_scales).clamp_max(old.num_scales - 1)]
    return value


def _partner(scale: int, old: ScalePyramid, new: ScalePyramid) -> int:
    if old.num_scales == new.num_scales:
        return scale
    share = new.patch_nums[scale] / new.patch_nums[-1]
    return min(range(old.num_scales), key=lambda s: abs(old.patch_nums[s] / old.patch_nums[-1] - share))


def _resampled(map_1LC: Tensor, side: int, new_side: int) -> Tensor:
    if side == new_side:
        return map_1LC
    map_1CHW = map_1LC.transpose(1, 2).unflatten(2, (side, side))
    # With antialias the kernel is the one that keeps straight lines straight.
    resized = F.interpolate(map_1CHW, size=(new_side, new_side), mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(2).transpose(1, 2).contiguous()
