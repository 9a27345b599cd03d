"""Drawing token maps: against the official sampler, and what a user relies on.

Legend: B images, L tokens, V vocabulary.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from mvar.config import ModelConfig
from mvar.errors import ConfigError, MvarError
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from mvar.sampling.logits import draw_codes, filter_logits, mix_code_vectors
from mvar.sampling.options import SamplingOptions
from mvar.sampling.sampler import generate, generate_latent, generate_scales
from mvar.sampling.uniforms import token_uniforms, vocabulary_uniforms
from mvar.tokenizer.quantizer import Quantizer
from mvar.tokenizer.vqvae import VQVAE
from tests.golden import golden, golden_json

PYRAMID = (1, 2, 3, 4)


def as_float(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def small() -> tuple[MVAR, Quantizer]:
    torch.manual_seed(0)
    model = MVAR(2, 5, PYRAMID, 32, 4, width=64, heads=2)
    init_weights_(model, 0, ModelConfig(init_gamma=1.0, init_head=4.0, init_conditioning=1.0))
    return model, Quantizer(32, 4, PYRAMID)


@pytest.mark.parametrize(("run", "cfg"), [("a", 1.5), ("b", 4.0), ("nocfg", 0.0)])
@pytest.mark.parametrize("training", [True, False])
def test_greedy_sampling_equals_the_official_one(run: str, cfg: float, training: bool) -> None:
    model = MVAR(2, 10, PYRAMID, 64, 8).train(training)
    model.load_state_dict(as_float(golden("mvar_tiny", "state.safetensors")))
    tokenizer = VQVAE(32, 8, 64, PYRAMID)
    tokenizer.load_state_dict(as_float(golden("vqvae_tiny", "state_enc_quant.safetensors", "state_dec.safetensors")))
    expected = golden("mvar_tiny", "infer.safetensors")
    steps = list(generate_scales(model, tokenizer, expected[f"{run}.label"], SamplingOptions(cfg, 1, 0.0)))
    for step in steps:
        assert torch.equal(step.codes_BLk, expected[f"{run}.idx_{step.scale}"])
    torch.testing.assert_close(steps[-1].f_hat_BChw, expected[f"{run}.fhat"], rtol=0, atol=1e-5)
    images = tokenizer.decode_latent(steps[-1].f_hat_BChw)
    torch.testing.assert_close((images + 1) / 2, expected[f"{run}.img"], rtol=0, atol=1e-5)
    assert model.training is training


def test_greedy_sampling_of_ten_scales_equals_the_official_one() -> None:
    model = MVAR(3, 10)
    model.load_state_dict(as_float(golden("mvar_ten_scales", "state_blocks.safetensors", "state_rest.safetensors")))
    stored = golden("quantizer_real", "io.safetensors")
    quantizer = Quantizer(4096, 32, model.pyramid.patch_nums)
    quantizer.load_state_dict(as_float({k[6:]: v for k, v in stored.items() if k.startswith("state.")}))
    expected = golden("mvar_ten_scales", "infer.safetensors")
    steps = list(generate_scales(model, quantizer, expected["label"], SamplingOptions(1.5, 1, 0.0)))
    assert torch.equal(torch.cat([step.codes_BLk for step in steps], dim=1), expected["idx"])
    for step in steps:
        found, wanted = step.f_hat_BChw[0], expected[f"fhat_sample0_{step.scale}"]
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("cfg", "scales"), [(1.5, 10), (4.0, 10), (1.5, 4), (4.0, 4)])
def test_guidance_rises_linearly_over_the_scales(cfg: float, scales: int) -> None:
    """Guided logits, seen through a model whose logits tell the two halves of the batch apart."""

    class Probe(MVAR):
        def forward(self, labels_B: Tensor, *_: Any, **options: Any) -> Tensor:
            tokens = self.pyramid.lengths[options["scales"].start]
            with_class = (labels_B != self.num_classes).float()
            # (1 + t) * 1 - t * 0 in word 0, against a constant in word 1
            return torch.stack((with_class, torch.full_like(with_class, 1.0)), -1)[:, None].repeat(1, tokens, 1)

    patch_nums = tuple(range(1, scales + 1))
    model, quantizer = Probe(1, 5, patch_nums, 2, 4, width=64), Quantizer(2, 4, patch_nums)
    seen: list[Tensor] = []

    def remember(logits_BLV: Tensor, *_: Any) -> Tensor:
        seen.append(logits_BLV)
        return logits_BLV

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvar.sampling.sampler.filter_logits", remember)
        generate(model, quantizer, torch.tensor([0]), cfg)
    ramp = [float(logits[0, 0, 0] - 1) for logits in seen]
    assert ramp == pytest.approx(golden_json("schedules", "cfg_ramp.json")["t"][f"cfg{cfg}_S{scales}"], abs=1e-5)


def test_smoothing_follows_the_published_temperatures() -> None:
    table = golden_json("schedules", "cfg_ramp.json")
    words, seeds = torch.eye(6), torch.tensor([3])
    logits = torch.randn(1, 4, 6)
    for scale in range(10):
        mixed = mix_code_vectors(logits, words, seeds, scale, scale / 9)
        noise = -torch.log(-torch.log(vocabulary_uniforms(seeds, scale, 4, 6)))
        sharpened = logits * table["more_smooth_logit_multiplier_S10"][scale] + noise
        torch.testing.assert_close(mixed, (sharpened / table["gumbel_tau_S10"][scale]).softmax(-1))


def test_smoothing_never_uses_a_word_that_was_filtered_out() -> None:
    logits = torch.full((1, 3, 8), -torch.inf)
    logits[..., 2:4] = 0.0
    mixed = mix_code_vectors(logits, torch.eye(8), torch.tensor([0]), 1, 0.5)
    assert not mixed[..., :2].any() and not mixed[..., 4:].any()
    torch.testing.assert_close(mixed.sum(-1), torch.ones(1, 3))


def test_an_image_depends_on_its_seed_and_label_and_not_on_its_batch() -> None:
    model, quantizer = small()
    labels, seeds = torch.tensor([0, 1, 2, 1]), [11, 12, 13, 14]
    together = generate(model, quantizer, labels, top_k=20, seeds=seeds)
    for place in range(4):
        alone = generate(model, quantizer, labels[place : place + 1], top_k=20, seeds=seeds[place : place + 1])
        assert torch.equal(alone[0], together[place])
    assert not torch.equal(together[1], together[3]), "another seed, another image"
    relabelled = generate(model, quantizer, torch.tensor([3, 1, 2, 1]), top_k=20, seeds=seeds)
    assert torch.equal(relabelled[1:], together[1:])
    assert not torch.equal(relabelled[0], together[0])


def test_carrying_the_state_equals_recomputing_the_prefix() -> None:
    """Logits of the sampled codes by one whole pass, in float64, give the same draws."""
    model, quantizer = small()
    model.double()
    labels = torch.tensor([0, 4])
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    codes_BL = generate(model, quantizer, labels, cfg=0.0, top_k=20)
    hook.remove()
    whole_BLV = model(labels, quantizer.inputs_from_codes(codes_BL))
    torch.testing.assert_close(torch.cat(seen, dim=1), whole_BLV, rtol=0, atol=1e-10)
    for scale in range(4):
        at = model.pyramid.segment(scale)
        kept = filter_logits(whole_BLV[:, at], 20, 0.96)
        redrawn = draw_codes(kept, token_uniforms(torch.tensor([0, 1]), scale, model.pyramid.lengths[scale]))
        assert torch.equal(redrawn, codes_BL[:, at])


def test_no_guidance_runs_each_image_once() -> None:
    model, quantizer = small()
    batches: list[int] = []
    model.register_forward_hook(lambda _module, inputs, _output: batches.append(len(inputs[0])))
    generate(model, quantizer, torch.tensor([0, 1]), cfg=0.0)
    assert batches == [2] * 4
    batches.clear()
    generate(model, quantizer, torch.tensor([0, 1]), cfg=1.0)
    assert batches == [4] * 4


def test_greedy_ties_go_to_the_lowest_index() -> None:
    model, quantizer = small()
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data[:] = -1.0
    model.head.bias.data[[5, 9]] = 1.0
    assert set(generate(model, quantizer, torch.tensor([0]), top_k=1).flatten().tolist()) == {5}


def test_codes_rebuild_the_feature_map_unless_smoothed() -> None:
    model, quantizer = small()
    labels = torch.tensor([0, 1])
    codes_BL = generate(model, quantizer, labels, top_k=20)
    rebuilt = quantizer.latent_from_codes(codes_BL)
    torch.testing.assert_close(generate_latent(model, quantizer, labels, SamplingOptions(top_k=20)), rebuilt)
    smoothed = generate_latent(model, quantizer, labels, SamplingOptions(top_k=20, smooth=True))
    assert smoothed.shape == rebuilt.shape and bool(smoothed.isfinite().all())
    assert not torch.allclose(smoothed, rebuilt)


def test_nothing_global_changes() -> None:
    model, quantizer = small()
    state = torch.get_rng_state()
    model.train()
    with torch.enable_grad():
        for _ in generate_scales(model, quantizer, torch.tensor([0])):
            assert torch.is_grad_enabled()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels_B": torch.tensor([6])}, "expected 0 to 4"),
        ({"labels_B": torch.tensor([-1])}, "expected 0 to 4"),
        ({"labels_B": torch.zeros(0, dtype=torch.int64)}, "at least one"),
        ({"seeds": [1, 2]}, "got 2 for 1 images"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_requests_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    model, quantizer = small()
    with pytest.raises(ConfigError, match=message):
        generate(model, quantizer, **({"labels_B": torch.tensor([0])} | options))


@pytest.mark.parametrize(
    ("quantizer", "what"),
    [
        (Quantizer(32, 4, (1, 2, 4)), "patch_nums"),
        (Quantizer(16, 4, PYRAMID), "vocab_size"),
        (Quantizer(32, 8, PYRAMID), "latent_channels"),
    ],
)
def test_a_tokenizer_of_another_geometry_is_refused(quantizer: Quantizer, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        generate(small()[0], quantizer, torch.tensor([0]))


def test_weights_that_are_not_finite_are_refused() -> None:
    model, quantizer = small()
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(MvarError, match="logits of scale 0 are not finite"):
        generate(model, quantizer, torch.tensor([0]))
