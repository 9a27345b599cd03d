"""What `mvar train-tokenizer` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mvar.config import DeviceChoice, WandbMode
from mvar.errors import MvarError
from mvar.images.pixels import GreyBits, Orientation, Rules
from mvar.scales import PATCH_NUMS_256, ScalePyramid
from mvar.settings import Fraction, PathOrUrl, Section, flat

SMALLEST_SEEN = 16
"""Pixels of a side that VGG-16's four halvings leave one of."""
FILES = frozenset({"loss.perceptual_backbone", "loss.perceptual_heads"})
"""Keys whose files are part of what is trained."""


def patches(side: int, layers: int) -> int:
    """Patches along a side that a discriminator of so many halvings judges in pictures of `side` pixels."""
    return (side >> layers) - 2


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
    perceptual: NonNegativeFloat = Field(0.0, description="LPIPS distance of the pictures; needs perceptual_backbone")
    perceptual_backbone: Path | None = Field(
        None, description="VGG-16 in torchvision's layout, .pth or .safetensors (tokenizer.md)"
    )
    perceptual_heads: Path | None = Field(None, description="LPIPS's linear heads; default: all channels count alike")
    adversarial: NonNegativeFloat = Field(
        0.0,
        description="generator loss; multiplies the adaptive weight, which equals the other terms' gradients",
    )
    adversarial_start: NonNegativeInt = Field(0, description="first step of discriminator and adversarial term")
    adversarial_largest: PositiveFloat = Field(1e4, description="largest adaptive weight, before the multiplication")
    adversarial_lr_scale: PositiveFloat = Field(
        1.0, description="learning rate of the discriminator / of the tokenizer"
    )
    adversarial_channels: PositiveInt = Field(64, description="channels of the discriminator's first layer")
    adversarial_layers: PositiveInt = Field(
        3, description="halvings of the side in the discriminator; 3: patches of 70 px"
    )

    @model_validator(mode="after")
    def _complete(self) -> LossConfig:
        if self.perceptual and self.perceptual_backbone is None:
            raise ValueError(
                "perceptual is on, but perceptual_backbone names no file. Give a VGG-16 in torchvision's layout, or set"
                " perceptual to 0"
            )
        if self.adversarial and not (self.l1 or self.l2 or self.perceptual):
            raise ValueError(
                "adversarial needs another term that compares pictures, which its weight follows. Set l1, l2 or"
                " perceptual above 0"
            )
        return self


class TokenizerTrainConfig(Section):
    """Everything `mvar train-tokenizer` can be told."""

    images: PathOrUrl = Field(
        description="class folders (or train/ and val/ with them), a list, or tars, as for tokenizing"
    )
    images_cache: Path | None = Field(None, description="folder that tars behind a URL are copied into")
    out: Path = Field(description="folder for tokenizer.safetensors and its training; the same command resumes")
    geometry: GeometryConfig = Field(default_factory=lambda: GeometryConfig())
    seed: NonNegativeInt = Field(0, description="seed of weights, order of pictures, crops, revived words")
    val_fraction: Fraction = Field(0.1, description="images held out where the folder has no val/")
    orientation: Orientation = Field("stored", description="exif: turn pictures as their EXIF data say")
    grey_bits: GreyBits | None = Field(None, description="bits of greyscale values deeper than 8, as for tokenizing")
    skip_bad: NonNegativeInt = Field(0, description="damaged images that may be left out; the next one takes the place")
    other_images: bool = Field(False, description="go on with images that changed, such as after one was removed")
    validate_images: PositiveInt = Field(500, description="held-out images that quality is measured on, at most")
    resize: float = Field(1.125, ge=1, description="shorter side before the crop / the pictures' side")
    ram_gib: NonNegativeFloat = Field(4.0, description="memory of a process for decoded images, in GiB")
    steps: PositiveInt = Field(description="optimizer steps")
    batch: PositiveInt = Field(64, description="images of a step, over all processes")
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
    device: DeviceChoice = Field("auto", description="where to train; auto: a GPU if there is one")
    threads: PositiveInt | None = Field(None, description="CPU threads of a process; default: cores / processes here")
    log_every: PositiveInt = Field(20, description="steps between two status lines")
    validate_every: NonNegativeInt = Field(500, description="steps between measurements of quality; 0: only at the end")
    save_every: PositiveInt = Field(200, description="steps between two saved states")
    grid_images: PositiveInt = Field(32, description="pictures in the reconstruction grid")
    wandb: WandbMode | None = Field(None, description="Weights & Biases; default: what WANDB_MODE says, else disabled")
    wandb_project: str = Field("mvar-tokenizer", description="Weights & Biases project")
    tensorboard: bool = Field(False, description="write TensorBoard events into the out folder")
    stop_before_end_s: NonNegativeFloat = Field(180, description="save and stop so long before Slurm's time limit")
    takeover_s: PositiveFloat = Field(
        90, description="a folder whose process on another host gave no sign of life for so long is taken over"
    )
    watchdog_s: NonNegativeFloat = Field(
        1800, description="end with stacks in the log if a step or a save takes longer, seconds; 0: never"
    )

    @model_validator(mode="after")
    def _large_enough(self) -> TokenizerTrainConfig:
        size, loss = self.geometry.image_size, self.loss
        if loss.perceptual and size < SMALLEST_SEEN:
            raise ValueError(
                f"loss.perceptual: pictures of {size} px are too small for the network that compares them; expected"
                f" {SMALLEST_SEEN} px or more. Set it to 0"
            )
        if loss.adversarial and patches(size, loss.adversarial_layers) < 1:
            raise ValueError(
                f"loss.adversarial_layers: {loss.adversarial_layers} halvings leave nothing of pictures of {size} px to"
                " judge. Lower it"
            )
        return self

    @property
    def rules(self) -> Rules:
        """How files become RGB pictures."""
        return Rules(orientation=self.orientation, grey_bits=self.grey_bits)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, by dotted name: what may not change when a training is resumed.

        Files are left out: what they hold counts, not where they lie.
        """
        indifferent = {
            *("images", "images_cache", "out", "ram_gib", "validate_images", "device", "threads"),
            *("log_every", "validate_every", "save_every", "grid_images", "wandb", "wandb_project", "tensorboard"),
            *("stop_before_end_s", "takeover_s", "watchdog_s", "skip_bad", "other_images"),
        }
        settings = flat(self.model_dump(mode="json", exclude=indifferent))
        # What came later is told only where it is not what states from before mean.
        later = {"orientation": "stored", "grey_bits": None}
        settings = {key: value for key, value in settings.items() if key not in later or value != later[key]}
        return {key: value for key, value in settings.items() if key not in FILES}
