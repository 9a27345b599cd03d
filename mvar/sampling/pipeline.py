"""Labels in, pictures out: a model and its tokenizer as one object, in the manner of diffusers.

    pipe = MVARPipeline.from_pretrained("models/d16")
    images = pipe([207, "golden retriever"], guidance=1.5, seeds=[0, 1]).images

Shapes: B images, H = W side of a picture, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvar.config import Precision
from mvar.errors import CheckpointError, ConfigError
from mvar.hub.folder import HubModel, write_hub
from mvar.hub.layout import CONFIG, PREPROCESSING, HubConfig, Preprocessing
from mvar.hub.objects import load_model, load_vqvae, weights_of
from mvar.hub.place import local
from mvar.images.arrays import to_uint8
from mvar.log import tell
from mvar.model.kernels.arithmetic import products
from mvar.model.transformer import MVAR
from mvar.sampling.classes import label_called
from mvar.sampling.loading import pick_device
from mvar.sampling.options import DEFAULTS, FloatTable, IntTable, SamplingOptions
from mvar.sampling.painter import decoded
from mvar.sampling.precision import DTYPES, SamplePrecision, arithmetic, choose
from mvar.sampling.sampler import check_geometry, generate_latent
from mvar.tokenizer.vqvae import VQVAE

OutputType = Literal["pil", "np", "pt"]
Label = int | str
BATCH = 8
"""Images drawn together where nothing is asked for: small enough for any device."""


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: as `output_type` asked for; `labels` and `seeds`: of each image."""

    images: list[Image.Image] | NDArray[np.float32] | Tensor
    labels: tuple[int, ...]
    seeds: tuple[int, ...]


class MVARPipeline:
    """Draws pictures. Its parts: `model`, `tokenizer`, `options` (how to draw where a call says nothing), `classes`.

    Raises ConfigError where model and tokenizer do not fit together.
    """

    def __init__(
        self,
        model: MVAR,
        tokenizer: VQVAE,
        *,
        options: SamplingOptions = DEFAULTS,
        classes: Sequence[str] | None = None,
        precision: SamplePrecision = "fp32",
        stated: HubConfig | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        check_geometry(model, tokenizer.quantizer)
        options.of_scales(model.pyramid.num_scales)
        self.model, self.tokenizer, self.options = model.eval(), tokenizer.eval(), options
        self.precision = precision
        self.preprocessing = preprocessing or Preprocessing(
            image_size=tokenizer.image_size, classes=None if classes is None else tuple(classes)
        )
        self._stated = stated
        names = self.classes
        if names is not None and len(names) != model.num_classes:
            raise ConfigError(f"classes: {len(names)} names, but the model has {model.num_classes} classes.")

    @classmethod
    def from_pretrained(
        cls, place: str | Path, *, device: str = "auto", precision: str = "auto", revision: str | None = None
    ) -> MVARPipeline:
        """From a hub folder, or a repository "owner/name" on the Hugging Face Hub (at `revision`).

        `device`: auto (a GPU where there is one), cpu, cuda, cuda:1. `precision`: auto (what the weights were trained
        in, on GPUs; fp32 on CPUs), fp32, tf32, bf16, fp16. Raises CheckpointError, TokenizerError, ConfigError,
        BackendError.
        """
        where = pick_device(device)
        folder = local(place, revision)
        if not folder.is_dir() or not (folder / CONFIG).is_file():
            raise CheckpointError(
                f"{place}: is no hub folder. Make one: mvar export --weights {place} --tokenizer FILE --to hub DIR"
            )
        stated = HubConfig.read(folder / CONFIG)
        preprocessing = Preprocessing.read(folder / PREPROCESSING)
        chosen = choose(precision, where, stated.precision)
        tell([chosen])
        way = cast(SamplePrecision, chosen.way)
        model, _ = load_model(folder)
        model.requires_grad_(False).store_matmuls_(DTYPES[way])
        options = _stated_options(folder / CONFIG, stated.sampling)
        pipeline = cls(
            model, load_vqvae(folder), options=options, precision=way, stated=stated, preprocessing=preprocessing
        )
        return pipeline.to(where)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of their numbers, where they are known."""
        return self.preprocessing.classes

    @property
    def device(self) -> torch.device:
        return self.model.pos_start.device

    def to(self, device: str | torch.device) -> MVARPipeline:
        """Move model and tokenizer. The arithmetic stays: `from_pretrained` chooses it for the device it is given."""
        self.model.to(device)
        self.tokenizer.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @torch.no_grad()
    def __call__(
        self,
        labels: Label | Sequence[Label] | Tensor,
        guidance: float | Sequence[float] | None = None,
        seeds: int | Iterable[int] | None = None,
        *,
        top_k: IntTable | None = None,
        top_p: FloatTable | None = None,
        temperature: FloatTable | None = None,
        smooth: bool | None = None,
        options: SamplingOptions | None = None,
        output_type: OutputType = "pil",
        batch: int = BATCH,
    ) -> PipelineOutput:
        """A picture for each label.

        `labels`: numbers or names. `guidance`: `SamplingOptions.cfg`, a number or one for each scale. `seeds`: a whole
        number for each image; one alone is the first image's, and the others count on from it; default 0. What is None
        is as `options` has it, by default the pipeline's own. `batch`: images drawn together, which changes them no
        more than rounding does. `output_type`: "pil": a list of pictures; "np": float32 (B, H, W, 3) in [0, 1]; "pt":
        float32 (B, 3, H, W) in [0, 1], on the CPU. Raises ConfigError, MvarError.
        """
        if output_type not in get_args(OutputType):
            raise ConfigError(f"output_type {output_type!r}: expected one of {', '.join(get_args(OutputType))}.")
        if batch < 1:
            raise ConfigError(f"batch {batch}: expected a whole number from 1.")
        numbers = self._numbers(labels)
        own = _seeds(seeds, len(numbers))
        given = {
            "cfg": guidance if guidance is None or isinstance(guidance, int | float) else tuple(guidance),
            "top_k": top_k,
            "top_p": top_p,
            "temperature": temperature,
            "smooth": smooth,
        }
        changed = {name: value for name, value in given.items() if value is not None}
        how = dataclasses.replace(options or self.options, **cast(dict[str, Any], changed))
        drawn = [
            self._draw(numbers[first : first + batch], own[first : first + batch], how)
            for first in range(0, len(numbers), batch)
        ]
        return PipelineOutput(_as(output_type, torch.cat(drawn)), tuple(numbers), tuple(own))

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> None:
        """Write the hub folder of this pipeline: complete or absent. `license`: default: that of where it came from.

        Raises CheckpointError where `folder` holds something else, WriteError.
        """
        stated = self._stated
        weights = weights_of(self.model)
        weights = dataclasses.replace(weights, precision=self._trained(), step=None if stated is None else stated.step)
        content = HubModel(
            weights,
            self.tokenizer,
            self.preprocessing,
            dataclasses.asdict(self.options),
            license=license or (None if stated is None else stated.license),
            source={} if stated is None else stated.source,
        )
        write_hub(Path(folder), content)

    def _trained(self) -> Precision | None:
        return None if self._stated is None else self._stated.precision

    def _draw(self, labels: Sequence[int], seeds: Sequence[int], options: SamplingOptions) -> Tensor:
        """(B, 3, H, W) in [-1, 1], on the CPU."""
        with products(self.device, tf32=arithmetic(self.precision, self.device).tf32):
            labels_B = torch.tensor(labels, dtype=torch.int64)
            f_hat_BChw = generate_latent(self.model, self.tokenizer, labels_B, options, seeds)
        with products(self.device, tf32=self.precision == "tf32"):
            return decoded(self.tokenizer, f_hat_BChw, self.precision).cpu()

    def _numbers(self, labels: Label | Sequence[Label] | Tensor) -> list[int]:
        if isinstance(labels, Tensor):
            labels = labels.reshape(-1).tolist()
        several = [labels] if isinstance(labels, int | str | np.integer) else list(labels)
        if not several:
            raise ConfigError("labels: got none, expected at least one.")
        return [self._number(label) for label in several]

    def _number(self, label: Label) -> int:
        if not isinstance(label, str):
            return int(label)
        if self.classes is None:
            raise ConfigError(
                f"labels: {label!r}: the names of this model's classes are not known. Give numbers from 0 to "
                f"{self.model.num_classes - 1}."
            )
        return label_called(label, self.classes, "labels")


def _seeds(seeds: int | Iterable[int] | None, count: int) -> list[int]:
    if seeds is None or isinstance(seeds, int):
        return list(range(seeds or 0, (seeds or 0) + count))
    given = [int(seed) for seed in seeds]
    if len(given) != count:
        raise ConfigError(f"seeds: got {len(given)} for {count} images, expected one for each.")
    return given


def _as(output_type: OutputType, images_BCHW: Tensor) -> list[Image.Image] | NDArray[np.float32] | Tensor:
    if output_type == "pil":
        return [Image.fromarray(image) for image in to_uint8(images_BCHW)]
    unit_BCHW = ((images_BCHW.float() + 1) / 2).clamp(0, 1)
    if output_type == "pt":
        return unit_BCHW
    array: NDArray[np.float32] = unit_BCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return array


def _stated_options(path: Path, fields: dict[str, Any]) -> SamplingOptions:
    """Of config.json. Raises ConfigError."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    try:
        return SamplingOptions(**values)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: sampling: {error} Correct it there, or take it out.") from None
