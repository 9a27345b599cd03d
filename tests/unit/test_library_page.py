"""docs/library.md does what it says: its commands and its blocks of Python, in their order, in one folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from mvar import VQVAE
from mvar.checkpoint.published import published_state_dict, write_published
from mvar.cli import main
from mvar.run.names import folder_of
from mvar.tokenizer.files import save_tokenizer
from tests.golden import REPOSITORY
from tests.unit.checkpoint.test_weights import configuration, model_of, write_checkpoint

_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = REPOSITORY / "docs/library.md"


def commands(block: str) -> list[list[str]]:
    """The words of each command of ours in a block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mvar ")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page takes for given: a run, its tokenizer, names of its classes, figures, two published files."""
    config = configuration(num_classes=10, patch_nums=(1, 2, 4))
    write_checkpoint(folder_of(tmp_path / "runs/digits/checkpoints", 7), config, {"weight": model_of(config)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqvae = VQVAE(32, 4, 16, (1, 2, 4), channel_mult=(1, 1), res_blocks=1)
    save_tokenizer(tmp_path / "tokenizer.safetensors", vqvae)
    (tmp_path / "names.txt").write_text("\n".join("0123456789"))
    (tmp_path / "figures.json").write_text(json.dumps({"name": "evaluate", "figures": {"fid": 3.0}, "context": {}}))
    write_published(tmp_path / "d16.pth", published_state_dict(model_of(config)))
    torch.save(vqvae.state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs(workplace: Path) -> None:
    ran: dict[str, int] = {"bash": 0, "python": 0}
    known: dict[str, Any] = {}
    for kind, block in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), known)
            ran["python"] += 1
        for words in commands(block) if kind == "bash" else []:
            assert main(words) == 0, words
            ran["bash"] += 1
    assert ran == {"bash": 4, "python": 5}
    assert known["drawn"].seeds == (10, 11, 12, 13) and len(known["sheet"]) == 10
    assert known["pixels_BCHW"].shape == (1, 3, 8, 8) and known["again"].size == known["images"][0].size == (8, 8)
    assert known["pictures_BCHW"].shape == (2, 3, 8, 8) and known["codes_BL"].shape == (2, 21)
    for folder in ("digits", "copy", "d16"):
        assert (workplace / "models" / folder / "README.md").is_file()
    assert (workplace / "samples/0007/00000.png").is_file()
