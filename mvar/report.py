"""`mvar report`: the curves of a run, drawn from its metrics.jsonl, and how its samples were evaluated.

With --html everything that its folder tells, as one page that needs nothing else: to read, to keep, to send.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mvar.cli import run_command
from mvar.errors import MvarError
from mvar.files.disk import write_text
from mvar.files.json_lines import JsonRecord
from mvar.reporting.facts import facts_of
from mvar.reporting.page import page
from mvar.reporting.records import DISTANCES, Point, read_evaluations, series, smooth, way_of


def read_metrics(path: Path) -> list[JsonRecord]:
    """Records of a metrics.jsonl in order. A torn last line (a killed writer) is passed over. Raises MvarError."""
    if not path.is_file():
        raise MvarError(f"{path}: no such file. Give a run folder that has been trained in.")
    records: list[JsonRecord] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise MvarError(f"{path}: line {number} is damaged. Remove the line to go on.") from None
    return records


def draw_curves(records: list[JsonRecord], path: Path, title: str, evaluations: Sequence[JsonRecord] = ()) -> None:
    """Loss, accuracy, loss by scale and learning rate, and distances of samples, over images seen, as one PNG."""
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    if not train:
        raise MvarError(f"{title}: no training steps are recorded yet, so there is nothing to draw.")
    rows = 3 if evaluations else 2
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.75 * rows), layout="constrained")
    figure.suptitle(title)
    for axis, key, label in ((axes[0][0], "loss", "cross entropy (nats)"), (axes[0][1], "accuracy", "token accuracy")):
        axis.plot(*_xy(series(train, key)), color="0.8", linewidth=0.8, label="training, each step")
        axis.plot(*_xy(smooth(series(train, key))), color="tab:blue", label="training, smoothed")
        axis.plot(*_xy(series(val, key)), "o-", color="tab:orange", markersize=3, label="validation")
        axis.set(ylabel=label, xlabel="images seen")
        axis.legend()
    for record in records:
        if record["kind"] == "resume" and record["step"]:
            axes[0][0].axvline(record["samples"], color="tab:red", linestyle=":", linewidth=1)
            axes[0][0].annotate(
                "resumed", (record["samples"], 0.02), xycoords=("data", "axes fraction"), color="tab:red"
            )
    _draw_by_scale(axes[1][0], val or train, "validation" if val else "training")
    axes[1][1].plot(*_xy(series(train, "lr")), color="tab:green")
    axes[1][1].set(ylabel="learning rate", xlabel="images seen")
    if evaluations:
        _draw_distances(axes[2], evaluations)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_by_scale(axis: Any, records: list[JsonRecord], which: str) -> None:
    scales = len(records[0]["loss_per_scale"])
    colours = plt.get_cmap("viridis")
    for scale in range(scales):
        points = [record["loss_per_scale"][scale] for record in records]
        colour = colours(scale / max(1, scales - 1))
        axis.plot([record["samples"] for record in records], points, color=colour, label=f"scale {scale + 1}")
    axis.set(ylabel=f"cross entropy by scale, {which}", xlabel="images seen")
    axis.legend(ncols=2, fontsize="small")


def _draw_distances(axes: Any, evaluations: Sequence[JsonRecord]) -> None:
    """Frechet and kernel distances, a line for each way they were made: figures of two ways cannot be compared."""
    for axis, keys, title in ((axes[0], tuple(DISTANCES), "Frechet distance"), (axes[1], ("kid",), "KID")):
        ways: dict[str, list[tuple[float, float, float, float | None]]] = {}
        for one in evaluations:
            for key in (key for key in keys if one.get(key) is not None):
                point = one["samples"], one[key], 2 * (one.get(f"{key}_error") or 0.0), one.get(f"{key}_floor")
                ways.setdefault(way_of(one, key), []).append(point)
        for way, points in ways.items():
            x, y, spread, floors = zip(*points, strict=True)
            (line, *_) = axis.errorbar(x, y, yerr=spread, fmt="o-", markersize=3, capsize=3, label=way or None)
            if floors[-1] is not None:
                axis.axhline(floors[-1], color=line.get_color(), linestyle=":", linewidth=1, label="real images")
        axis.set(ylabel=title, xlabel="images seen")
        if ways:
            axis.legend(fontsize="small")


def _xy(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder, of a transformer or (with --html) of a tokenizer")
    parser.add_argument("--out", type=Path, help="PNG to write (default RUN/curves.png)")
    parser.add_argument(
        "--html",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="write a page instead, with everything in it (default RUN/report.html)",
    )
    args = parser.parse_args(argv)
    if args.html is not None and args.out is not None:
        raise MvarError(
            "--out names a PNG and --html a page: give one of them, and run the command again for the other."
        )
    if args.html is not None:
        out = args.run / "report.html" if args.html == Path() else args.html
        write_text(out, page(facts_of(args.run)))
    else:
        out = args.out or args.run / "curves.png"
        records = read_metrics(args.run / "metrics.jsonl")
        draw_curves(records, out, str(args.run), read_evaluations(args.run, records))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
