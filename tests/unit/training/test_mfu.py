"""Model FLOPs utilisation."""

from __future__ import annotations

import pytest
import torch

from mvar.config import ModelConfig
from mvar.run.launcher import Place
from mvar.run.world import World
from mvar.training.mfu import Utilisation, measured_peak, peak_flops

CPU = torch.device("cpu")
ALONE = World(Place("alone"), CPU)


def test_the_share_follows_from_operations_images_and_the_peak() -> None:
    model = ModelConfig(depth=12, num_classes=1000)
    found = Utilisation.start(0.3, model, ALONE, "fp32")
    assert found is not None and found.peak_flops == pytest.approx(0.3e12)
    # The weights alone make 787 million operations a token; scan and attention come on top.
    assert found.flops_per_image == pytest.approx(680 * 787e6, rel=0.1)
    assert found.of(0.3) == pytest.approx(0.3 * found.flops_per_image / 0.3e12)


def test_on_a_cpu_the_peak_is_unknown_unless_it_is_measured() -> None:
    assert peak_flops("auto", CPU, torch.float32) is None
    assert Utilisation.start("auto", ModelConfig(depth=2), ALONE, "fp32") is None
    assert 1e9 < measured_peak(CPU, torch.float32) < 1e15
