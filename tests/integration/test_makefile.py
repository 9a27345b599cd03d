"""`make setup` on a machine whose .venv was left half-made, with stand-ins for Python: nothing is installed here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.golden import REPOSITORY

PYTHON = """#!/bin/sh
# python3: `-m venv DIR` makes one, whole or (without the package python3-venv) half.
case "$*" in "-m venv "*) ;; *) exit 9 ;; esac
mkdir -p "$3/bin"
printf '#!/bin/sh\\n[ "$2" = pip ] && [ -x "${0%%/*}/pip" ]\\n' >"$3/bin/python"
chmod +x "$3/bin/python"
if [ -e without-venv ]; then exit 1; fi
printf '#!/bin/sh\\necho "pip $*" >>pip.log\\n' >"$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def setup(clone: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "setup", "PYTHON=./python"], cwd=clone, capture_output=True, text=True, check=False)


def test_a_half_made_venv_is_made_anew_with_a_message(clone: Path) -> None:
    (clone / "without-venv").touch()
    done = setup(clone)
    assert done.returncode != 0 and "apt-get install python3-venv" in done.stderr
    assert (clone / ".venv/bin/python").exists()  # What Debian leaves.
    (clone / "without-venv").unlink()  # The package was installed.
    done = setup(clone)
    assert done.returncode == 0, done.stderr
    assert ".venv is half-made" in done.stdout and (clone / ".venv/.ready").exists()


def test_a_whole_venv_is_kept(clone: Path) -> None:
    assert setup(clone).returncode == 0
    (clone / ".venv/mine").touch()
    (clone / ".venv/.ready").unlink()
    done = setup(clone)
    assert done.returncode == 0 and "half-made" not in done.stdout and (clone / ".venv/mine").exists()
