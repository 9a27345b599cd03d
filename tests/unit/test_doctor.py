"""The command: one screen, one JSON object, and no harm to whoever asks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mvar import doctor
from mvar.cli import COMMANDS
from mvar.cli import main as mvar
from mvar.config import TrainConfig
from mvar.machine import packages
from mvar.machine.findings import Finding
from mvar.settings import load
from mvar.testing.ranks import free_port
from tests.golden import REPOSITORY

RECIPE = REPOSITORY / "recipes/d16.yaml"


@pytest.fixture(autouse=True)
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing them takes a while, and has tests of its own."""
    found = [Finding("some-kernel", "not installed", "missing", "pip install some-kernel")]
    monkeypatch.setattr(packages, "look", lambda _has_gpu: found)


def test_it_is_a_command_and_needs_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert "doctor" in COMMANDS
    assert mvar(["doctor"]) == 0
    said = capsys.readouterr().out
    for section in ("machine", "GPUs", "packages", "compilers", "caches"):
        assert f"\n{section}\n" in f"\n{said}"
    assert "- some-kernel" in said and said.splitlines()[-1].endswith("missing (-)")
    assert "pip install some-kernel" not in said
    assert max(map(len, said.splitlines())) <= 120


def test_a_recipe_a_run_folder_and_what_would_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = tmp_path / "doctor.json", tmp_path / "run"
    assert mvar(["doctor", "--config", str(RECIPE), f"run={run}", "--fix", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    assert {"arithmetic", "attention", "mamba", "compile"} <= {line["name"] for line in found["what is chosen"]}
    assert {"atomic rename", "hard links", "flock", "fsync"} <= {line["name"] for line in found["run folder"]}
    assert "pip install some-kernel" in said
    assert not run.exists()


def test_choices_that_kill_their_process_are_one_bad_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(TrainConfig, RECIPE, doctor.PLACEHOLDERS)
    real = subprocess.run
    for code, told in (("import os; os.abort()", "exit code -6"), ("raise RuntimeError('no kernels')", "no kernels")):

        def instead(_command: list[str], code: str = code, **options: Any) -> Any:
            return real([sys.executable, "-c", code], **options)

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", instead)
            (found,) = doctor.chosen(config)
        assert found.state == "bad" and told in found.text


def test_a_backend_that_cannot_be_had_is_named() -> None:
    config = load(TrainConfig, RECIPE, [*doctor.PLACEHOLDERS, "model.attention_backend=flash"])
    (found,) = doctor.chosen(config)
    assert found.state == "bad" and "flash" in found.text


def test_wrong_recipes_are_a_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert mvar(["doctor", "--config", "nowhere.yaml"]) == 2
    assert mvar(["doctor", "--config", str(RECIPE), "engine.precisoin=bf16"]) == 2
    assert "precision" in capsys.readouterr().err
    assert mvar(["doctor", "engine.precision=bf16"]) == 2
    assert "--config" in capsys.readouterr().err


def test_ranks_measure_what_is_between_them(tmp_path: Path) -> None:
    """Two ranks, as a launcher starts them; only the first speaks."""
    environ = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "mvar.doctor", "--json", str(tmp_path / "found.json")]
    ranks = [
        subprocess.Popen(
            command, cwd=REPOSITORY, env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0] and not said[1]
    found = json.loads((tmp_path / "found.json").read_text())["between ranks"]
    assert "2 ranks over gloo" in next(line["text"] for line in found if line["name"] == "all-reduce 64 MiB")
