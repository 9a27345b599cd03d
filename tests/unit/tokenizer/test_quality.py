"""Figures of quality against independent formulas, and that they add up over parts of the pictures."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.image import StructuralSimilarityIndexMeasure

from mvar.tokenizer.quality import Tally, psnr_db, psnr_db_N, ssim_N
from tests.tiny_tokenizers import some_pixels, tiny_config, tiny_trainer


def pictures(seed: int, count: int = 4, side: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_ten_times_the_log_of_the_squared_range_over_the_error():
    images, reconstructed = pictures(0), (pictures(0) + 0.2 * pictures(1)).clamp(-1, 1)
    expected = [
        10 * math.log10(4 / mse) for mse in (images - reconstructed).double().square().mean(dim=(1, 2, 3)).tolist()
    ]
    assert psnr_db_N(reconstructed, images).tolist() == pytest.approx(expected, abs=1e-4)
    assert [psnr_db(10 ** (-db / 10) * 4) for db in expected] == pytest.approx(expected)


def test_psnr_of_equal_pictures_is_a_hundred_decibels():
    assert psnr_db_N(pictures(0), pictures(0)).tolist() == [100.0] * 4


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, of one (3, H, W) picture, its borders reflected as torchmetrics does."""
    places = np.arange(11) - 5
    window = np.exp(-(places**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(x: np.ndarray) -> np.ndarray:
        x = np.pad(x, ((0, 0), (5, 5), (5, 5)), mode="reflect")
        patches = np.lib.stride_tricks.sliding_window_view(x, (11, 11), axis=(1, 2))
        return np.einsum("chwij,ij->chw", patches, window)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_ssim_is_the_papers():
    images, reconstructed = pictures(0), pictures(0) + 0.3 * pictures(1)
    found = ssim_N(reconstructed, images)
    expected = [
        ssim_by_hand(a, b) for a, b in zip(images.double().numpy(), reconstructed.double().numpy(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    library = StructuralSimilarityIndexMeasure(data_range=2.0)(reconstructed, images)
    assert found.mean().item() == pytest.approx(library.item(), abs=1e-6)


def test_pictures_smaller_than_the_window_have_no_ssim():
    assert ssim_N(pictures(0, side=10), pictures(1, side=10)).isnan().all()


def test_parts_of_the_pictures_add_up_to_the_quality_of_all():
    images, reconstructed = pictures(0, 6), pictures(1, 6)
    counts = torch.arange(2 * 4.0).view(2, 4)
    whole, first, second = (Tally(2, 4) for _ in range(3))
    whole.add(images, reconstructed, 2 * counts)
    whole.add_scales(images, [reconstructed, images])
    for tally, part in ((first, slice(0, 2)), (second, slice(2, 6))):
        tally.add(images[part], reconstructed[part], counts)
        tally.add_scales(images[part], [reconstructed[part], images[part]])
    one, two = whole.quality(whole.sums), whole.quality(first.sums + second.sums)
    for name, value in vars(one).items():
        assert vars(two)[name] == pytest.approx(value, rel=1e-6), name
    assert one.images == 6
    assert one.l1 == pytest.approx((images - reconstructed).abs().mean().item())
    assert one.psnr_db_per_scale == [pytest.approx(one.psnr_db), 100.0]
    assert one.used_per_scale == [3, 4]
    assert one.used_share == 1
    assert one.perplexity_per_scale[0] == pytest.approx(math.exp(-sum(p * math.log(p) for p in (1 / 6, 2 / 6, 3 / 6))))


def test_the_first_scales_alone_are_what_the_tokenizer_makes_of_them():
    trainer = tiny_trainer(tiny_config())
    for seed in range(3):
        trainer.step(some_pixels(6, seed))
    quality = trainer.quality(some_pixels(8, 9))
    assert quality.images == 8
    assert quality.psnr_db_per_scale[-1] == pytest.approx(quality.psnr_db)
    images = torch.from_numpy(some_pixels(8, 9)).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = trainer.vqvae.encode(images)
    coarse = trainer.vqvae.decode_latent(trainer.vqvae.quantizer.latent_from_codes(codes, 1))
    expected = [psnr_db(mse) for mse in (coarse - images).square().mean(dim=(1, 2, 3)).tolist()]
    assert quality.psnr_db_per_scale[0] == pytest.approx(sum(expected) / 8, abs=1e-3)
