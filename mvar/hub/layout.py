"""A hub folder: which files it has, and what stands in its two JSON files.

README.md                        the model card
config.json                      the model, what it was trained in, how to draw from it
model.safetensors                the weights; or several files and model.safetensors.index.json
tokenizer/config.json            the tokenizer's geometry
tokenizer/model.safetensors      its weights
preprocessing.json               size and range of images, how they were cut, the classes' names
figures.json, samples.png        what `mvar evaluate` wrote, and a sheet of samples, where they were given
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from mvar.checkpoint.tensors import FileRecord
from mvar.config import ModelConfig, Precision
from mvar.errors import CheckpointError
from mvar.version import __version__

FORMAT = "mvar-hub"
TOKENIZER_FORMAT = "mvar-hub-tokenizer"
FORMAT_VERSION = 1
CARD = "README.md"
CONFIG = "config.json"
PREPROCESSING = "preprocessing.json"
FIGURES = "figures.json"
GRID = "samples.png"
TOKENIZER = "tokenizer"

GEOMETRY = (
    "depth",
    "width",
    "heads",
    "num_classes",
    "patch_nums",
    "vocab_size",
    "latent_channels",
    "attn_l2_norm",
    "shared_conditioning",
)
"""What of a ModelConfig the weights depend on; the rest is of a training, or of the machine it ran on."""
C = TypeVar("C", bound="_JsonFile")


def geometry(config: ModelConfig) -> ModelConfig:
    """A model's geometry alone, with nothing left to defaults: kernels are chosen anew where it is loaded."""
    resolved = {"width": config.resolved_width, "heads": config.resolved_heads}
    return ModelConfig(**{name: getattr(config, name) for name in GEOMETRY} | resolved)


class _JsonFile(pydantic.BaseModel):
    """Unknown keys are ignored, so that a later minor addition does no harm."""

    model_config = pydantic.ConfigDict(frozen=True, protected_namespaces=())

    @classmethod
    def read(cls: type[C], path: Path) -> C:
        """Raises CheckpointError: missing, damaged, of another program or version."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as JSON ({error}). Give a folder that `mvar export --to hub` wrote."
            ) from None
        try:
            found = cls.model_validate(tree)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise CheckpointError(
                f"{path}: not what `mvar export --to hub` writes: {where}: {first['msg']}. Give a folder that it wrote."
            ) from None
        version = getattr(found, "format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}, this program reads {FORMAT_VERSION}. Use the version of mvar that "
                "wrote it."
            )
        return found

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


class HubConfig(_JsonFile):
    """config.json."""

    format: Literal["mvar-hub"] = "mvar-hub"
    format_version: int = FORMAT_VERSION
    model: ModelConfig
    precision: Precision | None = None
    """The arithmetic that the weights were trained in, where that is known."""
    step: int | None = None
    sampling: dict[str, Any] = {}
    """Fields of SamplingOptions: how to draw, where nothing else is asked for."""
    license: str | None = None
    source: dict[str, FileRecord] = {}
    """Of imported weights: the files that they came in."""
    mvar: str = __version__

    @pydantic.field_serializer("model")
    def _geometry(self, model: ModelConfig) -> Mapping[str, Any]:
        return geometry(model).model_dump(mode="json", include=set(GEOMETRY))


class Preprocessing(_JsonFile):
    """preprocessing.json."""

    image_size: int
    """Side of a picture, in pixels; pictures are RGB."""
    value_range: tuple[float, float] = (-1.0, 1.0)
    """What the bytes 0 and 255 are to the tokenizer."""
    transform: dict[str, Any] | None = None
    """How images were resized and cut for the training, where that is known; see docs/tokenize.md."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of their numbers, where they are known."""


class TokenizerConfig(_JsonFile):
    """tokenizer/config.json."""

    format: Literal["mvar-hub-tokenizer"] = "mvar-hub-tokenizer"
    format_version: int = FORMAT_VERSION
    geometry: dict[str, Any]
    """Arguments of VQVAE."""
    image_size: int
    mvar: str = __version__
