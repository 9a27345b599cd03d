"""From a name to files: a path, or a repository through huggingface_hub, which may be missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from mvar import MVARPipeline
from mvar.errors import BackendError, CheckpointError
from mvar.hub.place import local


def library(monkeypatch: pytest.MonkeyPatch, folder: Path | Exception) -> list[tuple[str, str | None, list[str]]]:
    """A huggingface_hub that gives `folder`; returns what it is asked for."""
    asked: list[tuple[str, str | None, list[str]]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: Iterable[str]) -> str:
        asked.append((name, revision, list(allow_patterns)))
        if isinstance(folder, Exception):
            raise folder
        return str(folder)

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_a_path_is_itself_and_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path))
    assert local(tmp_path) == local("$MODELS") == tmp_path
    for place in (tmp_path / "a/b", str(tmp_path / "a/b"), "nothing"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            local(place)


def test_a_repository_is_asked_for_the_files_of_the_layout_alone(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = library(monkeypatch, hub)
    pipe = MVARPipeline.from_pretrained("somebody/pets", revision="v1", device="cpu")
    assert len(pipe("dog").images) == 1
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("somebody/pets", "v1")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)


def test_a_folder_of_that_name_comes_first(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = library(monkeypatch, OSError("never"))
    monkeypatch.chdir(hub.parent.parent)
    assert local(f"{hub.parent.name}/pets").name == "pets" and asked == []


def test_what_the_library_cannot_get_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, OSError("404: no\n such repository"))
    with pytest.raises(CheckpointError, match=r"a/b: .*\(404: no such repository\)"):
        local("a/b")


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match="pip install huggingface_hub"):
        local("runs/d16")


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed")
def test_the_real_library_finds_what_is_in_its_cache(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "models--somebody--pets"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    (cache / "snapshots").mkdir()
    (cache / "snapshots/abc").symlink_to(hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local("somebody/pets") == cache / "snapshots/abc"
    with pytest.raises(CheckpointError, match="no repository that could be read"):
        local("somebody/else")
