"""Model FLOPs utilisation: the work that a step's images need, as a share of what the hardware could have done.

Operations are counted as in `mvar.plan.flops` (a training step is three forward passes; what recomputation does again
does not count).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mvar.config import ModelConfig, PeakSetting
from mvar.log import Chosen
from mvar.plan.flops import flops
from mvar.plan.gpus import recognise
from mvar.plan.sizes import Sizes
from mvar.run.world import World

SIDE = 2048
MEASURED_S = 0.5


def chosen_peak(setting: PeakSetting, device: torch.device) -> Chosen | None:
    """What `auto` takes for the peak of a GPU; None where there is nothing to decide."""
    if setting != "auto" or device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    gpu = recognise(name)
    if gpu is None:
        reason = f"the peak of a GPU called {name!r} is not known here (tracking.peak_tflops gives or measures it)"
        return Chosen("MFU", "not shown", reason)
    return Chosen("MFU", f"of {gpu.bf16_tflops:.0f} TFLOP/s a rank", f"the GPU is called {name!r}")


@dataclass(frozen=True)
class Utilisation:
    """Turns images a second, over all ranks, into a share of the peak of all ranks."""

    flops_per_image: int
    peak_flops: float

    def of(self, imgs_per_s: float) -> float:
        return imgs_per_s * self.flops_per_image / self.peak_flops

    @classmethod
    def start(cls, setting: PeakSetting, model: ModelConfig, world: World, precision: str) -> Utilisation | None:
        """None where some rank's peak is not known: `auto` on a CPU, or on a GPU that mvar does not know. All ranks."""
        peak = peak_flops(setting, world.device, torch.float32 if precision == "fp32" else torch.bfloat16)
        total, unknown = world.sum(torch.tensor([peak or 0.0, float(peak is None)])).tolist()
        return None if unknown else cls(flops(Sizes.of(model)).training, total)


def peak_flops(setting: PeakSetting, device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that one rank's device can do at best: given (TFLOP/s), known by name, or measured."""
    if isinstance(setting, float):
        return setting * 1e12
    if setting == "measure":
        return measured_peak(device, dtype)
    gpu = recognise(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.bf16_tflops * 1e12


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch.matmul, the fastest of some: a peak that can be reached."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    best_s, begin_s = float("inf"), time.perf_counter()
    while time.perf_counter() - begin_s < MEASURED_S or best_s == float("inf"):
        since_s = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - since_s)
    return float(2 * SIDE**3 / best_s)
