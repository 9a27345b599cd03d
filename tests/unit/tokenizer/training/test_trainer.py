"""Parts of the tokenizer's training, without files: codebook, losses, order of pictures, steps."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from mvar.errors import MvarError
from mvar.images.sources import Fingerprint, Item
from mvar.run.launcher import Place
from mvar.run.world import World
from mvar.tokenizer.quality import psnr_db
from mvar.tokenizer.quantizer import Quantizer
from mvar.tokenizer.training.codebook import count_usage_, revive_, start_codebook_, usage_SV
from mvar.tokenizer.training.config import TokenizerTrainConfig
from mvar.tokenizer.training.losses import LossTerm, Reconstruction, absolute_error, squared_error, total_loss
from mvar.tokenizer.training.pictures import Pictures
from mvar.tokenizer.training.trainer import Trainer
from mvar.train_tokenizer import loss_terms


@pytest.fixture(autouse=True)
def same_weights_every_time():
    torch.manual_seed(0)


class Gradients:
    """A source of `count` 10 px pictures, different from each other, in two classes."""

    classes = ("dark", "light")
    fingerprint = Fingerprint("gradients", 0, 0, "")

    def __init__(self, count: int = 13) -> None:
        self.splits = {"train": tuple(Item(f"k{i}", str(i), i % 2) for i in range(count)), "val": ()}

    @staticmethod
    def reader(path):
        rows = np.linspace(0, 20 * int(path) % 256, 10)[:, None, None] + np.arange(10)[None, :, None] * 3
        return Image.fromarray((rows + np.zeros((1, 1, 3))).astype(np.uint8))


def tiny_config(**changes) -> TokenizerTrainConfig:
    geometry = {
        "channels": 8,
        "channel_mult": (1, 2),
        "res_blocks": 1,
        "latent_channels": 4,
        "vocab_size": 24,
        "patch_nums": (1, 2, 4),
    }
    settings = {"images": "i", "out": "o", "steps": 20, "batch": 6, "warmup_steps": 2, "precision": "fp32"}
    return TokenizerTrainConfig.model_validate({"geometry": geometry} | settings | changes)


def tiny_trainer(threads: int = 1, **changes) -> Trainer:
    config = tiny_config(**changes)
    return Trainer(config, loss_terms(config.loss), World(Place("alone"), torch.device("cpu")), threads)


def some_pixels(seed: int = 0, count: int = 6) -> np.ndarray:
    pictures = Pictures(Gradients(), 8, 1.0, count, seed)
    return pictures.batch(0)


def some_features(quantizer: Quantizer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(16, quantizer.latent_channels, quantizer.side, quantizer.side, generator=generator) * 3 + 5


def test_every_epoch_shows_every_picture_once_in_another_order():
    pictures = Pictures(Gradients(13), 8, 1.0, 4, seed=3)
    stream = np.concatenate([pictures.batch(step) for step in range(13)])  # 52 pictures: four epochs
    epochs = [[picture.tobytes() for picture in stream[start : start + 13]] for start in range(0, 52, 13)]
    # The source's picture 0 and others may look alike after a crop: compare as multisets.
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_pictures_of_a_step_depend_on_nothing_but_seed_and_step():
    fresh, used = Pictures(Gradients(), 8, 1.25, 5, seed=1), Pictures(Gradients(), 8, 1.25, 5, seed=1, ram_gib=0)
    for step in range(4):
        used.batch(step)
    assert np.array_equal(fresh.batch(7), used.batch(7))
    assert not np.array_equal(fresh.batch(7), Pictures(Gradients(), 8, 1.25, 5, seed=2).batch(7))


def test_batches_fetched_ahead_are_those_of_each_step():
    pictures = Pictures(Gradients(), 8, 1.125, 5, seed=1)
    ahead = list(pictures.batches(2, 6))
    assert len(ahead) == 4
    assert all(np.array_equal(batch, pictures.batch(step)) for step, batch in zip(range(2, 6), ahead, strict=True))


def test_the_codebook_starts_among_encoder_outputs():
    quantizer = Quantizer(64, 4, (1, 2, 4))
    f = some_features(quantizer)
    with torch.no_grad():
        before = quantizer(f).codebook_loss
        start_codebook_(quantizer, f, seed=0)
        after = quantizer(f).codebook_loss
    assert after < before / 2
    codes_BL = quantizer.encode(f)
    assert len(codes_BL.unique()) > 48
    torch.testing.assert_close(quantizer.ema_vocab_hit_SV.sum(dim=1), torch.tensor([1.0, 4.0, 16.0]))


def test_the_codebooks_start_is_a_function_of_the_seed():
    def words(seed):
        torch.manual_seed(0)
        quantizer = Quantizer(32, 4, (1, 2))
        start_codebook_(quantizer, some_features(quantizer), seed)
        return quantizer.embedding.weight

    assert torch.equal(words(0), words(0))
    assert not torch.equal(words(0), words(1))


def test_usage_counts_words_by_scale():
    quantizer = Quantizer(5, 4, (1, 2))
    codes_BL = torch.tensor([[0, 1, 1, 2, 3], [0, 1, 1, 1, 1]])
    assert usage_SV(quantizer, codes_BL).tolist() == [[2, 0, 0, 0, 0], [0, 6, 1, 1, 0]]
    count_usage_(quantizer, usage_SV(quantizer, codes_BL), len(codes_BL), decay=0.75)
    assert quantizer.ema_vocab_hit_SV.tolist() == [[0.25, 0, 0, 0, 0], [0, 0.75, 0.125, 0.125, 0]]


def test_dead_words_become_residuals_and_words_in_use_stay():
    quantizer = Quantizer(40, 4, (1, 2, 4)).requires_grad_(False)
    f = some_features(quantizer)
    start_codebook_(quantizer, f, seed=0)
    quantizer.embedding.weight[7:] = 1000.0  # far from everything: never chosen
    quantized = quantizer(f)
    quantizer.ema_vocab_hit_SV.copy_(usage_SV(quantizer, quantized.codes_BL) / len(f))
    in_use = quantizer.ema_vocab_hit_SV.sum(dim=0) > 0
    before = quantizer.embedding.weight.clone()
    residuals_NC = torch.cat(quantized.residuals_k)
    dead_W = revive_(quantizer, residuals_NC, below=1e-6, seed=0, step=3)
    assert dead_W.tolist() == (~in_use).nonzero()[:, 0].tolist()
    assert set(range(7, 40)) <= set(dead_W.tolist())
    assert torch.equal(quantizer.embedding.weight[in_use], before[in_use])
    for word in dead_W:
        assert (residuals_NC == quantizer.embedding.weight[word]).all(dim=1).any()
    assert (quantizer.ema_vocab_hit_SV.sum(dim=0)[dead_W] > 0).all()
    assert len(quantizer.encode(f).unique()) > in_use.sum()


def test_training_revives_words_that_died():
    trainer = tiny_trainer(revive_every=3, revive_until=1.0, usage_decay=0.5, steps=12)
    trainer.step(some_pixels())
    with torch.no_grad():
        trainer.vqvae.quantizer.embedding.weight[4:] = 1000.0
    used_before = len(trainer.reconstruct(some_pixels())[1].unique())
    revived = [trainer.step(some_pixels())["revived"] for _ in range(8)]
    assert used_before <= 4
    assert sum(revived) >= 20
    assert len(trainer.reconstruct(some_pixels())[1].unique()) > used_before
    assert trainer.vqvae.quantizer.embedding.weight.abs().max() < 1000


def test_terms_are_weighted_in_the_total_and_reported_alone():
    quantizer = Quantizer(8, 4, (1, 2)).requires_grad_(False)
    quantized = quantizer(torch.zeros(1, 4, 2, 2))
    images = torch.zeros(1, 3, 2, 2)
    reconstructed = torch.full_like(images, 0.5, requires_grad=True)
    terms = [
        LossTerm("l1", 2.0, absolute_error),
        LossTerm("l2", 4.0, squared_error),
        LossTerm("mine", 3.0, lambda batch: batch.reconstructed_BCHW.sum()),
    ]
    total, values = total_loss(terms, Reconstruction(images, reconstructed, quantized))
    assert {name: value.item() for name, value in values.items()} == {"l1": 0.5, "l2": 0.25, "mine": 6.0}
    assert total.item() == 2 * 0.5 + 4 * 0.25 + 3 * 6.0
    total.backward()
    assert reconstructed.grad is not None


def test_loss_falls_and_pictures_get_nearer():
    trainer = tiny_trainer(steps=60, lr=3e-3, ema_decay=0.9)
    pixels = some_pixels()
    first = trainer.step(pixels)
    before = trainer.quality(pixels)
    for _ in range(59):
        last = trainer.step(pixels)
    after = trainer.quality(pixels)
    assert last["loss"] < first["loss"] / 3
    assert after.psnr_db > before.psnr_db + 5
    assert len(after.used_per_scale) == len(after.perplexity_per_scale) == 3
    assert 0 < after.used_share <= 1


def test_threads_split_the_batch_and_change_nothing_but_rounding():
    one, three = (tiny_trainer(threads, scale_dropout=0.3, revive_every=2, clip_grad=0.0) for threads in (1, 3))
    for seed in range(4):  # seven pictures: three unequal parts
        a, b = one.step(some_pixels(seed, 7)), three.step(some_pixels(seed, 7))
        assert a.keys() == b.keys()
        assert all(math.isclose(a[name], b[name], rel_tol=1e-3, abs_tol=1e-4) for name in a)
    for name, value in one.vqvae.state_dict().items():
        torch.testing.assert_close(three.vqvae.state_dict()[name], value, rtol=0, atol=5e-3)


def test_threads_do_not_make_a_training_differ_from_itself():
    def weights():
        trainer = tiny_trainer(threads=3)
        for seed in range(3):
            trainer.step(some_pixels(seed))
        return trainer.vqvae.state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scale_dropout_decodes_some_pictures_from_their_first_scales_only():
    trainer = tiny_trainer(scale_dropout=0.5)
    kept = torch.cat([_kept_at(trainer, step) for step in range(40)])
    share = (kept < 3).float().mean()
    assert 0.3 < share < 0.7
    assert set(kept.tolist()) == {1, 2, 3}
    quantizer = trainer.vqvae.quantizer
    f = some_features(quantizer)[:3].requires_grad_()
    partial = quantizer(f, torch.tensor([1, 2, 3])).f_hat_BChw
    for image, scales in enumerate((1, 2, 3)):
        expected = quantizer.latent_from_codes(quantizer.encode(f), scales)[image]
        torch.testing.assert_close(partial[image], expected, rtol=0, atol=1e-5)
    assert math.isfinite(trainer.step(some_pixels())["loss"])


def _kept_at(trainer: Trainer, step: int) -> torch.Tensor:
    trainer.step_number = step
    kept = trainer._kept_scales(8, np.arange(8))
    trainer.step_number = 0
    return kept


def test_averaged_weights_are_the_result_and_lag_behind():
    trainer = tiny_trainer(ema_decay=0.99)
    start = {name: value.clone() for name, value in trainer.vqvae.named_parameters()}
    for _ in range(15):
        trainer.step(some_pixels())
    assert trainer.result is trainer.averaged
    name = "encoder.conv_in.weight"
    live, mean = trainer.vqvae.get_parameter(name), trainer.result.get_parameter(name)
    assert 0 < (mean - start[name]).norm() < (live - start[name]).norm()


def test_the_learning_rate_warms_up_and_ends_at_its_final_share():
    trainer = tiny_trainer(steps=100, warmup_steps=10, lr=1.0, final_lr=0.1)
    rates = [trainer.learning_rate(step) for step in range(101)]
    assert rates[0] < 0.1
    assert max(rates) == rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert math.isclose(rates[100], 0.1)


def test_a_loss_that_is_not_finite_stops_with_advice():
    trainer = tiny_trainer()
    trainer.step(some_pixels())
    with torch.no_grad():
        trainer.vqvae.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(MvarError, match=r"at step 1; expected finite numbers\. Lower lr"):
        trainer.step(some_pixels())


def test_psnr_of_a_tenth_of_the_range_is_twenty_decibels():
    assert math.isclose(psnr_db(0.2**2), 20.0)
    assert psnr_db(0.0) == 100.0
