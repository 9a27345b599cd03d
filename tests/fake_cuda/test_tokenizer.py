"""Tokenizing and a tokenizer's training on a GPU: all tensors lie there, and the host reads none.

Legend: B images.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mvar.images.arrays import to_model_range
from mvar.tokenizer.training.config import LossConfig
from mvar.tokenizer.training.discriminator import PatchDiscriminator, discriminator_loss, generator_loss
from mvar.tokenizer.training.losses import LossTerm, Reconstruction, total_loss
from mvar.tokenizer.training.perceptual import Perceptual
from mvar.tokenizer.vqvae import VQVAE
from mvar.train_tokenizer import loss_terms
from tests.fake_cuda.backward import gradients
from tests.fake_cuda.machine import GPU, gpu, numbers, placed
from tests.fake_cuda.models import IMAGES, TOKENS, tokenizer
from tests.tiny_tokenizers import write_vgg

pytestmark = pytest.mark.fake_cuda

SIDE = 8


@pytest.mark.parametrize("half", [False, True])
def test_tokenizing_stays_there(half: bool) -> None:
    with gpu() as seen:
        vqvae = placed(lambda: tokenizer().to(memory_format=torch.channels_last))
        # Not in bf16: without a GPU torch believes that cuDNN has no such convolutions, and takes others.
        autocast = torch.autocast("cuda", torch.float16) if half else nullcontext()
        seen.crossings.clear()  # those of moving the model
        bytes_BHWC = torch.zeros(IMAGES, SIDE, SIDE, 3, dtype=torch.uint8, device=GPU)
        with torch.inference_mode(), autocast:
            images_BCHW = to_model_range(bytes_BHWC).contiguous(memory_format=torch.channels_last)
            codes_BL = vqvae.quantizer.encode(vqvae.features(images_BCHW))
            images_BCHW = vqvae.decode(codes_BL)
    assert (codes_BL.device, tuple(codes_BL.shape)) == (GPU, (IMAGES, TOKENS))
    assert (images_BCHW.device, tuple(images_BCHW.shape)) == (GPU, (IMAGES, 3, SIDE, SIDE))
    assert seen.crossings == [] and seen.kernels() == {"group_norm"}


@pytest.mark.parametrize("half", [False, True])
def test_a_step_of_a_tokenizer_s_training_stays_there(half: bool, tmp_path: Path) -> None:
    side = 32  # the perceptual network halves it four times
    backbone = write_vgg(tmp_path / "vgg.safetensors", width=4)
    with gpu() as seen:
        vqvae = placed(lambda: VQVAE(32, 4, 16, (1, 2, 4, 16), channel_mult=(1, 1)))
        network = placed(lambda: PatchDiscriminator(8, 2))
        terms = [*loss_terms(LossConfig()), LossTerm("perceptual", 0.5, placed(lambda: Perceptual(backbone)))]
        seen.crossings.clear()  # those of moving the models
        images_BCHW = torch.zeros(IMAGES, 3, side, side, device=GPU)
        autocast = torch.autocast("cuda", torch.bfloat16) if half else nullcontext()
        with autocast:
            f_BChw = vqvae.features(images_BCHW)
        quantized = vqvae.quantizer(f_BChw, numbers(IMAGES) + 1)
        with autocast:
            reconstructed_BCHW = vqvae.pixels(quantized.f_hat_BChw)
            made = Reconstruction(images_BCHW, reconstructed_BCHW.float(), quantized)
            loss, _ = total_loss(terms, made)
            loss = loss + generator_loss(network(made.reconstructed_BCHW).float())
            of_network = discriminator_loss(
                network(images_BCHW).float(), network(made.reconstructed_BCHW.detach()).float()
            )
        assert gradients(loss).keys() >= set(vqvae.parameters())
        assert gradients(of_network).keys() == set(network.parameters())
    assert seen.crossings == []
