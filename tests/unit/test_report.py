"""Curves from metrics.jsonl, whatever state a run is in."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mvar.errors import MvarError
from mvar.report import main as report
from mvar.report import read_metrics
from mvar.reporting.records import read_evaluations


def _record(kind: str, step: int) -> dict[str, object]:
    scales = [1.0 / (step + 1), 2.0 / (step + 1)]
    return {
        "kind": kind, "step": step, "samples": 8 * step, "loss": 3.0 / (step + 1), "loss_per_scale": scales,
        "accuracy": 0.1, "accuracy_per_scale": [0.1, 0.1], "lr": 1e-3,
    }  # fmt: skip


def _write(run: Path, records: list[dict[str, object]], tail: str = "") -> None:
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def test_curves_are_drawn_with_and_without_validation(tmp_path: Path) -> None:
    steps = [_record("train", step) for step in range(1, 30)]
    _write(tmp_path / "a", [{"kind": "resume", "step": 0, "samples": 0}, *steps])
    _write(tmp_path / "b", [*steps, _record("val", 29)])
    for run in ("a", "b"):
        assert report([str(tmp_path / run)]) == 0
        with Image.open(tmp_path / run / "curves.png") as picture:
            assert picture.size[0] > 800 and len(picture.convert("L").getcolors(1 << 16) or []) > 20


def test_a_skipped_step_without_a_loss_leaves_a_gap_only(tmp_path: Path) -> None:
    bad = _record("train", 2) | {"loss": None, "accuracy": None, "loss_per_scale": [None, None]}
    _write(tmp_path / "a", [_record("train", 1), bad, _record("train", 3)])
    assert report([str(tmp_path / "a")]) == 0


def test_a_torn_last_line_is_passed_over_and_a_damaged_one_named(tmp_path: Path) -> None:
    _write(tmp_path / "a", [_record("train", 1)], tail='{"kind": "tr')
    assert len(read_metrics(tmp_path / "a/metrics.jsonl")) == 1
    _write(tmp_path / "b", [_record("train", 1)], tail="garbage\n" + json.dumps(_record("train", 2)) + "\n")
    with pytest.raises(MvarError, match="line 2"):
        read_metrics(tmp_path / "b/metrics.jsonl")


def test_an_empty_run_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "a", [])
    with pytest.raises(MvarError, match="nothing to draw"):
        report([str(tmp_path / "a")])
    with pytest.raises(MvarError, match="no such file"):
        report([str(tmp_path / "none")])


def test_distances_of_samples_stand_beside_the_curves(tmp_path: Path) -> None:
    _write(tmp_path / "a", [_record("train", step) for step in range(1, 30)])
    lines = [
        {"step": s, "images": 500, "fid": 9.0 - s / 10, "fid_error": 0.2, "fid_floor": 2.0, "kid": 0.01}
        for s in (10, 20)
    ]
    lines += [{"step": 40, "images": 500, "kid": 0.02}, {"step": 5, "images": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "fi'
    (tmp_path / "a/evaluations.jsonl").write_text(text)
    found = read_evaluations(tmp_path / "a", read_metrics(tmp_path / "a/metrics.jsonl"))
    per_step = _record("train", 10)["samples"] // 10  # type: ignore[operator]
    assert [(one["step"], one["samples"]) for one in found] == [(s, s * per_step) for s in (10, 20, 40)]
    assert report([str(tmp_path / "a")]) == 0
    with Image.open(tmp_path / "a/curves.png") as picture:
        assert picture.size[1] > 1000
