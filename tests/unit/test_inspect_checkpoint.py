"""`mvar inspect-checkpoint`: what it prints is what is there, damage and differences are named, nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mvar.checkpoint.partition import KINDS
from mvar.errors import CheckpointError
from mvar.inspect_checkpoint import inspect, main, show
from mvar.run.names import folder_of
from mvar.testing.code_stores import make_store
from tests.unit.checkpoint.test_weights import configuration, model_of, write_checkpoint

CONFIG = configuration()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = model_of(CONFIG)
    for step in (6, 7):
        write_checkpoint(folder_of(tmp_path / "run/checkpoints", step), CONFIG, dict.fromkeys(KINDS, model))
    return tmp_path / "run"


def recipe(folder: Path, **changes: Any) -> Path:
    """The configuration that the checkpoints were written with, but for `changes`."""
    tree: dict[str, Any] = {"run": "r", "data": {"store": "s"}, "model": CONFIG.model_dump(mode="json")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def test_the_newest_checkpoint_of_a_run_on_one_screen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    parameters = sum(value.numel() for value in model_of(CONFIG).parameters())
    for words in (
        "step-000000007",
        "7, 56 images seen, 7 updates made",
        f"{parameters:,} parameters: depth 2, width 64, 1 heads, 5 classes, scales [1, 2, 4]",
        "weight, exp_avg, exp_avg_sq in float32",
        "3 ranks, ZeRO stage 2",
        "torch 2",
        "none damaged (sizes and digests)",
        "rank-00002.safetensors",
    ):
        assert words in text
    assert len(text.splitlines()) < 24 and all(len(line) < 160 for line in text.splitlines()[1:])
    assert sorted(run.rglob("*")) == before


def test_damaged_files_are_named_and_stay(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(run / "checkpoints", 7)
    files = sorted(folder.glob("rank-*"))
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(bytes(data))
    files[1].write_bytes(b"short")
    files[2].unlink()
    assert main([str(folder)]) == 1
    text = capsys.readouterr().out
    assert "3 damaged" in text and "its sha256 is not the one" in text
    assert "damaged, 5 bytes instead of" in text and "No such file" in text
    problems = [file.problem is None for file in inspect(folder, digests=False).files]
    assert problems == [True, False, False]  # A flipped bit shows in the digest only.
    assert main([str(folder_of(run / "checkpoints", 6))]) == 0


def test_a_damaged_record_is_an_error(run: Path, tmp_path: Path) -> None:
    record = folder_of(run / "checkpoints", 7) / "checkpoint.json"
    record.write_text(record.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: its own digest"):
        inspect(run)
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        inspect(tmp_path)


def test_what_keeps_a_configuration_from_resuming(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tmp_path)
    assert main([str(run), "--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert "nothing is in the way" in text and "not compared: data.store s: No such file" in text
    store = make_store(tmp_path / "store", patch_nums=(1, 2, 4), classes=3)
    recipe(tmp_path, data={"store": str(store)}, seed=4, model=CONFIG.model_dump(mode="json") | {"num_classes": None})
    assert main([str(run), "--config", str(config)]) == 1
    text = capsys.readouterr().out
    assert "refused, because of" in text and "not compared" not in text
    for words in ("seed: was 0, is 4", "model.num_classes: was 5, is 3", "data.store (its manifest): was 000000000000"):
        assert words in text


def test_json_has_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["step"], tree["samples"], tree["usable"], tree["others"]) == (7, 56, True, [6])
    assert len(tree["files"]) == 3 and tree["differences"] is None


def test_many_files_do_not_fill_the_screen(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step-000000001", CONFIG, {"weight": model_of(CONFIG)}, ranks=20)
    (folder / "rank-00019.safetensors").unlink()
    lines = show(inspect(folder)).splitlines()
    assert len(lines) < 30
    assert "rank-00019.safetensors" in lines[9]  # What is wrong comes first.
    assert any("8 more" in line for line in lines)
