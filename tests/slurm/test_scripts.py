"""The batch scripts themselves: what a shell and Slurm's own checks say of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mvar.config import TrainConfig
from mvar.ds_config import BatchSplit
from mvar.settings import load
from tests.slurm.harness import ROOT, Cluster

pytestmark = pytest.mark.slurm

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
NODES = {  # docs/slurm.md names these.
    "demo": 1,
    "emoji": 1,
    "d12": 1,
    "d16": 1,
    "d20": 2,
    "d24": 2,
    "d30": 4,
    "d32": 4,
    "d36s_512": 4,
}


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    shells = [*SCRIPTS, *(ROOT / "slurm").glob("*.sh"), *(ROOT / "tests" / "slurm").rglob("*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", "-x", *map(str, shells)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_options_stand_before_the_first_command(script: Path) -> None:
    """Slurm ignores later ones without a word."""
    lines = script.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert options and max(options) < min(commands)
    assert not re.search(r"--(partition|account|qos|constraint|reservation)\b", script.read_text())  # A site's own.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_slurm_accepts_each_script_as_it_is(cluster: Cluster, tmp_path: Path, script: Path) -> None:
    assert "to start at" in cluster.run("sbatch", "--test-only", script, cwd=tmp_path)


@pytest.mark.parametrize("recipe", NODES)
def test_slurm_accepts_the_request_of_each_recipe(cluster: Cluster, tmp_path: Path, recipe: str) -> None:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    script = ROOT / "slurm" / "train.sbatch"
    arguments = ["--config", path, f"run=runs/{recipe}", "data.store=codes"]
    said = cluster.run("sbatch", "--test-only", f"--nodes={NODES[recipe]}", script, *arguments, cwd=tmp_path)
    assert f"using {64 * NODES[recipe]} processors" in said
    config = load(TrainConfig, path, ["run=run", "data.store=codes"])
    split = BatchSplit.of(config.global_batch, 8 * NODES[recipe], config.engine.micro_batch)
    assert split.micro_batch * split.ranks * split.accumulation == config.global_batch
    assert f"| `{recipe}` | {NODES[recipe]} |" in (ROOT / "docs" / "slurm.md").read_text()


def test_every_recipe_of_a_training_is_named() -> None:
    trainings = {path.stem for path in (ROOT / "recipes").glob("*.yaml") if "global_batch:" in path.read_text()}
    assert trainings == set(NODES)


def test_a_job_says_in_its_log_what_its_node_has(cluster: Cluster, tmp_path: Path) -> None:
    """Also where the job itself goes wrong: that is when one wants to know."""
    job = cluster.sbatch(ROOT / "slurm" / "evaluate.sbatch", "--samples", "none", cwd=tmp_path, MVAR_DOCTOR="on")
    cluster.wait(job)
    log = next(tmp_path.glob(f"*{job}*.log")).read_text()
    assert "GPUs" in log and "compilers" in log and "cores" in log


INNER = """#!/bin/bash
#SBATCH --ntasks=2
#SBATCH --mem=100
#SBATCH --time=7
set -euo pipefail
. "$MVAR_HOME/slurm/common.sh"
echo "job $JOB, $((SLURM_JOB_END_TIME - $(date +%s))) s left"
launch -- bash -c 'echo "task $SLURM_PROCID of $SLURM_NTASKS"'
"""
OUTER = """#!/bin/bash
#SBATCH --ntasks=1
#SBATCH --mem-per-cpu=10
#SBATCH --array=3-3
#SBATCH --time=60
srun sbatch --parsable --wait --output=inner.log inner.sh >id
"""


def test_a_job_that_was_submitted_from_a_step_of_another_one_is_its_own(cluster: Cluster, tmp_path: Path) -> None:
    """Its memory is counted otherwise than that job's, whose array and end are not its own."""
    for name, text in (("inner.sh", INNER), ("outer.sh", OUTER)):
        (tmp_path / name).write_text(text)
    cluster.wait(cluster.sbatch(tmp_path / "outer.sh", cwd=tmp_path))
    said = (tmp_path / "inner.log").read_text()
    assert f"job {(tmp_path / 'id').read_text().strip()}, 4" in said, said
    assert sorted(line for line in said.splitlines() if line.startswith("task")) == ["task 0 of 2", "task 1 of 2"], said
