import math

import pytest
import torch
import torch.nn.functional as F

from mvar.errors import ConfigError, TokenizerError
from mvar.scales import PATCH_NUMS_256, ScalePyramid
from mvar.tokenizer.quantizer import PHI_OF_SCALE, ROWS_AT_ONCE, Quantizer, phi_of_scale
from tests.golden import golden, golden_json


def small_quantizer(patch_nums=(1, 2, 3, 4), **options) -> Quantizer:
    torch.manual_seed(3)
    return Quantizer(vocab_size=50, latent_channels=6, patch_nums=patch_nums, **options).requires_grad_(False)


def random_codes(quantizer: Quantizer, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(quantizer.vocab_size, (batch, quantizer.pyramid.total), generator=generator)


def published() -> tuple[Quantizer, dict[str, torch.Tensor]]:
    io = golden("quantizer_real", "io.safetensors")
    quantizer = Quantizer(4096, 32, PATCH_NUMS_256).requires_grad_(False)
    quantizer.load_state_dict({k.removeprefix("state."): v.float() for k, v in io.items() if k.startswith("state.")})
    return quantizer, io


def test_published_codes_are_reproduced_one_by_one():
    quantizer, io = published()
    assert torch.equal(quantizer.encode(io["f"]), io["idx"])


def test_published_reconstructions_and_inputs_are_reproduced():
    quantizer, io = published()
    for scale in range(10):
        torch.testing.assert_close(
            quantizer.latent_from_codes(io["idx"], scale + 1), io[f"fhat_{scale}"], rtol=0, atol=1e-5
        )
    torch.testing.assert_close(quantizer.inputs_from_codes(io["idx"]), io["var_input"], rtol=0, atol=1e-5)


def test_phi_tables_are_the_published_ones():
    assert list(phi_of_scale(10, 4)) == golden_json("quantizer_real", "meta.json")["phi_index_per_scale"]
    assert list(phi_of_scale(4, 4)) == golden_json("vqvae_tiny", "meta.json")["phi_index_per_scale"]


def test_the_rule_for_other_pyramids_gives_the_published_tables_too():
    tables = dict(PHI_OF_SCALE)
    PHI_OF_SCALE.clear()
    try:
        derived = {key: phi_of_scale(*key) for key in tables}
    finally:
        PHI_OF_SCALE.update(tables)
    assert derived == tables


@pytest.mark.parametrize(("num_scales", "phis"), [(1, 4), (2, 4), (3, 1), (6, 4), (7, 3), (12, 5)])
def test_every_pyramid_gets_phis_in_rising_order(num_scales, phis):
    table = phi_of_scale(num_scales, phis)
    assert len(table) == num_scales
    assert list(table) == sorted(table)
    assert set(table) <= set(range(phis))


@pytest.mark.parametrize("patch_nums", [(1,), (1, 2, 3, 4), (1, 2, 3, 4, 6, 8), (2, 5)])
def test_taught_inputs_are_bit_for_bit_what_sampling_feeds(patch_nums):
    quantizer = small_quantizer(patch_nums)
    codes_BL = random_codes(quantizer)
    f_hat, fed = quantizer.start(3), []
    for scale in range(quantizer.pyramid.num_scales):
        f_hat, next_BLkC = quantizer.add_scale(f_hat, codes_BL[:, quantizer.pyramid.segment(scale)], scale)
        if next_BLkC is not None:
            fed.append(next_BLkC)
    taught_BLC = quantizer.inputs_from_codes(codes_BL)
    assert taught_BLC.shape == (3, quantizer.pyramid.total - quantizer.pyramid.lengths[0], 6)
    assert next_BLkC is None
    assert len(fed) == len(patch_nums) - 1
    assert torch.equal(taught_BLC, torch.cat(fed, dim=1)) if fed else taught_BLC.numel() == 0
    assert torch.equal(quantizer.latent_from_codes(codes_BL), f_hat)


def test_adding_a_scale_leaves_its_input_alone():
    quantizer = small_quantizer()
    before = quantizer.start(3)
    quantizer.add_scale(before, random_codes(quantizer)[:, :1], 0)
    assert torch.equal(before, quantizer.start(3))


def test_inputs_do_not_depend_on_codes_of_finer_scales():
    quantizer = small_quantizer()
    codes_BL = random_codes(quantizer)
    changed_BL = codes_BL.clone()
    changed_BL[:, 5:] = (changed_BL[:, 5:] + 1) % 50
    a, b = quantizer.inputs_from_codes(codes_BL), quantizer.inputs_from_codes(changed_BL)
    assert torch.equal(a[:, : 4 + 9], b[:, : 4 + 9])
    assert not torch.equal(a[:, 4 + 9 :], b[:, 4 + 9 :])


def test_nearest_word_is_the_one_at_the_smallest_distance():
    quantizer = small_quantizer()
    rows_NC = torch.randn(ROWS_AT_ONCE + 7, 6, generator=torch.Generator().manual_seed(1))
    distances_NV = (rows_NC.double()[:, None] - quantizer.embedding.weight.double()).square().sum(-1)
    assert torch.equal(quantizer.nearest(rows_NC), distances_NV.argmin(dim=1))


def test_autocast_changes_no_code_and_keeps_float32():
    quantizer = small_quantizer()
    f = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    plain = quantizer.encode(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(f), plain)
        assert quantizer.inputs_from_codes(plain).dtype == torch.float32
        trained = quantizer(f)
    assert torch.equal(trained.codes_BL, plain)
    assert trained.f_hat_BChw.dtype == trained.codebook_loss.dtype == torch.float32


def test_training_forward_agrees_with_encode_and_passes_gradients_straight_through():
    quantizer = small_quantizer().requires_grad_(True)
    f = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    quantized = quantizer(f)
    assert torch.equal(quantized.codes_BL, quantizer.encode(f))
    reconstructed = quantizer.latent_from_codes(quantized.codes_BL)
    torch.testing.assert_close(quantized.f_hat_BChw, reconstructed, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(quantized.f_hat_BChw.sum(), f, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(f))
    quantized.codebook_loss.backward(retain_graph=True)
    assert f.grad is None
    assert quantizer.embedding.weight.grad is not None
    assert quantizer.quant_resi.qresi_ls[3].weight.grad is not None
    quantizer.zero_grad()
    quantized.commitment_loss.backward()
    assert f.grad is not None
    assert quantizer.embedding.weight.grad is None


def test_losses_are_the_mean_error_of_every_scales_reconstruction():
    quantizer = small_quantizer()
    f = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    quantized = quantizer(f)
    errors = [F.mse_loss(quantizer.latent_from_codes(quantized.codes_BL, k + 1), f).item() for k in range(4)]
    assert math.isclose(quantized.codebook_loss.item(), sum(errors) / 4, rel_tol=1e-5)
    assert math.isclose(quantized.commitment_loss.item(), sum(errors) / 4, rel_tol=1e-5)


def test_usage_counts_may_be_absent_from_a_state_dict():
    quantizer = small_quantizer()
    state = {k: v for k, v in quantizer.state_dict().items() if k != "ema_vocab_hit_SV"}
    small_quantizer().load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match=r"embedding\.weight"):
        small_quantizer().load_state_dict({k: v for k, v in state.items() if k != "embedding.weight"}, strict=True)


@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (2, 5, 4, 4), (6, 4, 4)])
def test_a_feature_map_of_another_shape_is_refused(shape):
    with pytest.raises(TokenizerError, match=r"expected \(batch, 6, 4, 4\)"):
        small_quantizer().encode(torch.zeros(shape))


def test_codes_of_another_length_are_refused():
    with pytest.raises(TokenizerError, match=r"expected \(batch, 30\)"):
        small_quantizer().inputs_from_codes(torch.zeros(2, 29, dtype=torch.int64))
    with pytest.raises(TokenizerError, match=r"scale 1: .* expected \(batch, 4\)"):
        small_quantizer().add_scale(small_quantizer().start(2), torch.zeros(2, 3, dtype=torch.int64), 1)


@pytest.mark.parametrize(
    "geometry", [{"phis": 0}, {"phi_ratio": 1.5}, {"patch_nums": (2, 1)}, {"patch_nums": ()}, {"patch_nums": (0, 1)}]
)
def test_an_impossible_geometry_is_refused(geometry):
    with pytest.raises(ConfigError):
        Quantizer(**({"vocab_size": 8, "latent_channels": 4, "patch_nums": (1, 2)} | geometry))


def test_geometry_rebuilds_the_quantizer():
    quantizer = small_quantizer((1, 3, 5), phis=2, phi_ratio=0.25)
    again = Quantizer(**quantizer.geometry)
    again.load_state_dict(quantizer.state_dict())
    assert again.pyramid == ScalePyramid((1, 3, 5))
    codes_BL = random_codes(quantizer)
    assert torch.equal(again.latent_from_codes(codes_BL), quantizer.latent_from_codes(codes_BL))
