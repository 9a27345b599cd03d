"""What the page shows, as HTML: pictures as data URIs, so that a click leaves no file behind. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mvar.errors import MvarError
from mvar.gallery.studio import Growth
from mvar.gallery.wish import Wish
from mvar.reporting.charts import figure
from mvar.reporting.curves import charts_of, figure_charts
from mvar.reporting.facts import facts_of
from mvar.reporting.page import data_uri
from mvar.reporting.style import CHARTS, DARK, LIGHT
from mvar.sampling.packing import encode_png

SMALL_PX = 120
"""A side up to which pictures are shown larger than they are, pixel by pixel."""
CSS = f"""
.mvar {{ {LIGHT} color: var(--ink); }}
.dark .mvar {{ {DARK} }}
{CHARTS}
.mvar img.drawn {{ max-width: 100%; height: auto; border-radius: 4px; }}
.mvar img.small {{ image-rendering: pixelated; }}
.mvar .film {{ display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 10px; }}
.mvar .film span {{ color: var(--soft); font-size: 12px; text-align: center; }}
.mvar .film img {{ display: block; width: 72px; height: 72px; image-rendering: pixelated; }}
.mvar .pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }}
.mvar .told {{ color: var(--soft); font-size: 13px; margin: 6px 0; }}
.mvar .error {{ border-left: 4px solid var(--bad); background: var(--card); padding: 10px 14px; }}
.mvar a.download {{ color: var(--line-0); }}
"""


def growing(frames: Sequence[Growth], wish: Wish, names: Sequence[str] | None) -> str:
    """The sheet after the newest scale, with a film of the first picture over all scales; at the end a download."""
    return f'<div class="mvar">{_told(frames[-1], wish, names)}{_film(frames)}{_sheet(frames[-1], wish)}</div>'


def pair(
    frames: tuple[Growth, Growth], wishes: tuple[Wish, Wish], labels: tuple[str, str], names: Sequence[str] | None
) -> str:
    """Two sheets side by side."""
    columns = "".join(
        f"<div><b>{escape(label)}</b>{_sheet(frame, wish, place)}</div>"
        for place, (frame, wish, label) in enumerate(zip(frames, wishes, labels, strict=True))
    )
    return f'<div class="mvar">{_told(frames[0], wishes[0], names)}<div class="pair">{columns}</div></div>'


def given(picture: bytes, mask: bytes) -> str:
    """The files that the command of an edit names, to be downloaded beside it."""
    links = " ".join(
        f'<a class="download" download="{name}" href="{data_uri(data)}">{name}</a>'
        for name, data in (("picture.png", picture), ("mask.png", mask))
    )
    return f'<div class="mvar"><p class="told">files of the command: {links}</p></div>'


def error(problem: MvarError) -> str:
    return f'<div class="mvar"><div class="error" role="alert">{escape(str(problem))}</div></div>'


def classes(names: Sequence[str] | None, num_classes: int) -> str:
    """Which classes there are, in a line."""
    told = f"classes 0 to {num_classes - 1}"
    if names is not None and any(name != str(label) for label, name in enumerate(names)):
        told += ": " + ", ".join(f"{label} {name}" for label, name in enumerate(names[:40]))
        told += ", ..." * (len(names) > 40)
    return f'<div class="mvar"><p class="told">{escape(told)}</p></div>'


def curves(run: Path) -> str:
    """Charts of a run with the distances of its samples; a line where there is none."""
    try:
        facts = facts_of(run)
    except MvarError:
        return f'<div class="mvar"><p class="told">{escape(str(run))}: no run folder, so there are no curves.</p></div>'
    found = charts_of(facts)
    charts = [*figure_charts(facts.evaluations), *found.curves, *found.by_scale]
    drawn = "".join(map(figure, charts)) or '<p class="told">Nothing was measured yet.</p>'
    return f'<div class="mvar"><h3>{escape(str(run))}</h3><div class="charts">{drawn}</div></div>'


def _sheet(frame: Growth, wish: Wish, place: int = 0) -> str:
    sheet = wish.sheet(frame.images_BHWC)
    uri, side = data_uri(encode_png(sheet)), frame.images_BHWC.shape[1]
    factor = max(1, SMALL_PX // side)
    small = ' class="drawn small"' if factor > 1 else ' class="drawn"'
    image = f'<img{small} alt="scale {frame.scale + 1}" width="{sheet.shape[1] * factor}" src="{uri}">'
    if not frame.last:
        return f'<div class="drawing">{image}</div>'
    name = f"mvar-seed{wish.seed}{'-b' if place else ''}.png"
    return f'<div class="done">{image}<p><a class="download" download="{name}" href="{uri}">Download PNG</a></p></div>'


def _told(frame: Growth, wish: Wish, names: Sequence[str] | None) -> str:
    rows = ", ".join(_named(label, names) for label in wish.counts)
    return f'<p class="told">scale {frame.scale + 1} of {frame.scales}; rows: class {escape(rows)}</p>'


def _named(label: int, names: Sequence[str] | None) -> str:
    """The number past the last class stands for none."""
    name = "" if names is None else names[label] if label < len(names) else "(none)"
    return str(label) if name in ("", str(label)) else f"{label} {name}"


def _film(frames: Sequence[Growth]) -> str:
    pictures = "".join(
        f'<span><img alt="" src="{data_uri(encode_png(frame.images_BHWC[0]))}">scale {frame.scale + 1}</span>'
        for frame in frames
    )
    return f'<div class="film">{pictures}</div>'
