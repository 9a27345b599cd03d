"""`mvar scrub`: every byte that is kept is read, what is damaged is named, and nothing is changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mvar import scrub
from mvar.checkpoint.record import CheckpointRecord
from mvar.checkpoint.tensors import FileRecord
from mvar.cli import main as mvar
from mvar.files.disk import sha256_of
from mvar.testing.code_stores import make_store


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints with two files each."""
    for step in (10, 20, 30):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:09d}"
        folder.mkdir(parents=True)
        files = {}
        for name in ("rank-00000.safetensors", "config.yaml"):
            (folder / name).write_bytes(f"{name} {step}".encode() * 100)
            files[name] = FileRecord((folder / name).stat().st_size, sha256_of(folder / name))
        record: dict[str, Any] = {key: {} for key in ("config", "model", "shapes", "pieces", "versions")}
        known = {"format_version": 2, "progress": {"step": step}, "store": "", "world_size": 1, "zero_stage": 1}
        made = CheckpointRecord.model_validate(record | known | {"files": {n: vars(f) for n, f in files.items()}})
        (folder / "checkpoint.json").write_text(made.text())
    return tmp_path / "run"


def flip(path: Path, place: int = 50) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_in_order_is_read_whole_and_left_as_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "codes")
    before = tree(tmp_path)
    assert mvar(["scrub", str(run), str(store)]) == 0
    assert tree(tmp_path) == before
    said = capsys.readouterr().out
    assert "run: 6 files" in said and "codes: 4 files" in said and said.count("none damaged") == 2


def test_every_damaged_file_of_every_checkpoint_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, middle, newest = sorted((run / "checkpoints").iterdir())
    flip(old / "rank-00000.safetensors")
    (middle / "config.yaml").unlink()
    record = newest / "checkpoint.json"
    record.write_text(record.read_text().replace('"world_size": 1', '"world_size": 2'))
    assert mvar(["scrub", str(run), "--json", str(tmp_path / "found.json")]) == 1
    said = capsys.readouterr().out
    for path, problem in (
        (old / "rank-00000.safetensors", "its sha256 is not the one"),
        (middle / "config.yaml", "missing"),
        (newest / "checkpoint.json", "its own digest does not match"),
    ):
        assert any(line.startswith(f"{path}:") and problem in line for line in said.splitlines()), said
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert len(found["damaged"]) == 3 and found["files"] == 4


def test_damaged_shards_and_manifests_of_a_store_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "codes")
    flip(store / "train-000000.tar", place=700)
    assert mvar(["scrub", str(store)]) == 1
    assert f"{store / 'train-000000.tar'}: damaged" in capsys.readouterr().out
    (store / "manifest.json").write_text("{")
    assert mvar(["scrub", str(store)]) == 1


def test_a_checkpoint_that_retention_removes_meanwhile_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = min((run / "checkpoints").iterdir())
    monkeypatch.setattr(scrub, "forget", lambda path: shutil.rmtree(old, ignore_errors=True))
    assert mvar(["scrub", str(run)]) == 0


def test_a_folder_that_is_nothing_of_ours_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mvar(["scrub", str(tmp_path)]) == 2
    assert "neither a run" in capsys.readouterr().err
