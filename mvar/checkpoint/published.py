"""The published checkpoint layout: one `.pth` with a plain dictionary of tensors.

Names and shapes are those of our own model plus buffers that follow from the geometry. So reading needs only the
geometry, and nearly all of it stands in the shapes.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar.config import ModelConfig
from mvar.errors import CheckpointError
from mvar.files.disk import writing
from mvar.model.transformer import MVAR

_DERIVED = re.compile(r"^(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.(zero_k_bias|patch_nums))$")


def read_published(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Geometry and float32 weights of a published `.pth`, derived buffers dropped. Never unpickles objects.

    A file may hold the dictionary itself or nest it under a training checkpoint's `trainer` / `var_wo_ddp`. Raises
    CheckpointError.
    """
    try:
        tree: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            f"{path}: not a readable file of weights ({str(error).splitlines()[0]}). Download it again; files that"
            " need unpickling of objects are refused."
        ) from None
    for nested in ("trainer", "var_wo_ddp"):
        if isinstance(tree, dict) and nested in tree:
            tree = tree[nested]
    if not isinstance(tree, dict) or "pos_1LC" not in tree or "blocks.0.mamba.A_log" not in tree:
        raise CheckpointError(f"{path}: holds no M-VAR weights (expected names such as pos_1LC, blocks.0.mamba.A_log).")
    config = infer_config(tree, str(path))
    return config, {name: value.float() for name, value in tree.items() if not _DERIVED.match(name)}


def infer_config(state: dict[str, Tensor], source: str) -> ModelConfig:
    """ModelConfig from names and shapes. Heads are 64 wide unless scale_mul tells otherwise.

    Raises CheckpointError.
    """
    width = state["pos_1LC"].shape[2]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    scale = state.get("blocks.0.attn.scale_mul_1H11")
    return ModelConfig(
        depth=depth,
        width=width,
        heads=scale.shape[1] if scale is not None else max(1, width // 64),
        num_classes=state["class_emb.weight"].shape[0] - 1,
        patch_nums=_patch_nums(state, source),
        vocab_size=state["head.weight"].shape[0],
        latent_channels=state["word_embed.weight"].shape[1],
        attn_l2_norm=scale is not None,
        shared_conditioning=not any(".ada_lin." in name for name in state if name.startswith("blocks.")),
    )


def _patch_nums(state: dict[str, Tensor], source: str) -> tuple[int, ...]:
    lengths = state.get("blocks.0.attn.patch_nums")
    if lengths is not None:
        return tuple(math.isqrt(int(length)) for length in lengths)
    levels = state.get("lvl_1L")
    if levels is not None:
        return tuple(math.isqrt(int(count)) for count in levels.flatten().bincount())
    raise CheckpointError(f"{source}: the scales' sizes are missing (neither blocks.0.attn.patch_nums nor lvl_1L).")


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
