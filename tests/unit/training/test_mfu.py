"""Model FLOPs utilisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mvar.config import ModelConfig
from mvar.run.launcher import Place
from mvar.run.world import World
from mvar.training.mfu import Utilisation, chosen_peak, measured_peak, peak_flops

CPU = torch.device("cpu")
ALONE = World(Place("alone"), CPU)


def test_the_share_follows_from_operations_images_and_the_peak() -> None:
    model = ModelConfig(depth=12, num_classes=1000)
    found = Utilisation.start(0.3, model, ALONE, "fp32")
    assert found is not None and found.peak_flops == pytest.approx(0.3e12)
    # The weights alone make 787 million operations a token; scan and attention come on top.
    assert found.flops_per_image == pytest.approx(680 * 787e6, rel=0.1)
    assert found.of(0.3) == pytest.approx(0.3 * found.flops_per_image / 0.3e12)


@dataclass(frozen=True)
class Mixed(World):
    """A world with another rank, which brings its own peak to the sum."""

    other: tuple[float, float] = (0.0, 0.0)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.double() + torch.tensor(self.other)


@pytest.mark.parametrize("own", [0.3, "auto"])
def test_a_rank_whose_peak_is_unknown_takes_part_in_the_sum_and_all_show_none(own: Any) -> None:
    """Rank 0 on a known GPU and rank 1 on an unknown one, and the other way round: both come to the collective."""
    model = ModelConfig(depth=2)
    other = (0.0, 1.0) if own == 0.3 else (0.3e12, 0.0)
    assert Utilisation.start(own, model, Mixed(Place("alone"), CPU, other), "fp32") is None
    known = Utilisation.start(0.3, model, Mixed(Place("alone"), CPU, (0.2e12, 0.0)), "fp32")
    assert known is not None and known.peak_flops == pytest.approx(0.5e12)


def test_what_is_taken_for_the_peak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert chosen_peak("auto", CPU) is None and chosen_peak(100.0, gpu) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert "989 TFLOP/s" in str(chosen_peak("auto", gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Fancy 9000")
    assert "'Fancy 9000' is not known here (tracking.peak_tflops" in str(chosen_peak("auto", gpu))


def test_on_a_cpu_the_peak_is_unknown_unless_it_is_measured() -> None:
    assert peak_flops("auto", CPU, torch.float32) is None
    assert Utilisation.start("auto", ModelConfig(depth=2), ALONE, "fp32") is None
    assert 1e9 < measured_peak(CPU, torch.float32) < 1e15
