"""Options of sampling: what they mean for each scale, and the work that they save.

Legend: B images, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvar.errors import ConfigError
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from mvar.sampling.options import SamplingOptions, guided_scales
from mvar.sampling.sampler import generate, generate_codes
from mvar.tokenizer.quantizer import Quantizer

SIDES = (1, 2, 3, 4)
SCALES = len(SIDES)


def small() -> tuple[MVAR, Quantizer]:
    torch.manual_seed(0)
    model = MVAR(2, 5, SIDES, 32, 4, width=64, heads=2)
    init_weights_(model, 0, init_gamma=1.0, init_head=4.0)
    return model, Quantizer(32, 4, SIDES)


def strengths(**options: Any) -> list[float]:
    return [scale.strength for scale in SamplingOptions(**options).of_scales(SCALES)]


def test_guidance_is_a_ramp_constant_of_an_interval_or_a_table() -> None:
    assert strengths(cfg=1.5) == pytest.approx([0, 0.5, 1, 1.5])
    assert strengths(cfg=1.5, guidance="constant") == [1.5] * 4
    assert strengths(cfg=1.5, guidance="constant", interval=(1, 2)) == [0, 1.5, 1.5, 0]
    assert strengths(cfg=1.5, interval=(2, 3)) == pytest.approx([0, 0, 1, 1.5])
    assert strengths(cfg=(0.0, 3.0, 0.5, 0.0)) == [0, 3, 0.5, 0]


def test_tables_hold_a_value_for_each_scale() -> None:
    options = SamplingOptions(top_k=(0, 1, 2, 3), top_p=(0.1, 0.2, 0.3, 0.4), temperature=(1.0, 2.0, 3.0, 4.0))
    assert [scale[1:] for scale in options.of_scales(SCALES)] == [
        (top_k, (top_k + 1) / 10, top_k + 1) for top_k in range(SCALES)
    ]


def test_the_half_without_a_class_runs_up_to_the_last_guided_scale() -> None:
    model, quantizer = small()
    batches: list[int] = []
    model.register_forward_hook(lambda _module, inputs, _output: batches.append(len(inputs[0])))
    for options, expected in (
        (SamplingOptions(cfg=1.5), [4, 4, 4, 4]),
        (SamplingOptions(cfg=0.0), [2, 2, 2, 2]),
        (SamplingOptions(cfg=(0.0, 0.0, 0.0, 0.0)), [2, 2, 2, 2]),
        (SamplingOptions(cfg=1.5, guidance="constant", interval=(0, 1)), [4, 4, 2, 2]),
        (SamplingOptions(cfg=(0.0, 3.0, 0.0, 0.0)), [4, 4, 2, 2]),
    ):
        batches.clear()
        generate_codes(model, quantizer, torch.tensor([0, 1]), options)
        assert batches == expected
        assert guided_scales(options.of_scales(SCALES)) == sum(batch == 4 for batch in batches)


def test_leaving_that_half_out_changes_no_code() -> None:
    """Guidance too weak to change anything keeps the half to the end; the codes are those without it."""
    model, quantizer = small()
    labels_B = torch.tensor([0, 1, 2])
    short = generate(model.double(), quantizer, labels_B, cfg=(2.0, 1.0, 0.0, 0.0), top_k=20)
    whole = generate(model, quantizer, labels_B, cfg=(2.0, 1.0, 0.0, 1e-30), top_k=20)
    assert torch.equal(short, whole)
    assert not torch.equal(short, generate(model, quantizer, labels_B, cfg=0.0, top_k=20))


def test_the_published_ramp_is_the_same_as_its_table() -> None:
    model, quantizer = small()
    labels_B = torch.tensor([0, 1, 2])
    table = tuple(1.5 * (scale / 3) for scale in range(SCALES))
    assert torch.equal(generate(model, quantizer, labels_B), generate(model, quantizer, labels_B, cfg=table))


def test_temperature_divides_the_guided_logits() -> None:
    model, quantizer = small()
    logits: list[Tensor] = []

    def remember(logits_BLV: Tensor, *_: Any) -> Tensor:
        logits.append(logits_BLV)
        return logits_BLV

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvar.sampling.sampler.filter_logits", remember)
        generate(model, quantizer, torch.tensor([0]), temperature=1.0)
        generate(model, quantizer, torch.tensor([0]), temperature=(4.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(logits[SCALES] * 4, logits[0])
    greedy = [generate(model, quantizer, torch.tensor([0]), top_k=1, temperature=t) for t in (1.0, 9.0)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg": (1.0, 2.0)}, "cfg: a table of 2 values, but the model has 4 scales"),
        ({"top_k": (1,) * 5}, "top_k: a table of 5 values"),
        ({"cfg": ()}, "an empty table"),
        ({"cfg": float("nan")}, "finite"),
        ({"top_k": (1, -1)}, "top_k"),
        ({"top_p": (0.5, 2.0)}, "top_p from 0 to 1"),
        ({"temperature": 0.0}, "more than 0"),
        ({"guidance": "cosine"}, "expected one of ramp, constant"),
        ({"guidance": "constant", "cfg": (1.0, 1.0, 1.0, 1.0)}, "Leave one out"),
        ({"interval": (2, 1)}, "first and last scale"),
        ({"interval": (0, 4)}, "scales are 0 to 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingOptions(**options).of_scales(SCALES)
