import json

import pytest
import torch

from mvar.errors import ConfigError, TokenizerError
from mvar.scales import PATCH_NUMS_256
from mvar.tokenizer.vqvae import VQVAE
from tests.golden import golden, golden_json


def published_tiny() -> tuple[VQVAE, dict[str, torch.Tensor]]:
    vqvae = VQVAE(channels=32, latent_channels=8, vocab_size=64, patch_nums=(1, 2, 3, 4)).requires_grad_(False)
    state = golden("vqvae_tiny", "state_enc_quant.safetensors", "state_dec.safetensors")
    vqvae.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    return vqvae, golden("vqvae_tiny", "io.safetensors")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        vqvae = VQVAE()
    expected = {name: shape for name, (shape, _) in golden_json("keys", "vqvae_keys.json").items()}
    assert {name: list(value.shape) for name, value in vqvae.state_dict().items()} == expected
    assert (vqvae.image_size, vqvae.downsampling, vqvae.patch_nums) == (256, 16, PATCH_NUMS_256)


def test_published_encoder_and_codes_are_reproduced():
    vqvae, io = published_tiny()
    close(vqvae.encoder(io["img"]), io["enc"])
    close(vqvae.features(io["img"]), io["f"])
    assert torch.equal(vqvae.encode(io["img"]), torch.cat([io[f"idx_{k}"] for k in range(4)], dim=1))


def test_published_reconstructions_are_reproduced_scale_by_scale():
    vqvae, io = published_tiny()
    codes_BL = torch.cat([io[f"idx_{k}"] for k in range(4)], dim=1)
    close(vqvae.inputs_from_codes(codes_BL), io["var_input"])
    for scale in range(4):
        f_hat = vqvae.quantizer.latent_from_codes(codes_BL, scale + 1)
        close(f_hat, io[f"fhat_{scale}"])
        close(f_hat, io[f"fhat_from_idx_{scale}"])
        close(vqvae.decode_latent(f_hat), io[f"rec_{scale}"])
    close(vqvae.post_quant_conv(f_hat), io["post_quant"])
    close(vqvae.decode(codes_BL), io["rec_direct"])


def test_channels_last_gives_the_same_codes():
    vqvae, io = published_tiny()
    vqvae = vqvae.to(memory_format=torch.channels_last)
    images = io["img"].contiguous(memory_format=torch.channels_last)
    assert vqvae.encoder.conv_in(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(vqvae.encode(images), torch.cat([io[f"idx_{k}"] for k in range(4)], dim=1))


@pytest.mark.parametrize(
    ("options", "image_size"),
    [
        ({"channel_mult": (1, 2, 4), "patch_nums": (1, 2, 3, 4)}, 16),
        ({"channel_mult": (1, 1, 2, 2), "patch_nums": (1, 2, 3, 4)}, 32),
        ({"channel_mult": (1,), "patch_nums": (1, 2, 5), "res_blocks": 1}, 5),
        ({"channel_mult": (1, 2), "patch_nums": (4,), "phis": 1, "channels": 48}, 8),
    ],
)
def test_small_geometries_go_from_pictures_to_codes_and_back(options, image_size):
    torch.manual_seed(0)
    vqvae = VQVAE(**({"channels": 32, "latent_channels": 4, "vocab_size": 16} | options))
    assert vqvae.image_size == image_size
    images = torch.rand(2, 3, image_size, image_size) * 2 - 1
    codes_BL = vqvae.encode(images)
    assert codes_BL.dtype == torch.int64
    assert codes_BL.shape == (2, sum(side * side for side in options["patch_nums"]))
    decoded = vqvae.decode(codes_BL)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert not decoded.requires_grad


def test_decoded_pictures_are_clamped():
    vqvae = VQVAE(32, 4, 16, (1, 2), channel_mult=(1, 1)).requires_grad_(False)
    vqvae.decoder.conv_out.bias.fill_(30.0)
    assert torch.equal(vqvae.decode(torch.zeros(1, 5, dtype=torch.int64)), torch.ones(1, 3, 4, 4))


def test_encoding_under_autocast_gives_codes_and_float32_pictures():
    vqvae = VQVAE(32, 4, 16, (1, 2), channel_mult=(1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes_BL = vqvae.encode(torch.zeros(2, 3, 4, 4))
        decoded = vqvae.decode(codes_BL)
    assert codes_BL.shape == (2, 5)
    assert decoded.dtype == torch.float32


def test_geometry_survives_json_and_rebuilds_the_same_shapes():
    vqvae = VQVAE(32, 4, 16, (1, 2), channel_mult=(1, 2), res_blocks=1, phis=3, phi_ratio=0.25)
    again = VQVAE(**json.loads(json.dumps(vqvae.geometry)))
    again.load_state_dict(vqvae.state_dict())
    assert again.geometry == vqvae.geometry


def test_pictures_of_another_size_are_refused():
    with pytest.raises(TokenizerError, match=r"got shape \[1, 3, 8, 8\], expected \(batch, 3, 4, 4\)"):
        VQVAE(32, 4, 16, (1, 2), channel_mult=(1, 1)).encode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "options", [{"channels": 0}, {"channel_mult": ()}, {"channel_mult": (1, 0)}, {"res_blocks": 0}]
)
def test_an_impossible_geometry_is_refused(options):
    with pytest.raises(ConfigError):
        VQVAE(**({"channels": 32, "patch_nums": (1, 2)} | options))
