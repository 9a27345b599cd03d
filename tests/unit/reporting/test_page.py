"""One page of a run: everything that is there, nothing that is not, and no word of a file becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mvar.errors import MvarError
from mvar.report import main as report
from mvar.reporting.facts import facts_of
from mvar.reporting.page import SHEETS, page
from tests.unit.reporting.runs import lines, picture, tokenizer_run, transformer_run


def _sections(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def _titles(text: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", text)


def test_a_transformers_page_has_curves_scales_figures_samples_restarts_and_what_it_ran_on(tmp_path: Path) -> None:
    text = page(facts_of(transformer_run(tmp_path / "run")))
    assert _sections(text) == [
        *("Curves", "By scale", "Figures of samples", "Samples over time", "Restarts and stops"),
        *("Configuration", "Environment"),
    ]
    assert {"Loss", "Gradient norm", "Learning rate", "Speed", "Loss by scale", "Frechet distance"} <= {*_titles(text)}
    assert "KID" not in _titles(text) and "PSNR" not in _titles(text)
    for told in ("FID, 500 images, cfg 1.5", "c0ffee", "2 x GPU", "node-7, job 41", "a loss was not finite", "resumed"):
        assert told in text, told
    assert "<td>killed</td>" in text and "(exit code 75)</td>" in text


def test_a_tokenizers_page_has_its_own_curves_and_both_kinds_of_reconstructions(tmp_path: Path) -> None:
    text = page(facts_of(tokenizer_run(tmp_path / "run")))
    assert {"PSNR", "SSIM", "Terms of the loss", "Words in use by scale"} <= {*_titles(text)}
    assert {"Reconstructions over time", "Reconstructions"} <= {*_sections(text)} and text.count("<img") == 2
    assert "Not in this run: figures of samples, restarts and stops, environment." in text


@pytest.mark.parametrize("only", ["config.yaml", "metrics.jsonl", "history.jsonl"])
def test_any_one_file_of_a_run_makes_a_page(tmp_path: Path, only: str) -> None:
    run = transformer_run(tmp_path / "run")
    for path in [*run.glob("*.*"), *run.glob("samples/*")]:
        if path.name != only:
            path.unlink()
    text = page(facts_of(run))
    assert ("Curves" in _sections(text)) == (only == "metrics.jsonl")
    assert ("Configuration" in _sections(text)) == (only == "config.yaml")
    assert ("Restarts and stops" in _sections(text)) == (only != "config.yaml")


def test_no_text_of_a_file_becomes_markup_and_nothing_is_asked_for(tmp_path: Path) -> None:
    text = page(facts_of(transformer_run(tmp_path / "run")))
    assert text.count("&lt;script&gt;") == 2  # In the configuration, and as a reason.
    assert "<script" not in text and "default-src 'none'" in text
    sources = re.findall(
        r"\b(?:src|href)=[\"']?([^\"'>]*)", re.sub(r"<pre>.*?</pre>|<td>.*?</td>", "", text, flags=re.S)
    )
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "url(" not in text and "@import" not in text


def test_damaged_records_and_pictures_are_passed_over_and_named(tmp_path: Path) -> None:
    run = transformer_run(tmp_path / "run")
    (run / "samples" / "step-000000151.png").write_bytes(b"no picture")
    strange = [
        {"kind": "train"},
        {"kind": "train", "samples": "x", "loss": {}},
        {"kind": "val", "samples": 9, "loss": "?"},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("garbage\n" + "".join(json.dumps(one) + "\n" for one in strange))
        file.write('{"kind": "train", "step": 151, "samples": 1208, "loss": NaN, "loss_per_scale": null}\n[1]\n')
    text = page(facts_of(run))
    assert "step 151: cannot be read" in text and text.count("<img") == 1
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()


def test_of_many_grids_some_are_shown_the_newest_first(tmp_path: Path) -> None:
    run = transformer_run(tmp_path / "run")
    for step in range(1, 40):
        picture(run / "samples" / f"step-{step:09d}.png")
    shown = re.findall(r'alt="step (\d+)', page(facts_of(run)))
    assert len(shown) == SHEETS and shown[0] == "150" and shown[-1] == "1"


def test_the_command_writes_the_page_beside_the_run_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = transformer_run(tmp_path / "run")
    assert report([str(run), "--html"]) == 0 and (run / "report.html").read_text().startswith("<!doctype html>")
    assert report([str(run), "--html", str(tmp_path / "elsewhere.html")]) == 0 and not (run / "curves.png").exists()
    assert "elsewhere.html" in capsys.readouterr().out
    with pytest.raises(MvarError, match="give one of them"):
        report([str(run), "--html", "--out", "x.png"])


def test_a_folder_that_is_no_run_is_an_error_and_gets_no_page(tmp_path: Path) -> None:
    with pytest.raises(MvarError, match="is no run folder"):
        report([str(tmp_path), "--html"])
    with pytest.raises(MvarError, match="not found"):
        report([str(tmp_path / "none"), "--html"])
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_history_tells_where_it_was_resumed(tmp_path: Path) -> None:
    lines(tmp_path / "run" / "metrics.jsonl", [{"kind": "resume", "step": 59, "samples": 472, "world": 16}])
    text = page(facts_of(tmp_path / "run"))
    assert _sections(text) == ["Restarts and stops"] and "<td>16</td>" in text
