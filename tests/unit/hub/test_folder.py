"""A hub folder: what is written, what is refused, and that it is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mvar import MVAR, VQVAE, MvarError
from mvar.checkpoint.weights import load_weights
from mvar.errors import CheckpointError, TokenizerError, WriteError
from mvar.export import main as export
from mvar.files.shapes import differing
from mvar.tokenizer.files import load_tokenizer
from tests.unit.hub.conftest import NAMES, arguments

FIGURES = {
    "name": "evaluate",
    "figures": {"fid": 3.0712, "fid_error": 0.02, "fid_floor": 1.5, "precision": 0.84},
    "goals": {},
    "context": {"samples_path": "samples"},
}


def front_matter(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_folder_holds_everything_and_any_reader_reads_it(hub: Path, pair: Path) -> None:
    names = {path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()}
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert names == shards | {
        "README.md",
        "config.json",
        "model.safetensors.index.json",
        "preprocessing.json",
        "tokenizer/config.json",
        "tokenizer/model.safetensors",
    }
    expected = load_weights(pair / "model.safetensors")[1]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(hub / file)[name], expected[name])
    config = json.loads((hub / "config.json").read_text())
    assert config["model"]["depth"] == 2 and config["model"]["patch_nums"] == [1, 2, 4]
    assert "attention_backend" not in config["model"]
    assert (config["precision"], config["license"], config["sampling"]["cfg"]) == ("bf16", "mit", 0.5)
    preprocessing = json.loads((hub / "preprocessing.json").read_text())
    assert preprocessing["image_size"] == 8 and preprocessing["value_range"] == [-1.0, 1.0]
    assert tuple(preprocessing["classes"]) == NAMES
    assert json.loads((hub / "tokenizer/config.json").read_text())["geometry"]["vocab_size"] == 32


def test_model_and_tokenizer_come_back_bit_for_bit(hub: Path, pair: Path, tmp_path: Path) -> None:
    expected, tensors = load_weights(pair / "model.safetensors")[1], load_tokenizer(pair / "tokenizer.safetensors")
    model, tokenizer = MVAR.from_pretrained(hub), VQVAE.from_pretrained(str(hub))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for found in (model, MVAR.from_pretrained(tmp_path / "model"), MVAR.from_pretrained(pair / "model.safetensors")):
        assert not found.training and found.heads == 2
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    for place in (hub, hub / "tokenizer", tmp_path / "tokenizer", pair / "tokenizer.safetensors"):
        found = VQVAE.from_pretrained(place)
        assert found.geometry == tokenizer.geometry
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in tensors.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_the_card_says_what_is_known_and_what_is_not(hub: Path, pair: Path, tmp_path: Path) -> None:
    card = (hub / "README.md").read_text()
    assert front_matter(card)["license"] == "mit" and "## License\n\nmit" in card
    assert "## Figures" not in card and "samples.png" not in card
    (tmp_path / "figures.json").write_text(json.dumps(FIGURES))
    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "sheet.jpg")
    more = ["--figures", str(tmp_path / "figures.json"), "--grid", str(tmp_path / "sheet.jpg")]
    assert export(arguments(pair, tmp_path / "out", *more)) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert front_matter(card)["license"] == "unknown" and "Not stated" in card
    assert "| fid | 3.071 | 0.02 | 1.5 |" in card and "| precision | 0.84 |  |  |" in card
    assert json.loads((tmp_path / "out/figures.json").read_text()) == FIGURES
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == FIGURES
    assert "![samples" in card and Image.open(tmp_path / "out/samples.png").size == (4, 3)
    parameters = sum(value.numel() for value in MVAR.from_pretrained(tmp_path / "out").parameters())
    assert f"| parameters | {parameters:,} |" in card


def test_the_code_of_the_card_runs(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(hub, tmp_path / hub.name)
    monkeypatch.chdir(tmp_path)
    exec((hub / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert Image.open(tmp_path / "sample.png").size == (8, 8)


def test_the_grid_is_drawn_where_it_is_asked_for(pair: Path, tmp_path: Path) -> None:
    assert export(arguments(pair, tmp_path / "out", "--grid", "draw")) == 0
    picture = np.asarray(Image.open(tmp_path / "out/samples.png"))
    assert picture.shape == (4 * 10 - 2, 8 * 10 - 2, 3)  # Classes down, eight images across, two pixels between.
    assert picture[:8, :8].std() > 0


def test_a_missing_license_is_said(pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export(arguments(pair, tmp_path / "out"))
    assert "no --license" in caplog.text


def test_a_hub_folder_goes_on_to_another_one_with_all_it_knows(hub: Path, tmp_path: Path) -> None:
    words = ["--weights", str(hub), "--tokenizer", str(hub / "tokenizer/model.safetensors"), "--to", "hub"]
    assert export([*words, "--dtype", "bf16", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again/preprocessing.json").read_text())
    assert again == json.loads((hub / "preprocessing.json").read_text())
    value = MVAR.from_pretrained(hub).head.weight
    assert torch.equal(MVAR.from_pretrained(tmp_path / "again").head.weight, value.bfloat16().float())


def test_only_a_hub_folder_is_replaced(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for license in ("mit", "apache-2.0"):  # An empty folder, then an older export.
        assert export(arguments(pair, out, "--license", license)) == 0
    assert json.loads((out / "config.json").read_text())["license"] == "apache-2.0"
    (out / ".git").mkdir()
    with pytest.raises(CheckpointError, match=r"holds \.git, which is not of a hub folder"):
        export(arguments(pair, out))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/README.md").write_text("mine")
    for place in ("own", "own/README.md"):
        with pytest.raises(CheckpointError, match="exists and"):
            export(arguments(pair, tmp_path / place))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own"]
    assert (tmp_path / "own/README.md").read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert export(arguments(pair, out, "--license", "mit")) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    real, left = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(left) >= 3:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        export(arguments(pair, out, "--license", "apache-2.0"))
    with pytest.raises(WriteError, match="No space left"):
        export(arguments(pair, tmp_path / "new"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--license", "my own licence"], "expected an identifier"),
        (["--figures", "names.txt"], "cannot be read as JSON"),
        (["--figures", "other.json"], "holds no figures"),
        (["--grid", "nowhere.png"], r"nowhere\.png"),
        (["--grid", "names.txt"], r"names\.txt"),
        (["--class-names", "three.txt"], "3 names, but the model has 4 classes"),
        (["--cfg", "1,2"], "a table of 2 values, but the model has 3 scales"),
        (["--out", "twice"], "required, once"),
    ],
)
def test_wrong_use_is_explained_and_writes_nothing(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str
) -> None:
    shutil.copy(pair / "names.txt", tmp_path)
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "other.json").write_text('{"name": "evaluate", "figures": {"fid": "good"}}')
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MvarError, match=words):
        export(arguments(pair, tmp_path / "out", *more))
    assert sorted(tmp_path.iterdir()) == before


def test_options_of_a_hub_folder_are_refused_elsewhere(pair: Path, tmp_path: Path) -> None:
    weights = ["--weights", str(pair / "model.safetensors")]
    with pytest.raises(MvarError, match="--tokenizer is missing"):
        export([*weights, "--to", "hub", str(tmp_path / "out")])
    with pytest.raises(MvarError, match="writes a folder"):
        export([*weights, "--to", "hub", "--tokenizer", "t", str(tmp_path / "w.pth")])
    for flag in ("--tokenizer", "--license", "--class-names"):
        with pytest.raises(MvarError, match=rf"^{flag}: .* Use --to hub"):
            export([*weights, flag, "t", "--out", str(tmp_path / "w.safetensors")])


def damaged(hub: Path, tmp_path: Path, file: str, text: str | None) -> Path:
    """A copy of a hub folder with another file, or without it."""
    copy = tmp_path / "copy"
    shutil.copytree(hub, copy)
    (copy / file).unlink()
    if text is not None:
        (copy / file).write_text(text)
    return copy


def changed(hub: Path, file: str, **keys: Any) -> str:
    return json.dumps(json.loads((hub / file).read_text()) | keys)


def test_a_damaged_folder_says_which_file_and_why(hub: Path, tmp_path: Path) -> None:
    shard = min(path.name for path in hub.glob("model-*"))
    depth = json.loads((hub / "config.json").read_text())["model"] | {"depth": 3}
    cases: list[tuple[str, str | None, str]] = [
        ("config.json", "{", r"config\.json: cannot be read as JSON"),
        ("config.json", '{"model_type": "gpt2"}', r"config\.json: not what .* writes: model"),
        ("config.json", changed(hub, "config.json", format="other"), r"config\.json: .* format"),
        ("config.json", changed(hub, "config.json", format_version=9), "format version 9, this program reads 1"),
        ("config.json", changed(hub, "config.json", model=depth), r"model\.depth is 3, but .* 2"),
        (shard, "x", "cannot be read as safetensors"),
        (shard, None, "cannot be read as safetensors"),
    ]
    for file, text, words in cases:
        with pytest.raises(CheckpointError, match=words):
            MVAR.from_pretrained(damaged(hub, tmp_path, file, text))
        shutil.rmtree(tmp_path / "copy")
    for file, text, words in [
        ("tokenizer/model.safetensors", "x", "damaged"),
        ("tokenizer/config.json", None, "holds no tokenizer"),
    ]:
        with pytest.raises(TokenizerError, match=words):
            VQVAE.from_pretrained(damaged(hub, tmp_path, file, text))
        shutil.rmtree(tmp_path / "copy")
    geometry = json.loads((hub / "tokenizer/config.json").read_text())["geometry"] | {"vocab_size": 16}
    text = changed(hub, "tokenizer/config.json", geometry=geometry)
    with pytest.raises(TokenizerError, match="vocab_size is 32, expected 16"):
        VQVAE.from_pretrained(damaged(hub, tmp_path, "tokenizer/config.json", text))


def test_an_index_that_points_elsewhere_is_refused(hub: Path, tmp_path: Path) -> None:
    tree = json.loads((hub / "model.safetensors.index.json").read_text())
    tree["weight_map"]["head.weight"] = "../other/model.safetensors"
    copy = damaged(hub, tmp_path, "model.safetensors.index.json", json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"\.\./other.*outside"):
        MVAR.from_pretrained(copy)


def test_differences_are_named_and_counted() -> None:
    assert differing({"a": (1, 2)}, {"a": [1, 2]}) is None
    told = differing({"a": (1,), "x": (1,)}, {"a": (2,), "b": (1,), "c": (1,)})
    assert told == "b: missing; c: missing; x: not expected; and 1 more"
