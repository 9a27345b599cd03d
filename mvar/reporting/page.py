"""A run as one page of HTML: nothing is loaded from elsewhere, nothing runs in it, all text of files is escaped.

Charts are SVG, pictures are data URIs, the style follows the reader's light or dark. A policy in the page itself
forbids it to ask for anything.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from mvar.durations import duration
from mvar.reporting.charts import Chart, figure, short
from mvar.reporting.curves import charts_of, figure_charts
from mvar.reporting.facts import RunFacts, Sheet
from mvar.reporting.records import number, of_kind
from mvar.reporting.style import STYLE
from mvar.run.history import Start
from mvar.version import __version__

SHEETS = 12
"""Grids shown, evenly spaced over time; the newest is always among them."""
WIDEST_PX = 1200
"""Wider grids are made smaller."""
TROUBLES = 100
"""Bad steps listed, the newest."""
_HIDDEN = {"samples", "time_s", "features_sha256", "reference_sha256", "event"}
"""Of an evaluation, what the table leaves out."""


def page(facts: RunFacts) -> str:
    """The whole document. Pictures that cannot be read are named in their place."""
    title = facts.path.resolve().name
    sections = [
        ("Curves", _charts(charts_of(facts).curves)),
        ("By scale", _charts(charts_of(facts).by_scale)),
        ("Figures of samples", _figures(facts)),
        (
            "Reconstructions over time" if facts.trains == "tokenizer" else "Samples over time",
            _sheets(_spread(facts.sheets)),
        ),
        ("Reconstructions", _sheets([facts.reconstructions] if facts.reconstructions is not None else [])),
        ("Restarts and stops", _starts(facts)),
        ("Configuration", _config(facts.config)),
        ("Environment", _pairs(facts.environment.items())),
    ]
    shown = [(name, name.lower().replace(" ", "-"), body) for name, body in sections if body]
    missing = ", ".join(name.lower() for name, body in sections if not body)
    menu = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor, _ in shown)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
            "'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)} - mvar report</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<header><h1>{escape(title)}</h1><p>{escape(_summary(facts))}</p></header><nav>{menu}</nav><main>",
            _tiles(facts),
            *(f'<section id="{anchor}"><h2>{name}</h2>{body}</section>' for name, anchor, body in shown),
            f"</main><footer>{f'Not in this run: {missing}. ' if missing else ''}"
            f"Written {made} by mvar {__version__}.</footer></body></html>\n",
        ]
    )


def _summary(facts: RunFacts) -> str:
    steps = [step for record in facts.metrics if (step := number(record.get("step"))) is not None]
    words = [f"training of a {facts.trains}", "finished" if facts.finished else _ending(facts)]
    if steps:
        words.append(f"{max(steps):,.0f} steps")
    return ", ".join(words)


def _ending(facts: RunFacts) -> str:
    if not facts.starts:
        return "not finished"
    last = facts.starts[-1]
    return "killed, or still running" if last.code is None else f"ended with exit code {last.code}"


def _tiles(facts: RunFacts) -> str:
    """The newest numbers, large."""
    train, val = facts.of_kind("train"), facts.of_kind("val")
    known = {"images seen": number(train[-1]["samples"]) if train else None}
    wanted = (
        ("training loss", train, "loss"),
        ("validation loss", val, "loss"),
        ("held-out PSNR, dB", val, "psnr_db"),
        ("held-out SSIM", val, "ssim"),
        ("accuracy", val or train, "accuracy"),
        ("images a second", train, "imgs_per_s"),
    )
    for name, records, key in wanted:
        known[name] = next((found for one in reversed(records) if (found := number(one.get(key))) is not None), None)
    for key, name in (("fid", "FID"), ("fd_efflite0", "FD-efflite0"), ("fd", "FD")):
        values = [found for one in facts.evaluations if (found := number(one.get(key))) is not None]
        known[f"{name}, newest"] = values[-1] if values else None
    tiles = "".join(f"<div><b>{short(value)}</b>{name}</div>" for name, value in known.items() if value is not None)
    return f"<div class=tiles>{tiles}</div>" if tiles else ""


def _charts(charts: Iterable[Chart]) -> str:
    drawn = "".join(figure(chart) for chart in charts)
    return f"<div class=charts>{drawn}</div>" if drawn else ""


def _figures(facts: RunFacts) -> str:
    """Charts, and a table with a row for each evaluation: every key that any of them has."""
    if not facts.evaluations:
        return ""
    keys = list(dict.fromkeys(key for one in facts.evaluations for key in one if key not in _HIDDEN))
    rows = [[_cell(one.get(key)) for key in keys] for one in facts.evaluations]
    return _charts(figure_charts(facts.evaluations)) + _table(keys, rows)


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _spread(sheets: Sequence[Sheet]) -> list[Sheet]:
    """Newest first."""
    places = np.linspace(0, len(sheets) - 1, min(SHEETS, len(sheets))).round().astype(int)
    return [sheets[place] for place in reversed(places)]


def _sheets(sheets: Sequence[Sheet]) -> str:
    return f"<div class=sheets>{''.join(map(_sheet, sheets))}</div>" if sheets else ""


def _sheet(sheet: Sheet) -> str:
    words = [sheet.path.name if sheet.step is None else f"step {sheet.step:,}"]
    words += [f"{sheet.samples:,.0f} images seen"] if sheet.samples is not None else []
    told = escape(", ".join(words), quote=True)
    try:
        found = _picture(sheet.path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"<p class=missing>{told}: cannot be read ({escape(str(error))}).</p>"
    return f'<figure class=sheet><img alt="{told}" src="{found}"><figcaption>{told}</figcaption></figure>'


def _picture(path: Path) -> str:
    """The picture as it is, or smaller where it is wider than a page; decoded once, so that no broken one is shown."""
    with Image.open(path) as picture:
        picture.load()
        data, kind = path.read_bytes(), picture.format
        if picture.width > WIDEST_PX or kind != "PNG":
            height = max(1, round(picture.height * min(1.0, WIDEST_PX / picture.width)))
            smaller = picture.convert("RGB").resize((min(WIDEST_PX, picture.width), height))
            held = io.BytesIO()
            smaller.save(held, format="PNG")
            data = held.getvalue()
    return data_uri(data)


def data_uri(png: bytes) -> str:
    """A PNG as an address that a page carries in itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _starts(facts: RunFacts) -> str:
    rows = [_start_row(start, last=start is facts.starts[-1]) for start in facts.starts]
    parts = (
        [_table(["began", "where", "ranks", "from step", "to step", "lasted", "how it ended"], rows)] if rows else []
    )
    resumed = of_kind(facts.metrics, "resume")
    if not rows and resumed:  # A run without a history: its records still tell where it went on.
        keys = ["step", "world", "zero_stage", "global_batch"]
        parts.append(_table(keys, [[_cell(record.get(key)) for key in keys] for record in resumed]))
    if facts.troubles:
        bad = [
            [_when(one.time), one.event.replace("_", " "), f"{one.step:,}", one.reason]
            for one in facts.troubles[-TROUBLES:]
        ]
        more = len(facts.troubles) - len(bad)
        parts.append(f"<h3>Bad steps{f', the newest {len(bad)} of {len(facts.troubles)}' if more else ''}</h3>")
        parts.append(_table(["when", "what", "step", "why"], bad))
    return "".join(parts)


def _start_row(start: Start, *, last: bool) -> list[str]:
    job = f", job {start.job}" if start.job else ""
    lasted = "" if start.end_time is None else duration(start.end_time - (start.allocated or start.time))
    killed = "killed, or still running" if last else "killed"
    why = killed if start.code is None else f"{start.reason} (exit code {start.code})"
    steps = ["" if step is None else f"{step:,}" for step in (start.begin_step, start.end_step)]
    return [_when(start.time), f"{start.nodes or start.host}{job}", str(start.world), *steps, lasted, why]


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _config(text: str) -> str:
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>" if text else ""


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f"<div class=scroll><table>{rows}</table></div>" if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
