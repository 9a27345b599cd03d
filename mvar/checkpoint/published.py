"""The published checkpoint layout: one `.pth` with a plain dictionary of tensors.

Names and shapes are those of our own model plus buffers that follow from the geometry. So reading needs only the
geometry, and nearly all of it stands in the shapes.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar.config import ModelConfig
from mvar.errors import CheckpointError, ConfigError
from mvar.files.disk import writing
from mvar.files.shapes import differing
from mvar.model.transformer import MVAR
from mvar.scales import PATCH_NUMS_256, PATCH_NUMS_512, ScalePyramid

_DERIVED = re.compile(r"^(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.(zero_k_bias|patch_nums))$")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_KNOWN_PYRAMIDS = (PATCH_NUMS_256, PATCH_NUMS_512)


def read_published(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Geometry and float32 weights of a published `.pth`, derived buffers dropped. Never unpickles objects.

    A file may hold the dictionary itself or nest it under a training checkpoint's `trainer` / `var_wo_ddp`. Names and
    shapes must be those of the geometry, and derived buffers, as far as they are there, what it makes them. Raises
    CheckpointError that says what differs.
    """
    state = _tensors(path)
    config = infer_config(state, str(path))
    _require_as_published(path, state, config)
    return config, {name: value.float() for name, value in state.items() if not _DERIVED.match(name)}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tree: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        size = f", which has {path.stat().st_size:,} bytes" if path.is_file() else ""
        raise CheckpointError(
            f"{path}{size}: not a readable file of weights ({reason}). Download it again; files that"
            " need unpickling of objects are refused."
        ) from None
    for nested in ("trainer", "var_wo_ddp"):
        if isinstance(tree, dict) and nested in tree:
            tree = tree[nested]
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise CheckpointError(f"{path}: holds no M-VAR weights (expected a dictionary of names and tensors).")
    state = {str(name): value for name, value in tree.items()}
    if "pos_1LC" not in state or "blocks.0.mamba.A_log" not in state:
        raise CheckpointError(
            f"{path}: holds no M-VAR weights (expected names such as pos_1LC, blocks.0.mamba.A_log){_instead(state)}."
        )
    return state


def _instead(state: Mapping[str, Tensor]) -> str:
    """What the file seems to be."""
    if "quantize.embedding.weight" in state:
        return "; it looks like a tokenizer"
    if "pos_1LC" in state:
        return "; it looks like a VAR without Mamba"
    return f"; its first names: {', '.join(sorted(state)[:3])}" if state else "; it is empty"


def infer_config(state: Mapping[str, Tensor], source: str) -> ModelConfig:
    """ModelConfig from names and shapes. Heads are 64 wide unless scale_mul tells otherwise.

    Raises CheckpointError.
    """

    def size(name: str, dimension: int) -> int:
        if name not in state or state[name].dim() <= dimension:
            raise CheckpointError(f"{source}: {name} is missing or has no dimension {dimension}. Download it again.")
        return state[name].shape[dimension]

    width = size("pos_1LC", 2)
    numbers = {int(match[1]) for name in state if (match := _BLOCK.match(name))}
    depth = len(numbers)
    if numbers != set(range(depth)):
        missing = next(number for number in range(depth) if number not in numbers)
        raise CheckpointError(f"{source}: block {missing} is missing of {max(numbers) + 1}. Download it again.")
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state
    geometry = {
        "depth": depth,
        "width": width,
        "heads": size("blocks.0.attn.scale_mul_1H11", 1) if l2_norm else max(1, width // 64),
        "num_classes": size("class_emb.weight", 0) - 1,
        "patch_nums": _patch_nums(state, source),
        "vocab_size": size("head.weight", 0),
        "latent_channels": size("word_embed.weight", 1),
        "attn_l2_norm": l2_norm,
        "shared_conditioning": not any(".ada_lin." in name for name in state if name.startswith("blocks.")),
    }
    try:
        return ModelConfig.model_validate(geometry)
    except (ValueError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: its shapes are of no model ({reason}). Download it again.") from None


def _patch_nums(state: Mapping[str, Tensor], source: str) -> tuple[int, ...]:
    """Of what the file says, the first: lengths, levels of the tokens, or the number of tokens and of scales."""
    lengths, levels = state.get("blocks.0.attn.patch_nums"), state.get("lvl_1L")
    if lengths is not None:
        counts = [int(length) for length in lengths.flatten()]
    elif levels is not None and levels.numel() and int(levels.min()) >= 0 and int(levels.max()) < levels.numel():
        counts = levels.flatten().bincount().tolist()
    else:
        embedding = state.get("lvl_embed.weight")
        tokens, scales = state["pos_1LC"].shape[1], 0 if embedding is None else len(embedding)
        for sides in _KNOWN_PYRAMIDS:
            if (ScalePyramid(sides).total, len(sides)) == (tokens, scales):
                return sides
        raise CheckpointError(
            f"{source}: the scales' sizes are missing (neither blocks.0.attn.patch_nums nor lvl_1L), and {tokens}"
            f" tokens in {scales} scales are none of the published pyramids."
        )
    if any(count < 1 or math.isqrt(count) ** 2 != count for count in counts):
        raise CheckpointError(f"{source}: scales of {counts} tokens are no squares. Download it again.")
    return tuple(math.isqrt(count) for count in counts)


def _require_as_published(path: Path, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    assert config.num_classes is not None
    with torch.device("meta"):
        model = MVAR.from_config(config, num_classes=config.num_classes)
    made = published_state_dict(model)
    found = {name: value for name, value in state.items() if not _DERIVED.match(name)}
    expected = {name: value for name, value in made.items() if not _DERIVED.match(name)}
    difference = differing(
        {name: value.shape for name, value in found.items()}, {name: value.shape for name, value in expected.items()}
    )
    for name, value in made.items():
        if difference is None and name in state and name not in expected:
            own = state[name]
            if own.shape != value.shape or not torch.equal(own.double(), value.double()):
                difference = f"{name} is not the one that the scales {list(config.patch_nums)} make"
    if difference is not None:
        norm = "with" if config.attn_l2_norm else "without"
        raise CheckpointError(
            f"{path}: looks like depth {config.depth} of width {config.resolved_width}, {norm} L2-normalised attention,"
            f" scales {', '.join(map(str, config.patch_nums))}, but differs from it: {difference}. Download it again,"
            " or give a file of the published layout."
        )


def write_published(path: Path, state: dict[str, Tensor]) -> None:
    """Write a published-layout dictionary as `.pth`: complete or absent. Raises WriteError."""
    with writing(path) as file:
        torch.save(state, file)


def published_state_dict(model: MVAR) -> dict[str, Tensor]:
    """The model's weights under the published names, with the constants that published files store among them."""
    lengths = torch.tensor(model.pyramid.lengths)
    level_L = torch.arange(len(lengths)).repeat_interleave(lengths)
    outside = level_L.unsqueeze(0) != level_L.unsqueeze(1)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        state[name] = value
        if name == "pos_1LC":
            state["lvl_1L"] = level_L.unsqueeze(0)
            state["attn_bias_for_masking"] = torch.zeros(1, 1, *outside.shape).masked_fill(outside, -torch.inf)
        if name.endswith("attn.v_bias"):
            state[name.replace("v_bias", "zero_k_bias")] = torch.zeros(model.width)
            state[name.replace("v_bias", "patch_nums")] = lengths.to(torch.int32)
    return state
