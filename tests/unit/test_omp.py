"""`import mvar` leaves the host program's environment alone; mvar's own commands let idle threads sleep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvar.omp import is_own_command
from tests.golden import REPOSITORY

SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def environment_of(*words: str, **more: str) -> dict[str, str]:
    """What a Python that is started with `words` has in its environment at its end."""
    environ = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environ["PYTHONPATH"] = os.pathsep.join([*more.pop("path", "").split(), str(REPOSITORY)])
    environ |= more
    done = subprocess.run([sys.executable, *words], env=environ, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_import_mvar_changes_nothing_of_its_host_program() -> None:
    bare = environment_of("-c", SHOW)
    assert environment_of("-c", f"import mvar, data_prep\n{SHOW}") == bare
    assert environment_of("-c", f"from mvar import MVAR, VQVAE, generate\n{SHOW}", DS_ACCELERATOR="cpu") == bare | {
        "DS_ACCELERATOR": "cpu"
    }


def test_a_command_of_mvars_lets_idle_threads_sleep_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host/__init__.py").write_text("import mvar\n")
    (tmp_path / "host/show.py").write_text(f"{SHOW}\n")
    assert "OMP_WAIT_POLICY" not in environment_of("-m", "host.show", path=str(tmp_path))
    show = f"import atexit; atexit.register(lambda: exec({SHOW!r}))"
    (tmp_path / "sitecustomize.py").write_text(f"{show}\n")
    for words in (("-u", "-m", "mvar.cli"), ("-m", "data_prep.calibrate")):
        assert environment_of(*words, path=str(tmp_path))["OMP_WAIT_POLICY"] == "passive"
    assert environment_of("-m", "mvar.cli", path=str(tmp_path), OMP_WAIT_POLICY="active")["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize(
    ("argv", "words", "own"),
    [
        (["-m"], ["python", "-m", "mvar.train", "--config", "x"], True),
        (["-m"], ["python", "-u", "-m", "data_prep.tokenize"], True),
        (["-m"], ["python", "-m", "mvarious"], False),
        (["train.py"], ["python", "train.py", "-m", "mvar.train"], False),
        (["-c"], ["python", "-c", "import mvar"], False),
        (["-m"], ["python", "-mmvar.train"], False),
        ([], [], False),
    ],
)
def test_what_counts_as_a_command(argv: list[str], words: list[str], own: bool) -> None:
    assert is_own_command(argv, words) is own
