"""A whole run leaves a page of what it measured, also when a benchmark fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as run
from benchmarks import page
from benchmarks.parts import Machine, Part

WORKS = Part("roofline", "roofline", "--tiny --rounds 1", 1)
FAILS = Part("sample", "sample", "--no-such-option", 1)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(Machine, "measure", lambda: Machine(100.0, 200.0, 16.0))
    for module in (run, page):
        monkeypatch.setattr(module, "PARTS", (WORKS, FAILS))
    return tmp_path


def test_a_failed_benchmark_leaves_no_old_result_and_the_page_says_so(results: Path) -> None:
    (results / "sample.json").write_text("{}")
    assert run.main([]) == 1
    text = (results / "README.md").read_text()
    assert "**Missing**, because they failed or were not run: sample." in text
    assert "| memory_gib_s |" in text
    whole = json.loads((results / "run.json").read_text())
    assert whole["context"]["failed"] == ["sample"]
    assert f"| the whole run | {whole['figures']['minutes']:.1f} minutes (goal <= 30: yes)" in text


def test_one_by_name_is_no_whole_run(results: Path) -> None:
    assert run.main(["roofline"]) == 0
    assert (results / "roofline.json").exists()
    assert not (results / "run.json").exists()


def test_an_unknown_name_is_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["nonsense"])
    assert ended.value.code == 2
    assert "there are: roofline, sample" in capsys.readouterr().err
