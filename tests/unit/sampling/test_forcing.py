"""Given tokens: all, none, some; against what was drawn around them; and a path between two classes.

Legend: B images, L tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvar.sampling.forcing import ForcedCodes, ForcedResidual, known_cells, known_tokens
from mvar.sampling.options import SamplingOptions
from mvar.sampling.sampler import Toward, draw_scales, generate_codes, generate_latent
from mvar.tokenizer.quantizer import Quantizer
from tests.unit.sampling.test_sampler import PYRAMID, small

OPTIONS = SamplingOptions(top_k=20)
LABELS = torch.tensor([0, 1, 3])
WAYS = pytest.mark.parametrize("way", [ForcedResidual, ForcedCodes])
Way = type[ForcedResidual] | type[ForcedCodes]


def features(seed: int = 0) -> Tensor:
    return torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def left_half() -> Tensor:
    known_hw = torch.zeros(4, 4, dtype=torch.bool)
    known_hw[:, :2] = True
    return known_hw


@WAYS
@pytest.mark.parametrize("smooth", [False, True])
def test_a_picture_that_is_known_whole_comes_out_as_its_codes(way: Way, smooth: bool) -> None:
    model, quantizer = small()
    f_1Chw = features()
    known = known_tokens(quantizer, torch.ones(4, 4, dtype=torch.bool))
    options = SamplingOptions(top_k=20, smooth=smooth)
    own_1L = quantizer.encode(f_1Chw)
    drawn_BL = generate_codes(model, quantizer, LABELS, options, forced=way(quantizer, f_1Chw, known))
    assert torch.equal(drawn_BL, own_1L.expand(3, -1))
    latent = generate_latent(model, quantizer, LABELS, options, forced=way(quantizer, f_1Chw, known))
    torch.testing.assert_close(latent, quantizer.latent_from_codes(own_1L).expand(3, -1, -1, -1))


@WAYS
@pytest.mark.parametrize("smooth", [False, True])
def test_a_picture_of_which_nothing_is_known_is_plain_sampling_bit_for_bit(way: Way, smooth: bool) -> None:
    model, quantizer = small()
    known = known_tokens(quantizer, torch.zeros(4, 4, dtype=torch.bool))
    options = SamplingOptions(top_k=20, smooth=smooth)
    forced = way(quantizer, features(), known)
    latent = generate_latent(model, quantizer, LABELS, options, forced=forced)
    assert torch.equal(latent, generate_latent(model, quantizer, LABELS, options))


def test_tokens_across_the_edge_are_drawn_or_given() -> None:
    quantizer = small()[1]
    drawn = known_tokens(quantizer, left_half())
    given = known_tokens(quantizer, left_half(), across="given")
    assert [tokens.view(side, side)[0].tolist() for side, tokens in zip(PYRAMID, drawn, strict=True)] == [
        [False],
        [True, False],
        [True, False, False],
        [True, True, False, False],
    ]
    assert [tokens.view(side, side)[0].tolist() for side, tokens in zip(PYRAMID, given, strict=True)] == [
        [True],
        [True, False],
        [True, True, False],
        [True, True, False, False],
    ]


def test_the_residual_is_that_of_what_was_really_accumulated() -> None:
    """At each scale the given word is the nearest to what the map still lacks, drawn tokens around it included."""
    model, quantizer = small()
    f_1Chw = features()
    known = known_tokens(quantizer, left_half())
    forced = ForcedResidual(quantizer, f_1Chw, known)
    codes_BL = generate_codes(model, quantizer, LABELS, OPTIONS, forced=forced)
    own_1L = quantizer.encode(f_1Chw)
    changed = 0
    for scale in range(4):
        at = quantizer.pyramid.segment(scale)
        rest_BChw = f_1Chw - quantizer.latent_from_codes(codes_BL, scale) if scale else f_1Chw.expand(3, -1, -1, -1)
        rows_NC = quantizer.shrunk(rest_BChw, scale).flatten(2).transpose(1, 2).reshape(-1, 4)
        nearest_BLk = quantizer.nearest(rows_NC).view(3, -1)
        given_Lk = known[scale][0]
        assert torch.equal(codes_BL[:, at][:, given_Lk], nearest_BLk[:, given_Lk])
        changed += int((codes_BL[:, at][:, given_Lk] != own_1L[:, at][:, given_Lk]).sum())
    assert changed, "drawn neighbours made other words necessary"
    plain_BL = generate_codes(model, quantizer, LABELS, OPTIONS, forced=ForcedCodes(quantizer, f_1Chw, known))
    given_L = torch.cat(known, dim=1)[0]
    assert torch.equal(plain_BL[:, given_L], own_1L.expand(3, -1)[:, given_L])


def test_quantizing_anew_keeps_the_known_part_better_than_its_own_codes() -> None:
    model, quantizer = small()
    error = {ForcedResidual: 0.0, ForcedCodes: 0.0}
    for seed in range(6):
        f_1Chw = 0.5 * features(seed)
        for way in error:
            forced = way(quantizer, f_1Chw, known_tokens(quantizer, left_half()))
            latent = generate_latent(model, quantizer, LABELS, OPTIONS, forced=forced)
            error[way] += float((latent - f_1Chw)[..., left_half()].square().mean())
    assert error[ForcedResidual] < 0.8 * error[ForcedCodes]


@WAYS
@pytest.mark.parametrize("first", [1, 2, 3])
def test_coarse_scales_can_be_kept_and_the_others_redrawn(way: Way, first: int) -> None:
    model, quantizer = small()
    f_1Chw = features()
    known = known_tokens(quantizer, torch.zeros(4, 4, dtype=torch.bool), whole_scales=first)
    drawn_BL = generate_codes(model, quantizer, LABELS, OPTIONS, forced=way(quantizer, f_1Chw, known))
    kept = quantizer.pyramid.offsets[first]
    own_1L = quantizer.encode(f_1Chw)
    assert torch.equal(drawn_BL[:, :kept], own_1L[:, :kept].expand(3, -1))
    assert not torch.equal(drawn_BL[0, kept:], drawn_BL[1, kept:])


def test_a_cell_is_known_if_all_of_its_pixels_are() -> None:
    known_HW = torch.ones(8, 8, dtype=torch.bool)
    known_HW[3, 4] = False
    cells_hw = known_cells(known_HW, 4)
    assert not cells_hw[1, 2] and int(cells_hw.sum()) == 15


@pytest.mark.parametrize("options", [OPTIONS, SamplingOptions(0.0, 20), SamplingOptions(1.0, interval=(0, 1))])
def test_a_path_between_classes_ends_in_plain_sampling_of_each(options: SamplingOptions) -> None:
    model, quantizer = small()
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 4])
    ends = [generate_codes(model, quantizer, labels, options) for labels in (first, second)]
    path = [generate_codes(model, quantizer, first, options, toward=Toward(second, share)) for share in (0.0, 0.5, 1.0)]
    assert torch.equal(path[0], ends[0]) and torch.equal(path[2], ends[1])
    assert not torch.equal(path[1], ends[0]) and not torch.equal(path[1], ends[1])


@WAYS
@pytest.mark.parametrize("smooth", [False, True])
def test_the_host_reads_nothing_while_tokens_are_given(way: Way, smooth: bool) -> None:
    """A tensor on the meta device has no values: reading one is an error."""
    model, quantizer = small()
    known = [tokens.to("meta") for tokens in known_tokens(quantizer, left_half(), across="given")]
    model, quantizer = model.to("meta"), quantizer.to("meta")
    labels_B = torch.zeros(2, dtype=torch.int64, device="meta")
    options = SamplingOptions(top_k=8, smooth=smooth)
    forced, toward = way(quantizer, features().to("meta"), known), Toward(labels_B, 0.5)
    with torch.no_grad():
        steps = list(draw_scales(model, quantizer, labels_B, labels_B, options, forced, toward))
    assert [step.codes_BLk.shape for step in steps] == [(2, 1), (2, 4), (2, 9), (2, 16)]


def test_the_drawing_in_one_go_has_all_scales_and_the_same_tokens() -> None:
    from mvar.sampling.graph import GraphedDrawing
    from tests.unit.sampling.test_graph import OPTIONS, pair

    model, tokenizer = pair()
    quantizer: Quantizer = tokenizer.quantizer
    known = known_tokens(quantizer, torch.tensor([[True, True, False]] * 3))
    make = lambda: ForcedResidual(quantizer, features()[..., :3, :3], known)  # noqa: E731
    labels_B, seeds = torch.tensor([2, 0]), [5, 6]
    drawing = GraphedDrawing(
        model, tokenizer, 2, tokenizer.decode_latent, OPTIONS, graphed=False, growing=True, forced=make,
        toward=Toward(torch.tensor([1]), 0.3),
    )  # fmt: skip
    toward = Toward(torch.tensor([1, 1]), 0.3)
    codes_BL = generate_codes(model, quantizer, labels_B, OPTIONS, seeds, forced=make(), toward=toward)
    grown = drawing(labels_B, seeds)
    assert grown.shape == (2, 3, 3, 6, 6)
    for scale in range(3):
        expected = tokenizer.decode_latent(quantizer.latent_from_codes(codes_BL, scale + 1))
        torch.testing.assert_close(grown[:, scale], expected)
