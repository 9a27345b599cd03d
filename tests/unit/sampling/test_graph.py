"""Drawing in one go. That a CUDA graph gives the same: tests/gpu.

Legend: B images, S scales.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvar.errors import ConfigError, MvarError
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from mvar.sampling.graph import GraphedDrawing
from mvar.sampling.options import SamplingOptions
from mvar.sampling.sampler import draw_scales, generate_latent
from mvar.tokenizer.vqvae import VQVAE

OPTIONS = SamplingOptions(cfg=1.5, top_k=8, top_p=0.9)


def pair() -> tuple[MVAR, VQVAE]:
    torch.manual_seed(0)
    model = MVAR(2, 3, (1, 2, 3), 16, 4, width=64, heads=2)
    init_weights_(model, 0, init_gamma=0.3, init_head=1.0)
    return model, VQVAE(32, 4, 16, (1, 2, 3), channel_mult=(1, 1)).eval()


def test_drawing_in_one_go_gives_what_scale_by_scale_gives() -> None:
    model, tokenizer = pair()
    drawing = GraphedDrawing(model, tokenizer, 2, tokenizer.decode_latent, OPTIONS, graphed=False)
    labels_B, seeds = torch.tensor([2, 0]), [5, 6]
    with torch.no_grad():
        expected = tokenizer.decode_latent(generate_latent(model, tokenizer, labels_B, OPTIONS, seeds))
    assert torch.equal(drawing(labels_B, seeds), expected)
    with pytest.raises(ConfigError, match="labels: got 0 to 9"):
        drawing(torch.tensor([9, 0]), seeds)
    model.head.bias.data[3] = torch.nan
    with pytest.raises(MvarError, match="logits of scale 0 are not finite"):
        drawing(labels_B, seeds)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 8])
def test_the_host_reads_nothing_while_it_draws(smooth: bool, top_k: int) -> None:
    """A tensor on the meta device has no values: reading one is an error."""
    model, tokenizer = pair()
    options = SamplingOptions(1.5, top_k, 0.9, smooth)
    model, tokenizer = model.to("meta"), tokenizer.to("meta")
    labels_B, seeds_B = (torch.zeros(2, dtype=torch.int64, device="meta") for _ in range(2))
    with pytest.raises(RuntimeError):
        bool(labels_B.any())
    with torch.no_grad():
        steps = list(draw_scales(model, tokenizer.quantizer, labels_B, seeds_B, options))
        pictures: Tensor = tokenizer.decode_latent(steps[-1].f_hat_BChw)
    assert [step.codes_BLk.shape[1] for step in steps] == [1, 4, 9]
    assert pictures.shape == (2, 3, 6, 6) and all(step.finite.shape == () for step in steps)
