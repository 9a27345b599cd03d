"""What every part of `benchmarks.gpu` is given: goals, sizes, the device, a place for figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report, seconds_of
from mvar.config import MambaBackend

GOALS = {
    "train_d16_imgs_per_s": ">= 300",
    "train_d16_mfu": ">= 0.40",
    "train_d24_mfu": ">= 0.45",
    "train_d30_mfu": ">= 0.50",
    "mixer_vs_mamba_ssm": ">= 1.3",
    "sample_d16_imgs_per_s": ">= 150",
    "sample_d24_imgs_per_s": ">= 75",
    "sample_d30_imgs_per_s": ">= 40",
    "sample_d24_vs_var30": ">= 1.5",
    "sample_d16_latency_ms": "<= 40",
    "tokenize_bf16_imgs_per_s": ">= 1000",
    "tokenize_fp32_imgs_per_s": ">= 120",
    "save_stall_s": "<= 0.25",
}


@dataclass(frozen=True)
class Scale:
    """How large everything is: as the goals have it, or tiny for a rehearsal on a CPU."""

    tiny: bool

    @property
    def geometry(self) -> dict[str, Any]:
        """What a model is told besides its depth."""
        return {"width": 64, "heads": 2, "patch_nums": (1, 2, 3, 4)} if self.tiny else {}

    @property
    def tokenizer(self) -> dict[str, Any]:
        return {"channels": 32, "patch_nums": (1, 2, 3, 4)} if self.tiny else {}

    def depth(self, depth: int) -> int:
        return 2 if self.tiny else depth

    def images(self, images: int) -> int:
        return 2 if self.tiny else images


@dataclass(frozen=True)
class Context:
    """What a part is given."""

    scale: Scale
    device: torch.device
    report: Report
    overrides: dict[str, Any]
    """Of the training's configuration, by dotted key."""
    into: Path
    """Written anew with every figure, so that a part that is stopped has not been in vain."""
    traces: Path | None = None
    """A folder to keep profiles in."""

    def add(self, key: str, value: float, how: dict[str, Any] | None = None) -> None:
        self.report.add(key, value, GOALS.get(key), how)
        self._write()
        print(f"  {key}: {value:,.4g}" + (f"   goal {GOALS[key]}" if key in GOALS else ""), flush=True)

    def note(self, key: str, value: Any) -> None:
        """Something to keep that is no figure."""
        self.report.context[key] = value
        self._write()

    def _write(self) -> None:
        self.into.write_text(json.dumps({"figures": self.report.figures, "context": self.report.context}))

    def timed(self, run: Callable[[], object], rounds: int = 5, warm: int = 2) -> list[float]:
        """Seconds of each round after the warm-up, each waited for."""
        if self.scale.tiny:
            rounds, warm = 1, 0
        for _ in range(warm):
            run()
        self.wait()
        return [seconds_of(run) for _ in range(rounds)]

    def mixer(self, wanted: MambaBackend) -> MambaBackend:
        """Whose kernels compute Mamba-2: `wanted`, or in a rehearsal what a CPU has."""
        return wanted if self.device.type == "cuda" else "auto"

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def with_mixer(mamba: MambaBackend) -> str:
    """The end of a part's name where it does not leave the choice of the mixer's kernels to `auto`."""
    return "" if mamba == "auto" else f"_{mamba}"
