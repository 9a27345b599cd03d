"""The VAR baseline is what it claims to be."""

import pytest
import torch

from benchmarks.var import VAR, draw_latent
from mvar.tokenizer.quantizer import Quantizer

PATCH_NUMS = (1, 2, 3, 4)


def small() -> VAR:
    torch.manual_seed(0)
    return VAR(3, 10, PATCH_NUMS, 64, 8, width=32, heads=2).double()


@pytest.mark.parametrize(("depth", "published"), [(16, 310e6), (20, 600e6), (24, 1.0e9), (30, 2.0e9)])
def test_its_size_is_the_published_one(depth: int, published: float) -> None:
    """Of the paper's table 1, rounded there."""
    with torch.device("meta"):
        model = VAR(depth)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.06)


def test_cached_logits_are_those_of_the_whole_pyramid() -> None:
    model, labels_B = small(), torch.tensor([3, 10])
    x_BLC = torch.randn(2, sum(n * n for n in PATCH_NUMS) - 1, 8, dtype=torch.float64)
    whole_BLV = model(labels_B, x_BLC)
    cache, parts = model.cache(2), []
    with torch.no_grad():
        for scale, length in enumerate(model.lengths):
            begin = model.offsets[scale] - 1
            parts.append(model(labels_B, x_BLC[:, begin : begin + length] if scale else None, cache, scale))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BLV, rtol=0, atol=1e-12)


def test_no_token_sees_a_finer_scale() -> None:
    model, labels_B = small(), torch.tensor([3])
    x_BLC = torch.randn(1, 29, 8, dtype=torch.float64)
    before_BLV = model(labels_B, x_BLC)
    x_BLC[:, model.offsets[3] - 1 :] += 1
    after_BLV = model(labels_B, x_BLC)
    assert torch.equal(before_BLV[:, : model.offsets[3]], after_BLV[:, : model.offsets[3]])
    assert not torch.equal(before_BLV[:, model.offsets[3] :], after_BLV[:, model.offsets[3] :])


def test_it_draws_what_depends_on_class_and_seed() -> None:
    torch.manual_seed(1)
    model, quantizer = small().float(), Quantizer(64, 8, PATCH_NUMS)
    drawn = [
        draw_latent(model, quantizer, torch.tensor(labels), seeds=seeds)
        for labels, seeds in (((1, 2), (0, 1)), ((1, 2), (0, 1)), ((1, 2), (0, 2)))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][1], drawn[2][1])
