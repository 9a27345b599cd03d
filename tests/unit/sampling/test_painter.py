"""Images do not depend on how many threads draw them; a GPU's batch follows from its memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvar.errors import MvarError
from mvar.sampling.options import SamplingOptions
from mvar.sampling.painter import GPU_BATCH, Painter, decoded, fitting_batch
from mvar.sampling.pictures import Picture
from tests.unit.sampling.test_graph import pair

GIB = 2**30
PICTURES = [Picture(number % 3, number) for number in range(23)]
BATCHES = [PICTURES[first : first + 4] for first in range(0, 23, 4)]


def test_the_number_of_threads_changes_no_bit_and_no_order() -> None:
    model, tokenizer = pair()
    drawn = {}
    for workers in (1, 2, 5):
        painter = Painter(model, tokenizer, SamplingOptions(top_k=8), "fp32", 7, 4, workers=workers)
        drawn[workers] = np.concatenate(list(painter.draw(BATCHES)))
    assert drawn[1].shape == (23, 6, 6, 3) and drawn[1].dtype == np.uint8
    assert np.array_equal(drawn[1], drawn[2]) and np.array_equal(drawn[1], drawn[5])
    assert len({image.tobytes() for image in drawn[1]}) > 20


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_cpu_without_16_bit_instructions_decodes_in_float32(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    monkeypatch.setattr("mvar.model.kernels.precision._cpu_multiplies", lambda _dtype: has_bf16)
    _, tokenizer = pair()
    latent_BChw = torch.randn(2, *tokenizer.quantizer.start(1).shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, half = decoded(tokenizer, latent_BChw, "fp32"), decoded(tokenizer, latent_BChw, "bf16")
    assert half.dtype == torch.float32
    assert torch.equal(exact, half) is not has_bf16


def test_an_error_of_a_thread_is_raised_where_the_images_are_asked_for() -> None:
    model, tokenizer = pair()
    model.head.bias.data[3] = torch.nan
    painter = Painter(model, tokenizer, SamplingOptions(top_k=8), "fp32", 7, 4, workers=2)
    with pytest.raises(MvarError, match="not finite"):
        list(painter.draw(BATCHES))


@pytest.mark.parametrize(
    ("fixed", "each", "free", "expected"),
    [
        (0.5, 0.1, 80, GPU_BATCH),
        (0.5, 0.1, 16, 32),
        (1.0, 1.0, 20, 4),
        (1.0, 1.0, 1, 1),
        (0.0, 0.0, 80, GPU_BATCH),
    ],
)
def test_a_batch_takes_less_than_half_of_the_free_memory(fixed: float, each: float, free: float, expected: int) -> None:
    assert fitting_batch(lambda count: int((fixed + each * count) * GIB), int(free * GIB)) == expected
