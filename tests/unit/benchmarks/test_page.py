"""The page of results says what was measured, where, and what is not of one piece."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.harness import Report
from benchmarks.parts import PARTS


def report(folder: Path, name: str) -> Path:
    made = Report(name)
    seconds = {"ours": [1.0, 2.0, 1.0], "plain": [2.0, 5.0, 1.5]}
    made.compare("tokens_vs_baseline_fp32_b8", seconds, "plain", ">= 2.1")
    made.add("peak_share_fp32_b8", 0.7, ">= 0.7")
    path = folder / f"{name}.json"
    made.finish(argparse.Namespace(json=path, depth=12, batch=[2, 8], threads=None))
    return path


@pytest.mark.parametrize(
    ("value", "goal", "reached"),
    [
        (1.6, ">= 1.6", True),
        (1.59, ">= 1.6", False),
        (0.15, "< 0.15", False),
        (1.05, "<= 1.05", True),
        (31, "> 30", True),
        (0.94, "0.95 to 1.05", False),
        (1.0, "0.95 to 1.05", True),
    ],
)
def test_a_goal_is_met_or_not(value: float, goal: str, reached: bool) -> None:
    assert page.met(value, goal) is reached


def test_a_figure_stands_beside_its_spread_and_goal_and_what_it_was_measured_at(tmp_path: Path) -> None:
    report(tmp_path, "train_step")
    text = page.text_of(tmp_path)
    assert "| tokens_vs_baseline_fp32_b8 | 2 | 1.5 to 2.5 | 3 | >= 2.1 | **no** |" in text
    assert "| peak_share_fp32_b8 | 0.7 |  |  | >= 0.7 | yes |" in text
    assert "depth 12, batch 2 8" in text


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "There are no results" in page.text_of(tmp_path)
    report(tmp_path, "train_step")
    (line,) = [line for line in page.text_of(tmp_path).splitlines() if line.startswith("**Missing**")]
    assert all((part.name in line) is (part.name != "train_step") for part in PARTS)


def test_a_result_of_another_commit_is_named(tmp_path: Path) -> None:
    report(tmp_path, "sample")
    old = report(tmp_path, "train_step")
    tree = json.loads(old.read_text())
    tree["context"] |= {"commit": "0000000", "when": "2020-01-01T00:00:00+00:00"}
    old.write_text(json.dumps(tree))
    (line,) = [line for line in page.text_of(tmp_path).splitlines() if line.startswith("**Of another run**")]
    assert "train_step (commit 0000000)" in line


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    report(tmp_path, "train_step")
    page.write(tmp_path)
    assert (tmp_path / page.PLOT).read_bytes().startswith(b"\x89PNG")
