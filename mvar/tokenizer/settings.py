"""What `mvar train-tokenizer` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mvar.config import Fraction, Section
from mvar.errors import MvarError
from mvar.scales import PATCH_NUMS_256, ScalePyramid


class GeometryConfig(Section):
    """Arguments of VQVAE. The defaults are the published 256 px tokenizer."""

    channels: PositiveInt = Field(160, description="width of the first level")
    channel_mult: tuple[PositiveInt, ...] = Field((1, 1, 2, 2, 4), description="width of each level / channels")
    res_blocks: PositiveInt = Field(2, description="residual blocks of an encoder level; a decoder level has one more")
    latent_channels: PositiveInt = Field(32, description="channels of a codebook word")
    vocab_size: PositiveInt = Field(4096, description="words of the codebook")
    patch_nums: tuple[PositiveInt, ...] = Field(PATCH_NUMS_256, description="side of each token map, coarse to fine")
    phis: PositiveInt = Field(4, description="phi convolutions, shared by neighbouring scales")
    phi_ratio: Fraction = Field(0.5, description="share of the phi convolution in what a scale adds")

    @model_validator(mode="after")
    def _possible(self) -> GeometryConfig:
        try:
            ScalePyramid(self.patch_nums)
        except MvarError as error:
            raise ValueError(str(error)) from None
        if not self.channel_mult:
            raise ValueError("channel_mult is empty; expected one number for each level, such as [1, 2, 4]")
        return self

    @property
    def image_size(self) -> int:
        """Side of a picture, in pixels."""
        return self.patch_nums[-1] << (len(self.channel_mult) - 1)


class LossConfig(Section):
    """Weights of the loss terms; 0 leaves a term out."""

    l1: NonNegativeFloat = Field(1.0, description="mean absolute error of the pictures, range [-1, 1]")
    l2: NonNegativeFloat = Field(1.0, description="mean squared error of the pictures")
    codebook: NonNegativeFloat = Field(1.0, description="squared error between running reconstruction and features")
    commitment: NonNegativeFloat = Field(0.25, description="the same, moving the features")


class TokenizerTrainConfig(Section):
    """Everything `mvar train-tokenizer` can be told."""

    images: Path = Field(description="folder of class folders (or of train/ and val/ with class folders)")
    out: Path = Field(description="folder for tokenizer.safetensors and its training; the same command resumes")
    geometry: GeometryConfig = Field(default_factory=lambda: GeometryConfig())
    seed: NonNegativeInt = Field(0, description="seed of weights, order of pictures, crops, revived words")
    val_fraction: Fraction = Field(0.1, description="images held out where the folder has no val/")
    validate_images: PositiveInt = Field(500, description="held-out images that quality is measured on, at most")
    resize: float = Field(1.125, ge=1, description="shorter side before the crop / the pictures' side")
    ram_gib: NonNegativeFloat = Field(4.0, description="memory for decoded images, in GiB")
    steps: PositiveInt = Field(description="optimizer steps")
    batch: PositiveInt = Field(64, description="images of a step")
    lr: PositiveFloat = Field(1e-3, description="peak learning rate")
    codebook_lr_scale: PositiveFloat = Field(1.0, description="learning rate of the codebook / of the rest")
    final_lr: Fraction = Field(0.02, description="learning rate at the end / at the peak")
    warmup_steps: NonNegativeInt = Field(50, description="steps of linear warm-up")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="Adam's moment decays")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    clip_grad: NonNegativeFloat = Field(1.0, description="global gradient norm limit; 0: off")
    loss: LossConfig = Field(default_factory=lambda: LossConfig())
    ema_decay: Fraction = Field(0.0, description="moving average of the weights, which becomes the result; 0: off")
    scale_dropout: Fraction = Field(0.0, description="share of pictures decoded from their first scales only")
    usage_decay: Fraction = Field(0.98, description="memory of the words' usage, per step")
    revive_every: NonNegativeInt = Field(20, description="steps between looks for dead words; 0: never")
    revive_below: NonNegativeFloat = Field(0.05, description="a word is dead below this share of the mean usage")
    revive_until: Fraction = Field(0.7, description="share of the training after which no word is revived")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="convolutions; auto: bf16 if fast here")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto: a GPU if there is one")
    threads: PositiveInt | None = Field(None, description="CPU threads; default: all cores")
    log_every: PositiveInt = Field(20, description="steps between two status lines")
    validate_every: NonNegativeInt = Field(500, description="steps between measurements of quality; 0: only at the end")
    save_every: PositiveInt = Field(200, description="steps between two saved states")
    grid_images: PositiveInt = Field(32, description="pictures in the reconstruction grid")

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, by dotted name: what may not change when a training is resumed."""
        indifferent = {
            *("images", "out", "ram_gib", "validate_images", "device", "threads"),
            *("log_every", "validate_every", "save_every", "grid_images"),
        }
        return _flat(self.model_dump(mode="json", exclude=indifferent))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
