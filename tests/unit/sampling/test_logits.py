"""From logits to words: filters against the official ones, and draws."""

import pytest
import torch

from mvar.sampling.logits import draw_codes, filter_logits
from mvar.sampling.uniforms import token_uniforms
from tests.golden import golden


@pytest.mark.parametrize("name", ["k900_p0.96", "k900_p0", "k0_p0.96", "k1_p0", "k600_p0.95"])
def test_filters_keep_what_the_official_ones_keep(name: str) -> None:
    stored = golden("sampling", "topk_topp.safetensors")
    top_k, top_p = (float(part[1:]) for part in name.split("_"))
    kept = filter_logits(stored["logits"], int(top_k), top_p)
    assert torch.equal(kept.isfinite(), stored[f"keep_{name}"].bool())
    assert torch.equal(kept[kept.isfinite()], stored["logits"][kept.isfinite()])
    if f"probs_{name}" in stored:
        torch.testing.assert_close(kept.softmax(-1), stored[f"probs_{name}"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["k20_p0.9", "k0_p0.5", "k5_p0"])
def test_filters_keep_what_the_official_ones_keep_in_a_small_vocabulary(name: str) -> None:
    stored = golden("sampling", "topk_topp.safetensors")
    top_k, top_p = (float(part[1:]) for part in name.split("_"))
    kept = filter_logits(stored["logits_small"], int(top_k), top_p)
    assert torch.equal(kept.isfinite(), stored[f"keep_small_{name}"].bool())


def test_filters_equal_their_definition_with_ties() -> None:
    """Against sorting everything: remove from the bottom while what is removed holds at most 1 - top_p."""
    generator = torch.Generator().manual_seed(0)
    for spread in (1, 2, 4):
        smooth = torch.randn(3, 5, 60, generator=generator) * spread
        for logits in (smooth, smooth.mul(2).round().div(2)):
            for top_k in (0, 1, 2, 5, 30, 59):
                for top_p in (0.3, 0.5, 0.9, 0.999):
                    least = logits.sort(-1).values[..., -top_k if top_k else 0].unsqueeze(-1)
                    expected = logits.masked_fill(logits < least, -torch.inf)
                    ascending, order = expected.sort(dim=-1, stable=True)
                    tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
                    tail[..., -1] = False
                    expected[torch.zeros_like(tail).scatter(-1, order, tail)] = -torch.inf
                    assert torch.equal(filter_logits(logits, top_k, top_p), expected)


def test_filters_of_nothing_keep_everything() -> None:
    logits = torch.randn(2, 3, 8)
    for top_k, top_p in ((0, 0.0), (8, 1.0), (100, 0.0)):
        assert torch.equal(filter_logits(logits, top_k, top_p), logits)


def test_draws_follow_the_distribution_and_skip_what_was_filtered_out() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    draws = 40_000
    uniforms = token_uniforms(torch.tensor([7]), 2, draws)
    codes = draw_codes(probabilities.log().expand(1, draws, 6), uniforms)
    shares = torch.bincount(codes[0], minlength=6) / draws
    assert (shares - probabilities).abs().max() < 0.01
    assert set(codes.unique().tolist()) == {1, 3, 4}


@pytest.mark.parametrize("edge", [0.5 / 2**32, 1 - 0.5 / 2**32])
def test_the_most_extreme_draws_stay_among_the_kept_words(edge: float) -> None:
    logits = torch.full((1, 1, 50), -torch.inf)
    logits[..., 10:20] = torch.randn(10)
    assert 10 <= int(draw_codes(logits, torch.tensor([[edge]], dtype=torch.float64))) < 20
