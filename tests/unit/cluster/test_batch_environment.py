"""What slurm/common.sh sets for every job, what it leaves as it was, and what no job takes over from another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mvar.run.compiled_extensions import default_folder

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(
    [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch"), *ROOT.glob("tests/slurm/**/*.sh")]
)


def environment(folder: Path, command: str = "env", **given: str) -> dict[str, str]:
    """The variables that a command of a job sees; srun is played by a function that runs the task here."""
    environ = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "test"}
    environ |= {"MVAR_HOME": str(ROOT), "MVAR_SITE": "/nowhere", "MVAR_PYTHON": sys.executable}
    environ |= {"MVAR_CACHE": str(folder / "cache")} | given
    script = 'set -u; srun() { shift; "$@"; }; . "$MVAR_HOME/slurm/common.sh"; launch -- ' + command
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


# ---- jobs that were submitted from inside of another one

INHERITED = dict.fromkeys(
    (
        *("SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST", "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_VERBOSE"),
        *("SLURM_MEM_BIND_TYPE", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_GPU", "SLURM_EXACT"),
        *("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_GPUS", "SLURM_SRUN_COMM_HOST"),
    ),
    "3",
)
OTHER_JOB = {
    "SLURM_ARRAY_JOB_ID": "3",
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_ARRAY_TASK_MAX": "5",
    "SLURM_RESTART_COUNT": "4",
    "SLURM_JOB_START_TIME": "900",
    "SLURM_JOB_END_TIME": "1000",
}
SAYS = "JobId={} {}JobName=x Restarts={} StartTime=2030-01-01T00:00:00 EndTime=2030-01-01T01:00:00 Deadline=N/A"


def slurm_says(folder: Path, *jobs: str) -> str:
    """A PATH on which scontrol knows these jobs."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(jobs) + "\nEND\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def test_how_another_job_was_bound_and_divided_is_not_taken_over(tmp_path: Path) -> None:
    path = slurm_says(tmp_path, SAYS.format(7, "", 0))
    found = environment(tmp_path, **INHERITED, **OTHER_JOB, PATH=path, SLURM_NTASKS="8", SLURM_MPI_TYPE="pmix")
    assert not INHERITED.keys() & found.keys()
    assert found["SLURM_NTASKS"] == "8" and found["SLURM_MPI_TYPE"] == "pmix", "the job's own"


def test_what_slurm_does_not_set_for_this_job_is_asked_of_slurm(tmp_path: Path) -> None:
    """It sets no array's variables outside of an array, no count of restarts at the first start, and older versions no
    times: those of the job it was submitted from would end a training at that job's end."""
    found = environment(tmp_path, "env", **OTHER_JOB, PATH=slurm_says(tmp_path, SAYS.format(7, "", 0)), TZ="UTC")
    assert not [name for name in found if name.startswith("SLURM_ARRAY")]
    assert found["SLURM_RESTART_COUNT"] == "0"
    assert (found["SLURM_JOB_START_TIME"], found["SLURM_JOB_END_TIME"]) == ("1893456000", "1893459600")


def test_a_job_without_a_limit_does_not_end_with_the_one_it_was_submitted_from(tmp_path: Path) -> None:
    unlimited = SAYS.format(7, "", 0).replace("EndTime=2030-01-01T01:00:00", "EndTime=Unknown")
    found = environment(tmp_path, **OTHER_JOB, PATH=slurm_says(tmp_path, unlimited), TZ="UTC")
    assert found["SLURM_JOB_START_TIME"] == "1893456000" and "SLURM_JOB_END_TIME" not in found


def test_a_task_of_an_array_keeps_its_numbers_and_finds_itself_among_the_others(tmp_path: Path) -> None:
    others = [SAYS.format(8, "ArrayJobId=7 ArrayTaskId=1 ", 1), SAYS.format(7, "ArrayJobId=7 ArrayTaskId=2 ", 3)]
    own = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "2"}
    found = environment(tmp_path, **own, PATH=slurm_says(tmp_path, *others))
    assert own.items() <= found.items() and found["SLURM_RESTART_COUNT"] == "3"


@pytest.mark.parametrize("said", [[], ["slurm_load_jobs error: Unable to contact slurm controller"]])
def test_where_slurm_is_silent_the_environment_counts(tmp_path: Path, said: list[str]) -> None:
    found = environment(tmp_path, **OTHER_JOB, PATH=slurm_says(tmp_path, *said))
    assert OTHER_JOB.items() <= found.items()


def test_a_pipeline_submits_nothing_of_the_job_that_it_was_started_in(tmp_path: Path) -> None:
    path = slurm_says(tmp_path)
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv >> {tmp_path}/seen\necho 42\n")
    sbatch.chmod(0o755)
    words = ["--images", "i", "--tokenizer", "t", "--config", "c", "--out", str(tmp_path / "out")]
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "one", "SBATCH_PARTITION": "gpu"}
    environ = {"PATH": path, "MVAR_SITE": "/nowhere", **INHERITED, **OTHER_JOB, "SLURM_HINT": "nomultithread", **kept}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "pipeline.sh"), *words], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text().splitlines()
    assert {line for line in seen if line.startswith(("SLURM", "SBATCH"))} == {f"{k}={v}" for k, v in kept.items()}


# ---- old shells


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_array_that_may_be_empty_is_expanded_as_bash_before_4_4_refuses(script: Path) -> None:
    """There, `set -u` takes an empty array for a variable that is not set: "${a[@]+"${a[@]}"}" is fine."""
    text = re.sub(r"\$\{share\[[@*]\]\}", "", script.read_text())  # Never empty.
    guarded = re.sub(r"\$\{(\w+)\[@\]\+\"\$\{\1\[@\]\}\"\}", "", text)
    assert not re.findall(r"\$\{\w+\[[@*]\][^}]*\}", guarded)


def test_scripts_ask_for_nothing_that_bash_4_2_lacks() -> None:
    for script in SCRIPTS:
        if "cluster" not in script.parts:
            assert not re.search(
                r"mapfile -d|readarray -d|wait -n|\$\{\w+@|local -n|declare -n|EPOCH", script.read_text()
            )
