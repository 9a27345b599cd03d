"""What the benchmarks share: timing two things side by side, and one report that people and machines can read."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvar.cgroups import cores
from mvar.scales import PATCH_NUMS_256, PATCH_NUMS_512

SIZES = {"256": PATCH_NUMS_256, "512": PATCH_NUMS_512, "tiny": (1, 2, 3, 4)}
"""Token maps of an image, by its side in pixels; tiny ones are for tests."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass
class Report:
    """A benchmark's result: one flat object of figures, with what they should reach and where they were taken."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    goals: dict[str, str] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    began_s: float = field(default_factory=time.monotonic)
    load_before: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))

    def add(self, key: str, value: float, goal: str | None = None, how: Mapping[str, Any] | None = None) -> None:
        """A figure, what it should reach (such as ">= 30"), and how it came about (rounds, spread)."""
        self.figures[key] = float(value)
        if goal is not None:
            self.goals[key] = goal
        if how is not None:
            self.context[key] = dict(how)

    def median(self, key: str, values: Sequence[float], goal: str | None = None) -> None:
        """The median of the rounds' values, with their spread."""
        how = spread(values)
        self.add(key, how["median"], goal, how)

    def compare(
        self,
        key: str,
        seconds: Mapping[str, Sequence[float]],
        baseline: str,
        goal: str | None = None,
    ) -> None:
        """How many times faster "ours" is than `baseline`: the median of the rounds' ratios. See `side_by_side`."""
        ratios = [theirs / own for theirs, own in zip(seconds[baseline], seconds["ours"], strict=True)]
        own = {f"{name}_s": spread(taken) for name, taken in seconds.items()}
        self.add(key, statistics.median(ratios), goal, {**spread(ratios), **own})

    def finish(self, args: argparse.Namespace) -> None:
        """Print the figures; with `--json`, write all of it. `args`: the command line, which figures belong to."""
        self.context["arguments"] = {
            key: value if isinstance(value, (str, int, float, list, type(None))) else str(value)
            for key, value in vars(args).items()
            if key != "json"
        }
        for key, value in self.figures.items():
            goal = f"   goal {self.goals[key]}" if key in self.goals else ""
            print(f"{self.name}: {key:32} {value:>14,.4g}{goal}")
        self.write(args.json)

    def write(self, json_path: Path | None) -> None:
        """With a path, write all of it as JSON."""
        if json_path is not None:
            tree = {"name": self.name, "figures": self.figures, "goals": self.goals}
            own = {"load_before": self.load_before, "took_s": round(time.monotonic() - self.began_s, 1)}
            tree["context"] = surroundings() | own | self.context
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(tree, indent=1) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line that knows `--json FILE`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the figures, goals and context to this file")
    return made


def add_model(made: argparse.ArgumentParser, batch: Sequence[int], size: str = "256") -> None:
    """Options of a benchmark of the model: depth, batches, size of images, precision, rounds."""
    made.add_argument("--depth", type=int, default=12, help="depth of the model; it is 64 x depth wide (default 12)")
    words = " ".join(map(str, batch))
    made.add_argument("--batch", type=int, nargs="+", default=list(batch), help=f"images together (default {words})")
    made.add_argument("--size", choices=SIZES, default=size, help=f"side of an image in pixels (default {size})")
    made.add_argument("--precision", choices=[*DTYPES, "both"], default="both", help="arithmetic (default both)")
    made.add_argument("--rounds", type=int, default=5, help="pairs after the warm-up (default 5)")


def precisions(chosen: str) -> list[str]:
    """What `--precision` stands for."""
    return list(DTYPES) if chosen == "both" else [chosen]


def side_by_side(contestants: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. They take turns, so that a busy machine slows all of them alike.

    One round before the first warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            took_s = seconds_of(run)
            if number:
                seconds[name].append(took_s)
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call; work queued on a GPU is waited for."""
    begin_s = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def surroundings() -> dict[str, Any]:
    """Hardware, threads, load, versions, time and commit that a figure belongs to."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "deepspeed": version("deepspeed"),
        "commit": _commit(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """With "-dirty" where files differ from it; results, which a run writes, do not count."""
    git = ["git", "-C", str(HERE.parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("-dirty" if changed.returncode else "")
