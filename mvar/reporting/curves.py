"""Which charts tell how a run went, for transformers and tokenizers alike: those whose numbers are there are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mvar.files.json_lines import JsonRecord
from mvar.reporting.charts import Chart, Line, Mark, of_scale, palette, shared_colours
from mvar.reporting.facts import RunFacts
from mvar.reporting.records import DISTANCES, number, places, series, smooth, way_of

SMOOTHED = 100
"""Points from which a noisy curve has a smooth one drawn over it."""
_TERMS = ("l1", "l2", "codebook", "commitment", "perceptual", "generator_loss", "discriminator_loss")
_BY_SCALE = (
    ("loss_per_scale", "Loss by scale", "nats per token"),
    ("accuracy_per_scale", "Accuracy by scale", "share of tokens"),
    ("psnr_db_per_scale", "PSNR of the first scales alone", "dB, held out"),
    ("used_per_scale", "Words in use by scale", "held out"),
    ("perplexity_per_scale", "Perplexity by scale", "held out"),
)


@dataclass(frozen=True)
class RunCharts:
    """Charts of a run; those without numbers are empty, and nothing is drawn of them."""

    curves: Sequence[Chart]
    by_scale: Sequence[Chart]


def charts_of(facts: RunFacts) -> RunCharts:
    train, val = facts.of_kind("train"), facts.of_kind("val")
    marks = [
        Mark(float(record["samples"]), "resumed") for record in facts.of_kind("resume") if number(record.get("step"))
    ]
    loss = "nats per token" if facts.trains == "transformer" else "weighted sum of terms"
    curves = [
        Chart("Loss", loss, _trained(train, "loss") + _held_out(val, "loss"), marks),
        Chart("Accuracy", "share of tokens", _trained(train, "accuracy") + _held_out(val, "accuracy")),
        Chart("PSNR", "dB", _trained(train, "psnr_db") + _held_out(val, "psnr_db")),
        Chart("SSIM", "held out", _held_out(val, "ssim")),
        Chart(
            "Terms of the loss",
            "unweighted",
            [Line(key, smooth(series(train, key)), palette(place)) for place, key in enumerate(_TERMS)],
        ),
        Chart("Gradient norm", "before clipping", _trained(train, "grad_norm")),
        Chart("Learning rate", "", [Line("learning rate", series(train, "lr"), palette(2))]),
        Chart("Speed", "images a second", _trained(train, "imgs_per_s")),
        Chart("Words revived", "a step", [Line("revived", series(train, "revived"), palette(3))]),
        Chart("Memory", "GiB, rank 0's peak", [Line("memory", series(train, "memory_gib"), palette(3))]),
    ]
    return RunCharts(curves, [_scales(key, title, label, train, val) for key, title, label in _BY_SCALE])


def figure_charts(evaluations: Sequence[JsonRecord]) -> list[Chart]:
    """Distances over images seen, a line for each way they were made, with twice their errors and their floors."""
    charts = []
    for title, keys in (("Frechet distance", tuple(DISTANCES)), ("KID", ("kid",))):
        found = [
            (way_of(one, key), key, one) for key in keys for one in evaluations if number(one.get(key)) is not None
        ]
        colours = shared_colours(way for way, _, _ in found)
        lines, levels = [], []
        for way, colour in colours.items():
            own = [(key, one) for other, key, one in found if other == way]
            points = [(float(one["samples"]), float(one[key])) for key, one in own]
            spread = [2 * (number(one.get(f"{key}_error")) or 0.0) for key, one in own]
            lines.append(Line(way or title, points, colour, dots=True, spread=spread))
            floors = [floor for key, one in own if (floor := number(one.get(f"{key}_floor"))) is not None]
            levels += [Mark(floors[-1], "real images", colour)] if floors else []
        charts.append(Chart(title, "", lines, levels=levels))
    return charts


def _trained(train: Sequence[JsonRecord], key: str) -> list[Line]:
    points = series(train, key)
    if len(points) < SMOOTHED:
        return [Line("training", points, palette(0))]
    return [
        Line("training, as measured", points, palette(0), faint=True),
        Line("training, smoothed", smooth(points), palette(0)),
    ]


def _held_out(val: Sequence[JsonRecord], key: str) -> list[Line]:
    return [Line("validation", series(val, key), palette(1), dots=True)]


def _scales(key: str, title: str, label: str, train: Sequence[JsonRecord], val: Sequence[JsonRecord]) -> Chart:
    records, which = (val, "validation") if places(val, key) else (train, "training, smoothed")
    count = places(records, key)
    lines = []
    for scale in range(count):
        points = series(records, key, scale)
        points = points if records is val else smooth(points)
        lines.append(Line(f"scale {scale + 1}", points, of_scale(scale, count), dots=records is val))
    return Chart(title, f"{label}, {which}" if "held out" not in label else label, lines)
