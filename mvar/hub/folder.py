"""A whole hub folder: model, tokenizer, preprocessing, card. Complete or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mvar.checkpoint.sharding import SHARD_BYTES, write_shards
from mvar.checkpoint.tensors import FileRecord
from mvar.checkpoint.weights import Weights
from mvar.errors import ConfigError
from mvar.files.disk import synced, writing_folder
from mvar.hub.card import model_card
from mvar.hub.layout import CARD, CONFIG, FIGURES, GRID, PREPROCESSING, TOKENIZER, HubConfig, Preprocessing, geometry
from mvar.hub.objects import empty_model, require_free, write_text, write_vqvae
from mvar.images.arrays import Bytes
from mvar.tokenizer.vqvae import VQVAE


@dataclass(frozen=True)
class HubModel:
    """All that a hub folder holds. `sampling`: fields of SamplingOptions; `figures`: what `mvar evaluate` wrote."""

    weights: Weights
    tokenizer: VQVAE
    preprocessing: Preprocessing
    sampling: Mapping[str, Any]
    license: str | None = None
    figures: Mapping[str, Any] | None = None
    grid_HWC: Bytes | None = None
    source: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def config(self) -> HubConfig:
        weights = self.weights
        return HubConfig(
            model=weights.config,
            precision=weights.precision,
            step=weights.step,
            sampling=dict(self.sampling),
            license=self.license,
            source=self.source,
        )

    def card(self, name: str, parameters: int) -> str:
        """README.md of a folder of that name."""
        return model_card(
            name,
            self.config,
            self.preprocessing,
            self.tokenizer.geometry,
            parameters=parameters,
            figures=self.figures,
            with_grid=self.grid_HWC is not None,
        )


def write_hub(
    out: Path, model: HubModel, *, dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write the folder, in place of a hub folder that had its name. Returns its files.

    Raises CheckpointError: the weights are not those of their geometry, or `out` holds something else; WriteError.
    """
    require_free(out)
    weights = replace(model.weights, config=geometry(model.weights.config))
    parameters = sum(value.numel() for value in empty_model(weights).parameters())
    with writing_folder(out) as folder:
        write_shards(folder, weights, dtype=dtype, shard_bytes=shard_bytes)
        write_vqvae(folder / TOKENIZER, model.tokenizer)
        write_text(folder / CONFIG, model.config.text())
        write_text(folder / PREPROCESSING, model.preprocessing.text())
        if model.figures is not None:
            write_text(folder / FIGURES, json.dumps(model.figures, indent=1) + "\n")
        if model.grid_HWC is not None:
            with synced(folder / GRID) as file:
                Image.fromarray(model.grid_HWC).save(file, format="PNG")
        write_text(folder / CARD, model.card(out.name, parameters))
    return sorted(path for path in out.rglob("*") if path.is_file())


def read_figures(path: Path) -> dict[str, Any]:
    """What `mvar evaluate --json` wrote. Raises ConfigError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--figures {path}: cannot be read as JSON ({error}). Give what `mvar evaluate --json` wrote."
        ) from None
    figures = tree.get("figures") if isinstance(tree, dict) else None
    numbers = isinstance(figures, dict) and all(isinstance(value, int | float) for value in figures.values())
    if not isinstance(tree, dict) or tree.get("name") != "evaluate" or not figures or not numbers:
        raise ConfigError(f"--figures {path}: holds no figures. Give what `mvar evaluate --json FILE` wrote.")
    return tree
