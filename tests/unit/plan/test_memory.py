"""The plan's arithmetic against what torch keeps and computes."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mvar.config import ActivationCheckpointing, ModelConfig
from mvar.model.transformer import MVAR
from mvar.plan.flops import best_interval_s, flops, time_lost
from mvar.plan.memory import (
    Setup,
    activations,
    checkpoint_bytes,
    largest_micro_batch,
    memory,
    model_state,
    saved_for_backward,
)
from mvar.plan.sizes import Sizes
from mvar.testing.engine_bytes import kept_by_autograd

SMALL = ModelConfig(
    depth=3, width=192, heads=3, patch_nums=(1, 2, 3, 4, 5, 6, 8), vocab_size=256, latent_channels=8, num_classes=10
)
IMAGES = 2


def alive() -> dict[int, Tensor]:
    """Every tensor that Python knows of, by the address of its storage."""
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor) and item.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t for t in tensors if t.layout == torch.strided}


def forward(config: ModelConfig, recompute: ActivationCheckpointing, *, autocast: bool = False) -> Tensor:
    """The loss of one batch of made-up images."""
    torch.manual_seed(0)
    assert config.num_classes is not None
    model = MVAR.from_config(config, num_classes=config.num_classes, activation_checkpointing=recompute)
    tokens = sum(side * side for side in config.patch_nums)
    labels_B, codes_T = torch.zeros(IMAGES, dtype=torch.int64), torch.zeros(IMAGES * tokens, dtype=torch.int64)
    x_BLC = torch.randn(IMAGES, tokens - 1, config.latent_channels)
    before = set(alive())
    casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with kept_by_autograd(model.parameters()) as kept, casting:
        logits_BLV = model(labels_B, x_BLC, drop_path_DGB=torch.ones(config.depth, 3, IMAGES))
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), codes_T)
    del logits_BLV
    if recompute == "selective":  # What it keeps lies in a table of its own.
        kept |= {place: t for place, t in alive().items() if place not in before}
    loss.kept_bytes = sum(t.untyped_storage().nbytes() for t in kept.values())  # type: ignore[attr-defined]
    return loss


@pytest.mark.parametrize("recompute", ["off", "every", "selective", 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
@pytest.mark.parametrize("l2_norm", [True, False])
def test_activations_are_what_autograd_keeps(recompute: ActivationCheckpointing, precision: str, l2_norm: bool) -> None:
    config = SMALL.model_copy(update={"attn_l2_norm": l2_norm})
    setup = Setup(0, precision, 1, recompute=recompute, kernels="cpu")  # type: ignore[arg-type]
    measured = forward(config, recompute, autocast=precision != "fp32").kept_bytes  # type: ignore[attr-defined]
    assert saved_for_backward(Sizes.of(config), setup, IMAGES) == pytest.approx(measured, rel=0.02)


def test_operations_are_those_that_torch_counts() -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(SMALL, "off")
    assert flops(Sizes.of(SMALL)).forward * IMAGES == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_conditioning_is_counted_once_for_each_image() -> None:
    """Nine tenths of what a longer pyramid adds must be tokens' work: the conditioning stays."""
    short, long = (flops(Sizes.of(SMALL.model_copy(update={"patch_nums": p}))) for p in ((1, 2), (1, 2, 3, 4)))
    assert short.conditioning == long.conditioning == 2 * (3 * 9 + 2) * 192 * 192
    assert long.linear > 5 * short.linear


def test_published_sizes_are_counted_from_the_model() -> None:
    assert Sizes.of(ModelConfig(depth=12)).parameters == 198_435_568
    assert Sizes.of(ModelConfig(depth=32)).parameters == 3_658_707_968


def test_each_stage_divides_more_and_holds_less() -> None:
    sizes = Sizes.of(ModelConfig(depth=12))
    totals = [model_state(sizes, Setup(stage, "fp16", 64)).total for stage in (1, 2, 3)]
    assert totals[0] > totals[1] > totals[2]
    assert totals[2] == pytest.approx(16 * sizes.parameters / 64, rel=0.05)
    accumulated = model_state(sizes, Setup(3, "fp16", 64, accumulation=2)).total
    assert accumulated == pytest.approx(18 * sizes.parameters / 64, rel=0.05)


def test_offloading_moves_bytes_and_loses_none() -> None:
    sizes = Sizes.of(ModelConfig(depth=12))
    plain = model_state(sizes, Setup(3, "bf16", 8))
    host = model_state(sizes, Setup(3, "bf16", 8, {"offload_optimizer": {"device": "cpu"}}))
    disk = model_state(sizes, Setup(3, "bf16", 8, {"offload_optimizer": {"device": "nvme"}}))
    assert plain.host == plain.disk == host.disk == 0
    assert host.total == host.device + host.host == disk.device + disk.host + disk.disk
    assert host.device == disk.device == plain.weights
    assert disk.disk == pytest.approx(16 * sizes.parameters / 8, rel=0.01)


def test_the_largest_micro_batch_fits_and_the_next_one_does_not() -> None:
    sizes, setup = Sizes.of(ModelConfig(depth=16)), Setup(2, "bf16", 8, {"reduce_bucket_size": 50_000_000})
    limit = 40 * 2**30
    best = largest_micro_batch(sizes, setup, 96, limit)
    assert best is not None and memory(sizes, setup, best).peak <= limit
    larger = min(size for size in range(best + 1, 97) if 96 % size == 0)
    assert memory(sizes, setup, larger).peak > limit
    assert largest_micro_batch(sizes, setup, 96, 2**30) is None


def test_recomputation_pays_with_one_block() -> None:
    sizes = Sizes.of(ModelConfig(depth=16))
    off, every = (activations(sizes, Setup(2, "bf16", 8, recompute=r), 8) for r in ("off", "every"))
    assert every.recomputed == pytest.approx(off.blocks / 16, rel=0.01)
    assert every.total < off.total / 3


def test_a_checkpoint_is_twelve_bytes_a_parameter() -> None:
    sizes = Sizes.of(SMALL)
    assert checkpoint_bytes(sizes, ema=False) == 12 * sizes.parameters
    assert checkpoint_bytes(sizes, ema=True) == 16 * sizes.parameters


def test_the_best_interval_is_best() -> None:
    write_s, mtbf_s = 60.0, 24 * 3600.0
    best = best_interval_s(write_s, mtbf_s)
    assert best == pytest.approx((2 * write_s * mtbf_s) ** 0.5, rel=0.03)  # Young
    for other in (best / 2, best * 2):
        assert time_lost(best, write_s, mtbf_s) < time_lost(other, write_s, mtbf_s)
    assert best_interval_s(3 * mtbf_s, mtbf_s) == mtbf_s
