"""A small model with its tokenizer, as files and as a hub folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvar.export import main as export
from mvar.testing.tiny_pairs import write_pair

NAMES = ("cat", "dog", "7", "cat fish")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors, tokenizer.safetensors, names.txt."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, precision="bf16")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def arguments(pair: Path, out: Path, *more: str) -> list[str]:
    files = ["--weights", str(pair / "model.safetensors"), "--tokenizer", str(pair / "tokenizer.safetensors")]
    return [*files, "--to", "hub", str(out), "--class-names", str(pair / "names.txt"), *more]


@pytest.fixture(scope="session")
def hub(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several files of weights, options of its own; not to be changed."""
    out = tmp_path_factory.mktemp("hub") / "pets"
    assert export(arguments(pair, out, "--license", "mit", "--cfg", "0.5", "--top-k", "20", "--shard-gb", "1e-4")) == 0
    return out
