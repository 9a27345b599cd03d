"""`python -m benchmarks.page`: README.md and bench.png out of the results in benchmarks/results/."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, parser
from benchmarks.parts import PARTS

PLOT = "bench.png"
SAME = ("cpu", "cores", "memory_gib", "gpu", "python", "torch", "numpy", "deepspeed", "commit")
"""What results of one run have in common."""
GOAL = re.compile(r"(>=|<=|>|<) ([\d.]+)|([\d.]+) to ([\d.]+)")
RATIO = re.compile(r"_vs_(baseline|var|recompute|loop|webdataset|sync)|^peak_share|^encoder_busy|^exponent")
"""Figures of the plot."""


def met(value: float, goal: str) -> bool:
    """Whether a figure reaches its goal, such as ">= 1.6" or "0.95 to 1.05"."""
    found = GOAL.fullmatch(goal)
    assert found is not None, f"no goal: {goal}"
    sign, bound, low, high = found.groups()
    if sign is None:
        return float(low) <= value <= float(high)
    compare = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}[sign]
    return bool(compare(value, float(bound)))


@dataclass(frozen=True)
class Row:
    """A figure as the page shows it."""

    key: str
    value: float
    goal: str | None
    how: dict[str, Any]
    """Spread and rounds, where there are any."""

    @property
    def spread(self) -> tuple[float, float] | None:
        return (self.how["min"], self.how["max"]) if "min" in self.how else None

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return "yes" if met(self.value, self.goal) else "**no**"


@dataclass(frozen=True)
class Result:
    """One file."""

    name: str
    rows: list[Row]
    context: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Result:
        tree = json.loads(path.read_text())
        context, goals = tree["context"], tree["goals"]
        rows = []
        for key, value in tree["figures"].items():
            how = context.get(key)
            rows.append(Row(key, value, goals.get(key), how if isinstance(how, dict) else {}))
        return cls(path.stem, rows, context)

    @property
    def measured_at(self) -> str:
        """The options that it was measured with."""
        words = []
        for key, value in self.context["arguments"].items():
            if value is None or value is False or value == []:
                continue
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"{key.replace('_', ' ')} {text}")
        if "var_depth" in self.context:
            words.append(f"depth of VAR {self.context['var_depth']}")
        return ", ".join(words)


def read_all(folder: Path) -> tuple[list[Result], list[str]]:
    """Results of the parts that have one, in their order, and the names of the others."""
    paths = {part.name: folder / f"{part.name}.json" for part in PARTS}
    return [Result.read(path) for path in paths.values() if path.exists()], [
        name for name, path in paths.items() if not path.exists()
    ]


def text_of(folder: Path) -> str:
    """The page. It says which results are missing, and which come from another machine, version or commit."""
    results, missing = read_all(folder)
    lines = ["# Benchmarks", "", "Written by `make bench` (`python -m benchmarks.page`); do not edit.", ""]
    if missing:
        lines += [f"**Missing**, because they failed or were not run: {', '.join(missing)}.", ""]
    if not results:
        return "\n".join([*lines, "There are no results.", ""])
    usual = of_most(results).context
    apart = []
    for result in results:
        own = [f"{key} {result.context.get(key)}" for key in SAME if result.context.get(key) != usual.get(key)]
        apart += [f"{result.name} ({', '.join(own)})"] if own else []
    if apart:
        lines += [f"**Of another run**: {'; '.join(apart)}.", ""]
    lines += [*header(usual, folder), ""]
    lines += [
        "Figures are medians; contestants take turns, and a round before the first is not counted. A name ends with",
        "precision and batch where there are several; `python -m benchmarks.NAME --help` says what it means.",
        "",
        f"![ratios and goals]({PLOT})",
    ]
    for result in results:
        lines += ["", *section(result)]
    return "\n".join([*lines, ""])


def of_most(results: Sequence[Result]) -> Result:
    """The newest of those that most have machine, versions and commit in common with."""
    kinds = [tuple(result.context.get(key) for key in SAME) for result in results]
    common = Counter(kinds)
    _, _, place = max((common[kind], str(results[n].context["when"]), n) for n, kind in enumerate(kinds))
    return results[place]


def header(context: dict[str, Any], folder: Path) -> Iterator[str]:
    """Hardware, versions, and how long the whole run took."""
    yield "| | |"
    yield "|---|---|"
    gpu = context["gpu"] or "no GPU"
    yield f"| machine | {context['cpu']}, {context['cores']} cores, {context['memory_gib']} GiB, {gpu} |"
    versions = ", ".join(f"{name} {context[name]}" for name in ("python", "torch", "deepspeed", "numpy"))
    yield f"| versions | {versions} |"
    yield f"| commit | `{context['commit']}` |"
    whole = folder / "run.json"
    if whole.exists():
        run = Result.read(whole)
        peaks = run.context["matmul_gflops"]
        yield f"| matrix products | fp32 {peaks['fp32']:.0f}, bf16 {peaks['bf16']:.0f} GFLOP/s |"
        minutes = run.rows[0]
        yield (
            f"| the whole run | {minutes.value:.1f} minutes (goal {minutes.goal}: {minutes.verdict}), ended"
            f" {run.context['when']}, commit `{run.context['commit']}`; load before it {run.context['load_before']} |"
        )


def section(result: Result) -> Iterator[str]:
    """One benchmark's table."""
    context = result.context
    yield f"## {result.name}"
    yield ""
    yield f"{result.measured_at or 'no options'}. {context['threads']} threads, {context['took_s']:.0f} s, load before"
    yield f"{context['load_before']}."
    for key in ("peak_fp32", "peak_bf16"):
        if key in context:
            peak = context[key]
            yield f"Peak of {key[5:]} products: {peak['gflops']:.0f} GFLOP/s, multiplied in {peak['multiplied_in']}."
    yield ""
    yield "| figure | median | min to max | rounds | goal | met |"
    yield "|---|---|---|---|---|---|"
    for row in result.rows:
        between = " to ".join(map(number, row.spread)) if row.spread else ""
        rounds = row.how.get("rounds", "")
        yield f"| {row.key} | {number(row.value)} | {between} | {rounds} | {row.goal or ''} | {row.verdict} |"
    yield from by_scale(context)


def by_scale(context: dict[str, Any]) -> Iterator[str]:
    """A table of milliseconds, if the result has them: contestants by scales."""
    if "by_scale_ms" not in context:
        return
    sides = [f"{side}x{side}" for side in context["sides"]]
    yield ""
    yield f"| milliseconds by scale | {' | '.join(sides)} | sum |"
    yield f"|---|{'---|' * (len(sides) + 1)}"
    for name, own_ms in context["by_scale_ms"].items():
        yield f"| {name} | {' | '.join(map(number, [*own_ms, sum(own_ms)]))} |"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(folder: Path) -> None:
    """Ratios with their spread, and goals beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    results, _ = read_all(folder)
    shown = []
    for result in results:
        depth = result.context["arguments"].get("depth")
        label = result.name if depth is None else f"{result.name}, depth {depth}"
        shown += [(label, row) for row in result.rows if RATIO.search(row.key)]
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.24 * len(shown)), layout="constrained")
    for place, (_, row) in enumerate(shown):
        colour = {"": "tab:gray", "yes": "tab:green"}.get(row.verdict, "tab:red")
        if row.spread:
            axes.plot(row.spread, (place, place), color=colour, linewidth=2, alpha=0.5)
        axes.plot(row.value, place, "o", color=colour, markersize=5)
        for bound in re.findall(r"[\d.]+", row.goal or ""):
            axes.plot(float(bound), place, "|", color="black", markersize=13, markeredgewidth=1.5)
    axes.set_yticks(range(len(shown)), [f"{label}: {row.key}" for label, row in shown], fontsize=8)
    axes.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("Medians, least to largest. Bar: goal. Green: met, red: not met, gray: no goal", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / PLOT, dpi=110)
    pyplot.close(figure)


def write(folder: Path) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder)
    (folder / "README.md").write_text(text_of(folder))


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--results", type=Path, default=RESULTS, help="folder (default benchmarks/results)")
    write(options.parse_args(argv).results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
