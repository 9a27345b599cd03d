"""The adversarial term: discriminator, losses, adaptive weight."""

import math

import pytest
import torch

from mvar.errors import MvarError
from mvar.tokenizer.training.config import patches
from mvar.tokenizer.training.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from mvar.tokenizer.training.losses import total_loss
from mvar.tokenizer.training.trainer import Trainer
from tests.tiny_tokenizers import some_pixels, tiny_config, tiny_trainer, write_vgg


@pytest.fixture
def backbone(tmp_path):
    return write_vgg(tmp_path / "vgg.pth")


def trained(backbone, steps: int, threads: int = 1, **changes) -> Trainer:
    trainer = tiny_trainer(tiny_config(backbone, **changes), threads=threads)
    for seed in range(steps):
        trainer.step(some_pixels(6, seed))
    return trainer


@pytest.mark.parametrize(("side", "layers"), [(16, 2), (32, 3), (64, 3), (256, 3), (50, 2)])
def test_a_discriminator_judges_as_many_patches_as_the_settings_say(side, layers):
    logits = PatchDiscriminator(8, layers)(torch.zeros(2, 3, side, side))
    assert logits.shape == (2, 1, patches(side, layers), patches(side, layers))


def test_a_patch_of_three_layers_is_seventy_pixels_wide():
    discriminator = PatchDiscriminator(4, 3)
    for module in discriminator.modules():  # Norms look at the whole picture; what convolutions see is the patch.
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    images = torch.zeros(1, 3, 256, 256, requires_grad=True)
    discriminator(images)[0, 0, 15, 15].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero()[:, 0]
    assert rows.max() - rows.min() + 1 == 70


def test_pictures_are_judged_alone_whatever_stands_beside_them():
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(8, 2), torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]), rtol=0, atol=1e-6)


def test_hinge_losses_are_the_formulas():
    real, reconstructed = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert discriminator_loss(real, reconstructed).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert generator_loss(reconstructed).item() == pytest.approx(2 / 3)


def test_the_weight_is_the_ratio_of_gradients_bounded_and_scaled():
    terms, adversarial = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(terms, adversarial, 0.8, 1e4) == pytest.approx(0.8 * 5 / (0.5 + 1e-4))
    assert adaptive_weight(terms, adversarial * 0, 0.8, 1e4) == pytest.approx(0.8 * 1e4)
    assert adaptive_weight(terms, adversarial, 0.8, 3.0) == pytest.approx(0.8 * 3)
    assert math.isnan(adaptive_weight(terms * float("inf"), adversarial, 0.8, 1e4))
    assert math.isnan(adaptive_weight(terms, adversarial * float("nan"), 0.8, 1e4))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_weight_and_the_update_are_those_of_the_whole_batch(backbone, threads):
    """Against one plain backward pass over the whole batch, also where replicas see unequal parts of it."""
    trainer = trained(backbone, 3, threads, batch=7)
    pixels = some_pixels(7, 50)
    made = trainer._forward(trainer.vqvae, pixels, None)
    assert trainer.discriminator is not None
    loss, _ = total_loss(trainer.terms, made)
    adversarial = generator_loss(trainer.discriminator.network(made.reconstructed_BCHW))
    last = trainer.vqvae.decoder.conv_out.weight
    of_terms, of_generator = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (loss, adversarial))
    weight = 0.5 * of_terms / (of_generator + 1e-4)
    loss_of_discriminator = discriminator_loss(
        trainer.discriminator.network(made.images_BCHW),
        trainer.discriminator.network(made.reconstructed_BCHW.detach()),
    )
    parameters = list(trainer.parameters.values())
    expected = torch.autograd.grad(loss + weight.detach() * adversarial, parameters, allow_unused=True)
    of_generator_loss = torch.autograd.grad(loss_of_discriminator, list(trainer.discriminator.parameters.values()))
    measured_weight = trainer._learn_everywhere(pixels, 7, trainer.discriminator)[1]
    assert measured_weight == pytest.approx(weight.item(), rel=1e-4)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            atol = 1e-4 * (1 + gradient.abs().max().item())
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=atol)
    for parameter, gradient in zip(trainer.discriminator.parameters.values(), of_generator_loss, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_the_term_joins_at_its_step_and_not_before(backbone):
    trainer = tiny_trainer(tiny_config(backbone, loss={"adversarial_start": 2}))
    assert trainer.discriminator is not None
    start = {name: value.clone() for name, value in trainer.discriminator.network.state_dict().items()}
    seen = [trainer.step(some_pixels(6, seed)) for seed in range(2)]
    assert not any("discriminator_loss" in measured or "generator_loss" in measured for measured in seen)
    assert all(torch.equal(value, start[name]) for name, value in trainer.discriminator.network.state_dict().items())
    measured = trainer.step(some_pixels(6, 2))
    assert {
        "generator_loss",
        "adversarial_weight",
        "discriminator_loss",
        "discriminator_real",
        "discriminator_reconstructed",
    } <= measured.keys()
    assert not all(
        torch.equal(value, start[name]) for name, value in trainer.discriminator.network.state_dict().items()
    )


def test_bf16_measures_nearly_what_fp32_does(backbone):
    """The first step with every term: convolutions of all three networks are rounded, sums are not."""
    fine, coarse = (
        tiny_trainer(tiny_config(backbone, loss={"adversarial_start": 0}, precision=precision)).step(some_pixels(6))
        for precision in ("fp32", "bf16")
    )
    for name in ("l1", "perceptual", "generator_loss", "adversarial_weight", "discriminator_loss"):
        # The weight is a ratio of two gradients, each of which went back through rounded convolutions.
        rel = 0.3 if name == "adversarial_weight" else 0.1
        assert coarse[name] == pytest.approx(fine[name], rel=rel, abs=0.05), name
        assert coarse[name] != fine[name], name


def test_a_discriminator_learns_to_tell_real_from_reconstructed(backbone):
    trainer = tiny_trainer(tiny_config(backbone, loss={"adversarial_start": 0}, lr=1e-3, steps=60))
    measured = [trainer.step(some_pixels(6, seed)) for seed in range(40)]
    assert measured[0]["discriminator_loss"] == pytest.approx(1, abs=0.2)
    assert measured[-1]["discriminator_loss"] < 0.7
    assert measured[-1]["discriminator_real"] > measured[-1]["discriminator_reconstructed"] + 0.3


def test_all_terms_together_lower_the_error_on_pictures_that_were_not_learned_from(backbone):
    trainer = tiny_trainer(tiny_config(backbone, loss={"perceptual": 0.05, "adversarial": 0.1}, lr=3e-3, steps=100))
    trainer.step(some_pixels(6, 0))
    before = trainer.quality(some_pixels(20, 999))
    for seed in range(1, 100):
        measured = trainer.step(some_pixels(6, seed))
    after = trainer.quality(some_pixels(20, 999))
    assert "discriminator_loss" in measured
    assert after.l1 < 0.85 * before.l1
    assert after.psnr_db > before.psnr_db + 1
    assert after.ssim > before.ssim + 0.03


def test_a_discriminator_that_blew_up_stops_with_advice_and_no_weight_has_changed(backbone):
    trainer = trained(backbone, 3)
    assert trainer.discriminator is not None
    with torch.no_grad():
        trainer.discriminator.network.judge.bias.fill_(float("inf"))
    before = {name: value.clone() for name, value in trainer.tensors().items()}
    with pytest.raises(MvarError, match=r"generator_loss.* not finite\) at step 3; expected finite numbers"):
        trainer.step(some_pixels(6, 9))
    assert all(torch.equal(value, before[name]) for name, value in trainer.tensors().items())


def test_state_taken_up_goes_on_bit_by_bit(backbone):
    changes = {"ema_decay": 0.9, "revive_every": 2, "revive_below": 0.5, "usage_decay": 0.5, "scale_dropout": 0.3}
    whole = trained(backbone, 3, threads=2, **changes)
    taken_up = tiny_trainer(tiny_config(backbone, **changes), threads=2)
    taken_up.restore(whole.tensors(), 3)
    for seed in range(3, 7):
        assert taken_up.step(some_pixels(6, seed)) == whole.step(some_pixels(6, seed))
    ours, theirs = taken_up.tensors(), whole.tensors()
    assert {"critic.judge.weight", "critic_exp_avg.judge.weight", "averaged.decoder.conv_out.weight"} <= ours.keys()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
