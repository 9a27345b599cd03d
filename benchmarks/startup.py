"""How long it takes until a command says something, and until a resumed training has done its first step.

A training of one image a step, ZeRO 2, one process, fp32, is started, saved after a step, and then resumed once a
round, as a job array does it; its own record says where the time went (`first_step` in history.jsonl). Each round is a
process of its own, and files are in the system's cache.

help_s, status_s, import_s   `mvar --help`, `mvar status RUN`, `python -c "import mvar"`, Python's own start included
start_s                      from the process's beginning until its first step after resuming is done
the others ending in _s      the parts of it, in their order
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import HERE, SIZES, Report, parser, seconds_of
from mvar.testing.code_stores import make_store

QUICK_ROUNDS = 7
VOCAB, LATENT = 4096, 32


class Trainee:
    """A run that can be started again and again, a step further each time."""

    def __init__(self, folder: Path, depth: int, size: str) -> None:
        self.run, self.steps = folder / "run", 0
        store = make_store(folder / "store", train=64, val=1, patch_nums=SIZES[size], vocab=VOCAB, latent=LATENT)
        self._words = [
            f"run={self.run}",
            f"data.store={store}",
            f"model.depth={depth}",
            "global_batch=1",
            "epochs=1000",
        ]
        self._words += [f"model.patch_nums={list(SIZES[size])}", "engine.precision=fp32", "tracking.wandb=disabled"]
        self._words += ["checkpoint.every_steps=1000", "tracking.validate_every=0"]

    def start(self) -> dict[str, float]:
        """Train one step further; seconds of each part of the start. Raises CalledProcessError."""
        self.steps += 1
        call("-m", "mvar.train", *self._words, f"max_steps={self.steps}")
        events = [json.loads(line) for line in (self.run / "history.jsonl").read_text().splitlines()]
        seconds: dict[str, float] = [event for event in events if event["event"] == "first_step"][-1]["seconds"]
        return seconds


def call(*words: str) -> None:
    """Run Python with these words. Raises CalledProcessError, with what it said on the terminal."""
    environ = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, *words], env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()


def measure(report: Report, args: argparse.Namespace, folder: Path) -> None:
    trainee = Trainee(folder, args.depth, args.size)
    trainee.start()
    rounds = [trainee.start() for _ in range(args.rounds)]
    quick = {
        "help_s": (("-m", "mvar.cli", "--help"), "<= 0.2"),
        "status_s": (("-m", "mvar.cli", "status", str(trainee.run)), "<= 0.5"),
        "import_s": (("-c", "import mvar"), "<= 0.1"),
    }
    for name, (words, goal) in quick.items():
        taken_s = [seconds_of(partial(call, *words)) for _ in range(QUICK_ROUNDS + 1)]
        report.median(name, taken_s[1:], goal)
    report.median("start_s", [sum(parts_s.values()) for parts_s in rounds], "<= 15")
    for part in rounds[0]:
        report.median(re.sub(r"\W+", "_", part) + "_s", [parts_s[part] for parts_s in rounds])


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--depth", type=int, default=12, help="depth of the model (default 12)")
    options.add_argument("--size", choices=SIZES, default="256", help="side of an image in pixels (default 256)")
    options.add_argument("--rounds", type=int, default=3, help="resumed starts (default 3)")
    args = options.parse_args(argv)
    report = Report("startup")
    with tempfile.TemporaryDirectory() as name:
        measure(report, args, Path(name))
    report.finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
