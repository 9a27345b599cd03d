"""What slurm/common.sh sets for every job, and what it leaves as it was set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvar.run.compiled_extensions import default_folder

ROOT = Path(__file__).resolve().parents[3]


def environment(folder: Path, command: str = "env", **given: str) -> dict[str, str]:
    """The variables that a command of a job sees; srun is played by a function that runs the task here."""
    environ = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "test", "SLURM_JOB_END_TIME": "1"}
    environ |= {"MVAR_HOME": str(ROOT), "MVAR_SITE": "/nowhere", "MVAR_PYTHON": sys.executable}
    environ |= {"MVAR_CACHE": str(folder / "cache")} | given
    script = 'srun() { shift; "$@"; }; . "$MVAR_HOME/slurm/common.sh"; launch -- ' + command
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_caches_are_on_the_nodes_own_disk_and_closed_to_others(tmp_path: Path) -> None:
    found = environment(tmp_path)
    cache = tmp_path / "cache"
    assert default_folder(found).parent == cache / "torch_extensions"
    assert found["TRITON_CACHE_DIR"] == str(cache / "triton")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "inductor")
    assert cache.stat().st_mode & 0o777 == 0o700
    kept = environment(tmp_path, TRITON_CACHE_DIR="/mine", MVAR_CACHE=str(tmp_path / "other"))
    assert kept["TRITON_CACHE_DIR"] == "/mine" and default_folder(kept).is_relative_to(tmp_path / "other")
    assert environment(tmp_path, TORCH_EXTENSIONS_DIR="/mine")["TORCH_EXTENSIONS_DIR"] == "/mine"


def test_a_cache_that_cannot_be_made_ends_the_task_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AssertionError, match=r"Set MVAR_CACHE in site\.env"):
        environment(tmp_path, MVAR_CACHE=str(tmp_path / "file" / "cache"))


OLD = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}
NEW = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_FR_BUFFER_SIZE": "2000"}


@pytest.mark.parametrize(
    ("version", "expected"), [("2.7.1+cu128", OLD), ("2.10.0", OLD), ("2.11.0", NEW), ("2.14.1", NEW), ("", NEW)]
)
def test_memory_grows_and_nccls_flight_recorder_is_on_by_the_names_of_the_torch_version(
    tmp_path: Path, version: str, expected: dict[str, str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\necho {version}\n")
    python.chmod(0o755)
    found = environment(tmp_path, MVAR_PYTHON=str(python))
    assert {key: value for key, value in found.items() if key in OLD | NEW} == expected
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


def test_what_a_site_has_set_stays_and_is_not_set_by_its_other_name(tmp_path: Path) -> None:
    given = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "TORCH_NCCL_TRACE_BUFFER_SIZE": "50"}
    found = environment(tmp_path, **given, TORCH_NCCL_DUMP_ON_TIMEOUT="0")
    assert {key: value for key, value in found.items() if key in OLD | NEW} == given
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
