"""Drawing on a GPU: all tensors lie there, and the host reads none while it lasts.

Legend: B images, C latent channels, h = w side of the feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from mvar.config import MambaBackend
from mvar.model.transformer import MVAR
from mvar.sampling.forcing import ForcedCodes, ForcedResidual, known_cells, known_tokens
from mvar.sampling.options import SamplingOptions
from mvar.sampling.sampler import Forced, Toward, draw_scales
from mvar.tokenizer.quantizer import Quantizer
from tests.fake_cuda.machine import AMPERE, GPU, HOPPER, LAYOUT, Seen, gpu, numbers, placed
from tests.fake_cuda.models import IMAGES, PATCH_NUMS, tokenizer, transformer

pytestmark = pytest.mark.fake_cuda

GUIDED = SamplingOptions(cfg=1.5, top_k=8, top_p=0.9)
MakeForced = Callable[[Quantizer], Forced]


def draw(
    seen: Seen,
    model: MVAR,
    options: SamplingOptions = GUIDED,
    make_forced: MakeForced | None = None,
    toward: Toward | None = None,
) -> None:
    vqvae = placed(tokenizer)
    seen.crossings.clear()  # those of moving the models
    with torch.no_grad():
        forced = None if make_forced is None else make_forced(vqvae.quantizer)
        labels_B, seeds_B = numbers(IMAGES), numbers(IMAGES)
        steps = list(draw_scales(model, vqvae.quantizer, labels_B, seeds_B, options, forced, toward))
        pixels_BCHW = vqvae.decode_latent(steps[-1].f_hat_BChw)
    assert {one.device for step in steps for one in (step.codes_BLk, step.f_hat_BChw, step.finite)} == {GPU}
    assert (pixels_BCHW.device, tuple(pixels_BCHW.shape)) == (GPU, (IMAGES, 3, 8, 8))
    assert seen.crossings in ([], [LAYOUT] * len(PATCH_NUMS))


@pytest.mark.parametrize(
    ("stored", "chains", "capability"),
    [
        (torch.float32, False, HOPPER),
        (torch.float32, True, HOPPER),
        (torch.float16, True, HOPPER),
        (torch.bfloat16, False, HOPPER),
        (torch.bfloat16, True, AMPERE),
    ],
)
def test_every_precision_stays_there(stored: torch.dtype, chains: bool, capability: tuple[int, int]) -> None:
    with gpu(chains=chains, capability=capability) as seen:
        draw(seen, placed(lambda: transformer().store_matmuls_(stored)))


@pytest.mark.parametrize("backend", get_args(MambaBackend))
def test_a_state_carried_from_scale_to_scale_stays_there(backend: MambaBackend) -> None:
    with gpu() as seen:
        draw(seen, placed(lambda: transformer(mamba_backend=backend).store_matmuls_(torch.bfloat16)))


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(cfg=0),
        SamplingOptions(cfg=1.5, top_k=1),
        SamplingOptions(cfg=1.5, top_k=0, top_p=0.9, smooth=True, temperature=0.9),
        SamplingOptions(cfg=1.5, top_k=8, interval=(1, 2)),
    ],
)
def test_every_way_from_logits_to_codes_stays_there(options: SamplingOptions) -> None:
    with gpu() as seen:
        draw(seen, placed(transformer), options)


def test_deterministic_sums_stay_there() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with gpu() as seen:
            draw(seen, placed(transformer))
    finally:
        torch.use_deterministic_algorithms(False)


def test_drawing_between_classes_stays_there() -> None:
    with gpu() as seen:
        draw(seen, placed(transformer), toward=Toward(numbers(IMAGES), 0.5))


@pytest.mark.parametrize("kind", [ForcedCodes, ForcedResidual])
def test_given_tokens_stay_there(kind: Any) -> None:
    def forced(quantizer: Quantizer) -> Forced:
        known_hw = known_cells(torch.ones(8, 8, dtype=torch.bool, device=GPU), quantizer.side)
        features_BChw = torch.zeros(1, 4, quantizer.side, quantizer.side, device=GPU)
        made: Forced = kind(quantizer, features_BChw, known_tokens(quantizer, known_hw, whole_scales=1))
        return made

    with gpu() as seen:
        draw(seen, placed(transformer), make_forced=forced)
