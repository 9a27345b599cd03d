"""The model and the tokenizer out of files and folders, and into them: what `Pretrained` does.

Nothing of a training is needed here, DeepSpeed least of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvar.checkpoint.sharding import SHARD_BYTES, write_shards
from mvar.checkpoint.weights import SHARD_INDEX, SINGLE_FILE, Weights, open_weights
from mvar.config import ModelConfig
from mvar.errors import CheckpointError, TokenizerError
from mvar.files.disk import synced, writing_folder
from mvar.files.shapes import differing
from mvar.hub.layout import (
    CARD,
    CONFIG,
    FIGURES,
    GEOMETRY,
    GRID,
    PREPROCESSING,
    TOKENIZER,
    HubConfig,
    TokenizerConfig,
    geometry,
)
from mvar.hub.place import local
from mvar.model.transformer import MVAR
from mvar.tokenizer.files import load_tokenizer, save_tokenizer
from mvar.tokenizer.vqvae import VQVAE

_OURS = {CARD, CONFIG, FIGURES, GRID, PREPROCESSING, TOKENIZER, SINGLE_FILE, SHARD_INDEX}


def load(kind: type[nn.Module], place: str | Path, revision: str | None) -> nn.Module:
    """An MVAR or a VQVAE of what `place` holds."""
    path = local(place, revision)
    if issubclass(kind, VQVAE):
        return load_vqvae(path)
    return load_model(path)[0]


def save(module: nn.Module, folder: Path) -> None:
    """Write an MVAR or a VQVAE and its config.json."""
    require_free(folder)
    with writing_folder(folder) as new:
        if isinstance(module, VQVAE):
            write_vqvae(new, module)
        else:
            assert isinstance(module, MVAR)
            weights = weights_of(module)
            write_text(new / CONFIG, HubConfig(model=weights.config).text())
            write_shards(new, weights, dtype=torch.float32, shard_bytes=SHARD_BYTES)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_model(path: Path) -> tuple[MVAR, Weights]:
    """The model in float32 on the CPU, in eval mode, and what it was made of. Raises CheckpointError."""
    weights = open_for_use(path)
    model = empty_model(weights)
    model.load_state_dict({name: weights.read(name) for name in weights.shapes}, assign=True)
    return model.eval(), weights


def open_for_use(path: Path) -> Weights:
    """Weights of anything that `open_weights` reads, with the geometry alone; of a hub folder with its config.json.

    Raises CheckpointError where that and the weights speak of different models.
    """
    weights = open_weights(path)
    own = Weights(weights.path, geometry(weights.config), weights.shapes, weights.read, weights.precision, weights.step)
    if path.is_dir() and (path / CONFIG).is_file():
        stated = geometry(HubConfig.read(path / CONFIG).model)
        if stated != own.config:
            key = next(key for key in GEOMETRY if getattr(stated, key) != getattr(own.config, key))
            raise CheckpointError(
                f"{path / CONFIG}: model.{key} is {getattr(stated, key)}, but the weights beside it are of a model "
                f"with {getattr(own.config, key)}. Take the whole folder again from where it came."
            )
    return own


def empty_model(weights: Weights) -> MVAR:
    """A model without storage that the weights fit into. Raises CheckpointError that names the first differences."""
    config = weights.config
    if config.num_classes is None:
        raise CheckpointError(f"{weights.path}: its configuration has no number of classes.")
    found = {name.split(".")[1] for name in weights.shapes if name.startswith("blocks.")}
    if len(found) != config.depth:  # Before so many blocks are made.
        raise CheckpointError(
            f"{weights.path}: has {len(found)} blocks, its configuration says {config.depth}. Export it again."
        )
    with torch.device("meta"):
        model = MVAR.from_config(config, num_classes=config.num_classes)
    differences = differing(weights.shapes, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    if differences is not None:
        raise CheckpointError(
            f"{weights.path}: not the weights of the model it describes: {differences}. Export it again."
        )
    return model


def load_vqvae(path: Path) -> VQVAE:
    """A tokenizer's file, its folder, or a hub folder with it inside. Raises TokenizerError, CheckpointError."""
    if not path.is_dir():
        return load_tokenizer(path)
    folder = path / TOKENIZER if (path / TOKENIZER).is_dir() else path
    if not (folder / CONFIG).is_file():
        raise TokenizerError(
            f"{path}: holds no tokenizer (no {CONFIG} in {folder}). Give a folder that `mvar export --to hub` wrote, "
            "or a tokenizer's file."
        )
    return load_tokenizer(folder / SINGLE_FILE, TokenizerConfig.read(folder / CONFIG).geometry)


# --- writing ---------------------------------------------------------------------------------------------------------


def weights_of(model: MVAR) -> Weights:
    """A model's own weights, as files' are."""
    config = ModelConfig(
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        num_classes=model.num_classes,
        patch_nums=model.pyramid.patch_nums,
        vocab_size=model.vocab_size,
        latent_channels=model.latent_channels,
        attn_l2_norm=model.attn_l2_norm,
        shared_conditioning=model.shared_conditioning,
    )
    state: Mapping[str, Any] = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return Weights(Path("the model"), config, shapes, lambda name: state[name].detach().to("cpu", torch.float32))


def write_vqvae(folder: Path, vqvae: VQVAE) -> None:
    """Into a folder that gets its name later, or into one inside it. Raises WriteError, OSError."""
    folder.mkdir(exist_ok=True)
    write_text(folder / CONFIG, TokenizerConfig(geometry=vqvae.geometry, image_size=vqvae.image_size).text())
    save_tokenizer(folder / SINGLE_FILE, vqvae)


def write_text(path: Path, text: str) -> None:
    """Into a folder that gets its name later. Raises OSError."""
    with synced(path) as file:
        file.write(text.encode())


def require_free(out: Path) -> None:
    """Raise CheckpointError unless a folder can be written there: nothing is, or what was written so before."""
    if not out.exists():
        return
    inside = sorted(out.iterdir()) if out.is_dir() else []
    others = [path.name for path in inside if not _is_ours(path)]
    if not out.is_dir() or others or (inside and not (out / CONFIG).is_file()):
        what = f"holds {others[0]}, which is not of a hub folder" if others else "is no hub folder"
        raise CheckpointError(f"{out}: exists and {what}. Give another name, or remove it.")


def _is_ours(path: Path) -> bool:
    shard = path.name.startswith("model-") and path.suffix == ".safetensors"
    return path.name in _OURS or shard
