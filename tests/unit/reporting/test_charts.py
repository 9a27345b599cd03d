"""Charts as SVG: ticks are round, spikes survive thinning, text is escaped."""

from __future__ import annotations

import re

import pytest

from mvar.reporting.charts import BUCKETS, Chart, Line, Mark, figure, short, svg, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (2.7, 6.2, [2, 3, 4, 5, 6, 7]),
        (0, 3e-5, [0, 1e-5, 2e-5, 3e-5]),
        (5, 5, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high * 0.999 and len(found) <= 8
    if low != high:
        assert found == pytest.approx(expected)


def test_a_spike_of_one_step_in_a_hundred_thousand_is_drawn() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[61_234] = (61_234.0, 9.0)
    text = svg(Chart("loss", "", [Line("a", points, "red")]))
    heights = {float(y) for y in re.findall(r"[ML]?[\d.]+ ([\d.]+)", re.search(r'class="line".*?d="([^"]*)"', text)[1])}  # type: ignore[index]
    assert len(heights) == 2 and text.count("L") < 2 * BUCKETS + 10


def test_titles_labels_and_marks_are_escaped() -> None:
    bad = '"><script>'
    chart = Chart(bad, bad, [Line(bad, [(0, 1), (1, 2)], "red", dots=True)], [Mark(1, bad)], [Mark(1, bad)], bad)
    assert "<script" not in figure(chart) and figure(chart).count("&lt;script&gt;") >= 6


def test_one_point_draws_and_no_point_draws_nothing() -> None:
    assert "<circle" in figure(Chart("a", "", [Line("a", [(3, 0.0)], "red", dots=True)]))
    assert figure(Chart("a", "", [Line("a", [], "red")])) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00005, "5e-05"), (1234, "1,234"), (12_800, "12.8 k"), (2.5e6, "2.5 M"), (-3, "-3")]
)
def test_numbers_for_axes_are_short(value: float, text: str) -> None:
    assert short(value) == text
