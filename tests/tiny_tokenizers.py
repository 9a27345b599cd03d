"""A tokenizer small enough to train in a test, with every term of the loss, and the files and pictures it needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mvar.run.launcher import Place
from mvar.run.world import World
from mvar.tokenizer.training.config import TokenizerTrainConfig
from mvar.tokenizer.training.parallel import part_of
from mvar.tokenizer.training.perceptual import STAGES
from mvar.tokenizer.training.trainer import Trainer
from mvar.train_tokenizer import loss_terms

GEOMETRY = {
    "channels": 8,
    "channel_mult": (1, 2, 2),
    "res_blocks": 1,
    "latent_channels": 4,
    "vocab_size": 24,
    "patch_nums": (1, 2, 4),
}
ALL_TERMS = {
    "perceptual": 0.5,
    "adversarial": 0.5,
    "adversarial_start": 2,
    "adversarial_channels": 8,
    "adversarial_layers": 2,
}
ALONE = World(Place("alone"), torch.device("cpu"))


def vgg_weights(width: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """A VGG-16 in torchvision's layout, `width` channels where the real one has 64; its stages widen as that one's."""
    generator = torch.Generator().manual_seed(seed)
    channels, weights = 3, {}
    for stage, numbers in enumerate(STAGES):
        for number in numbers:
            wider = width * min(2**stage, 8)
            scale = (2 / (9 * channels)) ** 0.5
            weights[f"features.{number}.weight"] = torch.randn(wider, channels, 3, 3, generator=generator) * scale
            weights[f"features.{number}.bias"] = torch.randn(wider, generator=generator) * 0.1
            channels = wider
    return weights


def write_vgg(path: Path, width: int = 8, seed: int = 0) -> Path:
    """Write `vgg_weights` as .safetensors or .pth, with something of a classifier beside them."""
    weights = vgg_weights(width, seed) | {"classifier.0.weight": torch.zeros(2, 2)}
    if path.suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    return path


def write_pictures(folder: Path, count: int = 12, side: int = 20, seed: int = 0) -> Path:
    """Colourful pictures of a few soft shapes, in two classes."""
    generator = np.random.default_rng(seed)
    for name in ("bars", "spots"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            tile = generator.integers(0, 255, (3, 3, 3) if name == "spots" else (1, 3, 3), dtype=np.uint8)
            Image.fromarray(tile).resize((side, side)).save(folder / name / f"{number}.png")
    return folder


def some_pixels(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    """uint8 (N, H, W, 3), soft colour gradients."""
    generator = np.random.default_rng(seed)
    tiles = generator.integers(0, 255, (count, 3, 3, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(tile).resize((side, side))) for tile in tiles])


def tiny_config(backbone: Path | None = None, **changes) -> TokenizerTrainConfig:
    """Every term of the loss if there is a backbone, else those without networks."""
    loss = {} if backbone is None else ALL_TERMS | {"perceptual_backbone": str(backbone)}
    loss |= changes.pop("loss", {})
    settings = {"images": "i", "out": "o", "steps": 20, "batch": 6, "warmup_steps": 2, "precision": "fp32"}
    settings |= {"geometry": GEOMETRY, "loss": loss}
    return TokenizerTrainConfig.model_validate(settings | changes)


def tiny_trainer(config: TokenizerTrainConfig, world: World = ALONE, threads: int = 1) -> Trainer:
    return Trainer(config, loss_terms(config.loss), world, threads)


def train_some(world: World, backbone: str, steps: int, threads: int = 1, **changes) -> dict[str, object]:
    """Measurements of some steps, and quality and pictures after them: JSON-able, for every rank."""
    config = tiny_config(Path(backbone), **changes)
    trainer = tiny_trainer(config, world, threads)
    part = part_of(config.batch, world)
    measured = [trainer.step(some_pixels(config.batch, seed)[part.start : part.stop]) for seed in range(steps)]
    own = part_of(5, world)
    quality = trainer.quality(some_pixels(5, 99)[own.start : own.stop])
    reconstructed_NCHW = trainer.reconstruct(some_pixels(5, 99))[0]
    return {"measured": measured, "quality": vars(quality), "reconstructed": reconstructed_NCHW.flatten().tolist()}
