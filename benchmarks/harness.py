"""What the benchmarks share: timing two things side by side, and one report that people and machines can read."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvar.cgroups import cores


@dataclass
class Report:
    """A benchmark's result: one flat object of figures, with what they should reach and where they were taken."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    goals: dict[str, str] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)

    def add(self, key: str, value: float, goal: str | None = None, how: Mapping[str, Any] | None = None) -> None:
        """A figure, what it should reach (such as ">= 30"), and how it came about (rounds, spread)."""
        self.figures[key] = float(value)
        if goal is not None:
            self.goals[key] = goal
        if how is not None:
            self.context[key] = dict(how)

    def finish(self, json_path: Path | None) -> None:
        """Print the figures and, with a path, write all of it as JSON."""
        for key, value in self.figures.items():
            goal = f"   goal {self.goals[key]}" if key in self.goals else ""
            print(f"{self.name}: {key:32} {value:>14,.4g}{goal}")
        self.write(json_path)

    def write(self, json_path: Path | None) -> None:
        """With a path, write all of it as JSON."""
        if json_path is not None:
            tree = {"name": self.name, "figures": self.figures, "goals": self.goals}
            tree["context"] = surroundings() | self.context
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line that knows `--json FILE`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the figures, goals and context to this file")
    return made


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


def spread(values: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def surroundings() -> dict[str, Any]:
    """Hardware, threads, versions and commit that a figure belongs to."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
