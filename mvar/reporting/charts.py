"""Line charts as SVG text, without a library and without scripts: they stand in a page that loads nothing.

Colours are variables of the page's style, so that one drawing suits light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from mvar.reporting.records import Point

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
BUCKETS = 300
"""A long line is drawn through the least and the greatest value of so many stretches: a spike is never lost."""
COLOURS = 6
"""Of the page's palette: `--line-0`, ..."""


@dataclass(frozen=True)
class Line:
    """One line of a chart. `colour`: any of CSS; `spread`: of each point, drawn as a bar up and down."""

    label: str
    points: Sequence[Point]
    colour: str
    faint: bool = False
    dots: bool = False
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class Mark:
    """A place on the x axis, or a level of the y axis, with a name."""

    value: float
    label: str
    colour: str = "var(--bad)"


@dataclass(frozen=True)
class Chart:
    """Lines over images seen."""

    title: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    levels: Sequence[Mark] = ()
    x_label: str = "images seen"

    @property
    def empty(self) -> bool:
        return not any(line.points for line in self.lines)


def palette(number: int) -> str:
    return f"var(--line-{number % COLOURS})"


def of_scale(scale: int, scales: int) -> str:
    """Coarse scales are violet, fine ones yellow; readable on light and on dark."""
    share = scale / max(1, scales - 1)
    return f"hsl({280 - 235 * share:.0f} {55 + 25 * share:.0f}% {52 - 4 * share:.0f}%)"


def svg(chart: Chart) -> str:
    """The chart as an `svg` element; all text in it is escaped."""
    bold = [line for line in chart.lines if not line.faint and line.points] or chart.lines
    xs = [x for line in chart.lines for x, _ in line.points] + [mark.value for mark in chart.marks]
    ys = [y for line in bold for _, y in line.points] + [level.value for level in chart.levels]
    if not xs or not ys:
        return ""
    x0, x1 = min(0.0, *xs), max(1.0, *xs)
    x_ticks, y_ticks = ticks(x0, x1, 5), ticks(min(ys), max(ys), 5)
    frame = _Frame(x0, x1, min(y_ticks[0], *ys), max(y_ticks[-1], *ys))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title, quote=True)}">',
        *(_grid_line(frame, tick) for tick in y_ticks),
        *(
            f'<text class="tick" x="{frame.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(tick)}'
            "</text>"
            for tick in x_ticks
            if x0 <= tick <= x1
        ),
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(chart.x_label)}</text>',
        *(_mark(frame, mark) for mark in chart.marks),
        *(_level(frame, level) for level in chart.levels),
        *(_line(frame, line) for line in chart.lines if line.points),
        "</svg>",
    ]
    return "".join(parts)


def figure(chart: Chart) -> str:
    """The chart with its title and a legend, as a `figure` element; nothing where there is nothing to draw."""
    if chart.empty:
        return ""
    legend = "".join(
        f'<li><i style="background:{line.colour}"{" class=faint" if line.faint else ""}></i>{escape(line.label)}'
        f"{'' if line.faint else f' <b>{short(line.points[-1][1])}</b>'}</li>"
        for line in chart.lines
        if line.points
    )
    legend += "".join(
        f'<li><i class="dotted" style="border-color:{level.colour}"></i>{escape(level.label)} '
        f"<b>{short(level.value)}</b></li>"
        for level in chart.levels
    )
    title = f"<b>{escape(chart.title)}</b> <span>{escape(chart.y_label)}</span>"
    return f"<figure><figcaption>{title}</figcaption>{svg(chart)}<ul class=legend>{legend}</ul></figure>"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers around a range, at most about `most` of them."""
    if high <= low:
        half = abs(low) * 0.1 or 0.5
        low, high = low - half, high + half
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: `1.5 M`, `20 k`, `0.004`, `3e-05`."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        """What lies beyond, as a faint line may, is drawn at the edge."""
        share = min(1.0, max(0.0, (value - self.y0) / (self.y1 - self.y0)))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _grid_line(frame: _Frame, tick: float) -> str:
    y = frame.y(tick)
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
    )


def _mark(frame: _Frame, mark: Mark) -> str:
    x = frame.x(mark.value)
    return (
        f'<path class="mark" style="stroke:{mark.colour}" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" style="fill:{mark.colour}" x="{x + 3:.1f}" y="{TOP + 9}">{escape(mark.label)}</text>'
    )


def _level(frame: _Frame, level: Mark) -> str:
    return f'<path class="mark" style="stroke:{level.colour}" d="M{LEFT} {frame.y(level.value):.1f}H{WIDTH - RIGHT}"/>'


def _line(frame: _Frame, line: Line) -> str:
    path = "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in _thinned(line.points))
    parts = [f'<path class="line{" faint" if line.faint else ""}" style="stroke:{line.colour}" d="{path}"/>']
    for place, (x, y) in enumerate(line.points if line.dots else ()):
        told = f"{line.label}: {short(y)} at {short(x)}"
        if place < len(line.spread) and line.spread[place]:
            half = line.spread[place]
            bar = f"M{frame.x(x):.1f} {frame.y(y - half):.1f}V{frame.y(y + half):.1f}"
            parts.append(f'<path class="line" style="stroke:{line.colour}" d="{bar}"/>')
            told += f" ± {short(half)}"
        parts.append(
            f'<circle r="3" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" style="fill:{line.colour}">'
            f"<title>{escape(told)}</title></circle>"
        )
    return "".join(parts)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most two points for each bucket, the least and the greatest, in their order."""
    if len(points) <= 2 * BUCKETS:
        return points
    kept: list[Point] = []
    for bucket in range(BUCKETS):
        own = points[bucket * len(points) // BUCKETS : (bucket + 1) * len(points) // BUCKETS]
        ends = min(range(len(own)), key=lambda i: own[i][1]), max(range(len(own)), key=lambda i: own[i][1])
        kept += [own[i] for i in sorted(set(ends))]
    return kept


def shared_colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour of the palette for each label, in the order of their first appearance."""
    return {label: palette(number) for number, label in enumerate(dict.fromkeys(labels))}
