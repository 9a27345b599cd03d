"""From pictures to codes and back: the tokenizer and sampling on a GPU against the same on the CPU, and its training.

Shapes: B images, L tokens, H, W pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.encoder import BatchEncoder
from mvar import MVAR, VQVAE, generate
from mvar.model.init import init_weights_
from mvar.model.kernels.arithmetic import ieee, products
from mvar.model.kernels.group_norm import group_norm
from mvar.run.world import World
from tests.golden import golden
from tests.gpu.parity import BANDS, error
from tests.tiny_tokenizers import ALONE, some_pixels, tiny_config, tiny_trainer, write_vgg

pytestmark = pytest.mark.gpu

IMAGES = 4
EXACT = 1e-5
"""Relative error of fp32 results. TF32 has about 5e-4: it must not slip in."""


@pytest.fixture(scope="module")
def tokenizer(rehearsal: bool) -> VQVAE:
    """The published geometry (narrow in a rehearsal); words are outputs of its own encoder."""
    torch.manual_seed(0)
    vqvae = VQVAE(channels=32 if rehearsal else 160).eval()
    with torch.no_grad():
        rows = vqvae.features(pictures(2)).permute(0, 2, 3, 1).reshape(-1, vqvae.latent_channels)
    words = rows[torch.randint(len(rows), (vqvae.vocab_size,))]
    vqvae.quantizer.embedding.weight.data.copy_(words * torch.logspace(-1.5, 0.5, len(words))[:, None])
    return vqvae


@pytest.fixture
def on_device(tokenizer: VQVAE, device: torch.device) -> Iterator[VQVAE]:
    """The same tokenizer, lent to the device."""
    yield tokenizer.to(device)
    tokenizer.to("cpu")


@pytest.fixture(scope="module")
def codes_of_cpu(tokenizer: VQVAE) -> Tensor:
    return tokenizer.encode(pictures(IMAGES))


def pictures(count: int) -> Tensor:
    """float32 (B, 3, 256, 256) in [-1, 1]."""
    pixels_BHWC = torch.from_numpy(some_pixels(count, seed=count, side=256))
    return pixels_BHWC.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def test_fp32_codes_are_those_of_the_cpu(codes_of_cpu: Tensor, on_device: VQVAE, device: torch.device) -> None:
    """As `mvar tokenize` makes them: nearly all. Sums in another order may tip a code that is a tie."""
    torch.nn.utils.convert_conv2d_weight_memory_format(on_device, torch.channels_last)
    codes_BL = BatchEncoder(on_device, device, batch=2)(some_pixels(IMAGES, seed=IMAGES, side=256))
    agreement = (torch.from_numpy(codes_BL.astype("int64")) == codes_of_cpu).float().mean()
    print(f"agreement {agreement:.5f}")
    assert agreement >= 0.995


def test_fp32_has_no_tf32_in_it(tokenizer: VQVAE, codes_of_cpu: Tensor, device: torch.device) -> None:
    """Features, inputs of the transformer and pixels, in the arithmetic of precision=fp32."""
    images_BCHW = pictures(2)
    with torch.no_grad():
        wanted = [tokenizer.features(images_BCHW), tokenizer.decode(codes_of_cpu[:2])]
        wanted.append(tokenizer.inputs_from_codes(codes_of_cpu[:2]))
        tokenizer.to(device)
        codes_BL = codes_of_cpu[:2].to(device)
        with ieee(device):
            found = [tokenizer.features(images_BCHW.to(device)), tokenizer.decode(codes_BL)]
        # The quantizer sees to it itself, whatever the process allows.
        with products(device, tf32=True):
            found.append(tokenizer.inputs_from_codes(codes_BL))
        tokenizer.to("cpu")
    errors = [error(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
    print(f"features, pixels, inputs: {errors}")
    assert max(errors) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "side"), [(160, 256), (640, 16), (40, 26)])
def test_group_norm_of_channels_last_maps_equals_float64(
    device: torch.device, rehearsal: bool, channels: int, side: int, dtype: torch.dtype
) -> None:
    """Our kernels, with SiLU behind; a map far from zero, whose squares would drown its variance."""
    generator = torch.Generator().manual_seed(side)
    x_BCHW = (torch.randn(3, channels, side // (8 if rehearsal else 1), side, generator=generator) + 3).to(dtype)
    norm = nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)
    nn.init.normal_(norm.weight, generator=generator)
    wanted = F.silu(copy.deepcopy(norm).double()(x_BCHW.double()))
    x_BCHW = x_BCHW.to(device).contiguous(memory_format=torch.channels_last)
    found = group_norm(norm.to(device, dtype if rehearsal else None), x_BCHW, silu=True)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == dtype
    assert error(found, wanted) < BANDS[dtype].value


def test_bf16_encoding_runs(codes_of_cpu: Tensor, on_device: VQVAE, device: torch.device) -> None:
    """Faster, and other codes for about a quarter of the tokens: far more agree than chance would have."""
    encoder = BatchEncoder(on_device, device, batch=IMAGES, precision="bf16")
    codes_BL = encoder(some_pixels(IMAGES, seed=IMAGES, side=256)).astype("int64")
    agreement = (torch.from_numpy(codes_BL) == codes_of_cpu).float().mean()
    print(f"agreement {agreement:.3f}")
    assert agreement > 0.2


def test_greedy_samples_are_the_official_ones(device: torch.device) -> None:
    model = MVAR(2, 10, (1, 2, 3, 4), 64, 8)
    model.load_state_dict(as_float(golden("mvar_tiny", "state.safetensors")))
    vqvae = VQVAE(32, 8, 64, (1, 2, 3, 4))
    vqvae.load_state_dict(as_float(golden("vqvae_tiny", "state_enc_quant.safetensors", "state_dec.safetensors")))
    model, vqvae, wanted = model.to(device), vqvae.to(device), golden("mvar_tiny", "infer.safetensors")
    codes_BL = generate(model, vqvae, wanted["a.label"].to(device), cfg=1.5, top_k=1, top_p=0.0)
    assert torch.equal(codes_BL.cpu(), torch.cat([wanted[f"a.idx_{scale}"] for scale in range(4)], dim=1))
    with torch.no_grad(), ieee(device):
        images_BCHW = vqvae.decode(codes_BL).cpu()
    torch.testing.assert_close((images_BCHW + 1) / 2, wanted["a.img"], rtol=0, atol=1e-5)


def as_float(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def test_samples_do_not_depend_on_the_batch(device: torch.device, stored: torch.dtype | None) -> None:
    """One image and many, with guidance. In fp32 an image's codes are its own; 16-bit rounding depends on shapes."""
    model = MVAR(depth=2, num_classes=10, width=256, heads=4, vocab_size=512)
    init_weights_(model, 0, init_gamma=0.3, init_head=1.0)
    torch.manual_seed(0)
    vqvae = VQVAE(channels=32, vocab_size=512).eval()
    if stored is not None:
        model.store_matmuls_(stored)
    model, vqvae = model.eval().to(device), vqvae.to(device)
    labels_B = torch.arange(5, device=device)
    many_BL = generate(model, vqvae, labels_B, seeds=range(5))
    one_BL = torch.cat([generate(model, vqvae, labels_B[i : i + 1], seeds=[i]) for i in range(5)])
    assert many_BL.shape == (5, 680)
    agreement = (many_BL == one_BL).float().mean()
    print(f"agreement {agreement:.4f}")
    if stored is None:
        assert agreement >= 0.99
    assert len(many_BL.unique()) > 100


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_the_tokenizers_training_is_that_of_the_cpu(
    device: torch.device, precision: str, tmp_path: Path
) -> None:
    """All terms: distance, perceptual, adversarial from step 2 on, codebook."""
    config = tiny_config(write_vgg(tmp_path / "vgg.safetensors"), precision=precision)
    reference = tiny_config(write_vgg(tmp_path / "vgg.safetensors"))
    ours, theirs = tiny_trainer(config, World(ALONE.place, device)), tiny_trainer(reference)
    for step in range(4):
        pixels_BHWC = some_pixels(config.batch, step)
        found, wanted = ours.step(pixels_BHWC), theirs.step(pixels_BHWC)
        print(f"step {step}: {found}")
        assert found.keys() == wanted.keys()
        assert_measured(found, wanted, first=step == 0, exact=precision == "fp32")


def assert_measured(found: dict[str, Any], wanted: dict[str, Any], *, first: bool, exact: bool) -> None:
    """The loss agrees; later steps differ by what a code that tipped has changed."""
    band = (1e-3 if first else 2e-2) if exact else 1e-1
    assert found["loss"] == pytest.approx(wanted["loss"], rel=band), (found, wanted)
