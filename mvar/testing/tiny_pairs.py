"""A model and a tokenizer small enough to sample a thousand images from in a test, as files."""

from __future__ import annotations

from pathlib import Path

import torch

from mvar.checkpoint.sharding import write_safetensors
from mvar.checkpoint.weights import Weights
from mvar.config import ModelConfig, Precision
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from mvar.tokenizer.files import save_tokenizer
from mvar.tokenizer.vqvae import VQVAE

PYRAMID = (1, 2, 4)
CLASSES = 4
SIDE_PX = 8


def write_pair(folder: Path, *, seed: int = 0, precision: Precision | None = None) -> list[str]:
    """Write weights and tokenizer; returns the arguments of `mvar sample` that name them."""
    config = ModelConfig(
        depth=2, width=64, heads=2, num_classes=CLASSES, patch_nums=PYRAMID, vocab_size=32, latent_channels=4
    )
    model = MVAR.from_config(config, num_classes=CLASSES)
    init_weights_(model, seed, ModelConfig(init_gamma=1.0, init_head=2.0, init_conditioning=1.0))
    state = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.safetensors"
    write_safetensors(weights, Weights(weights, config, shapes, lambda name: state[name].detach(), precision))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_tokenizer(tokenizer, VQVAE(32, 4, 32, PYRAMID, channel_mult=(1, 1), res_blocks=1))
    return ["--weights", str(weights), "--tokenizer", str(tokenizer)]
