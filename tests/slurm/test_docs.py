"""docs/slurm.md, executed: its commands, one after the other, on a real cluster."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mvar.testing.extractors import write_extractor
from mvar.testing.tiny_runs import losses, records, write_config
from tests.slurm.harness import HERE, PATIENCE_S, ROOT, Cluster, explained, steps_done, train_log, until
from tests.stores import LATENT, PATCH_NUMS, VOCAB, image_folder, tiny_tokenizer

pytestmark = pytest.mark.slurm

SBATCH = """#!/bin/bash
exec "$REAL_SBATCH" --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --time=10 "$@"
"""
STEPS = 240


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "slurm.md").read_text(), re.DOTALL | re.MULTILINE)


def checkout(folder: Path) -> Path:
    """A folder that looks like the project's to a user who submits, with tiny recipes and data. Jobs are made small."""
    (folder / "slurm").mkdir(parents=True)
    for path in (ROOT / "slurm").iterdir():
        (folder / "slurm" / path.name).symlink_to(path)
    geometry = {"patch_nums": PATCH_NUMS, "vocab_size": VOCAB, "latent_channels": LATENT}
    config = write_config(
        folder,
        folder / "codes",
        stage=1,
        max_steps=STEPS,
        epochs=100,
        checkpoint__every_steps=100,
        checkpoint__takeover_s=9,
        tracking__validate_every=0,
        **{f"model__{key}": value for key, value in geometry.items()},
    )
    (folder / "recipes").mkdir()
    config.rename(folder / "recipes" / "d16.yaml")
    (folder / "recipes" / "tokenize.yaml").write_text("{shard_samples: 6, batch: 6, val_fraction: 0.3, threads: 1}")
    image_folder(folder / "imagenet", per_class=12)
    tiny_tokenizer(folder / "vae.safetensors")
    write_extractor(folder / "inception-2015-12-05.pt")
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text(SBATCH)
    (folder / "bin" / "sbatch").chmod(0o755)
    return folder


def test_the_commands_of_the_documentation(cluster: Cluster, tmp_path: Path) -> None:
    folder = checkout(tmp_path / "project")
    run = folder / "runs" / "d16"
    environ = {
        "PATH": f"{folder}/bin:{cluster.environ['PATH']}",
        "REAL_SBATCH": str(shutil.which("sbatch")),
        "MVAR_LAUNCH": str(HERE / "paced.sh"),
        "TEST_PAUSE_S": "0.1",
    }
    said: dict[str, str] = {}
    variables = folder / "variables"
    variables.touch()
    with explained(run):
        for block in blocks():
            before = steps_done(run)
            script = f"set -euo pipefail\n. {variables}\n{block}\ndeclare -p job >{variables} 2>/dev/null || true\n"
            said[block] = cluster.run("bash", "-c", script, cwd=folder, **environ)
            settle(cluster, run, block, before)
        logs = {path.name: path.read_text() for path in folder.glob("*.log")}
        states = [line for line in cluster.run("scontrol", "-o", "show", "job").splitlines() if str(folder) in line]
        assert not [line for line in states if "JobState=FAILED" in line], logs
        assert (run / "FINISHED").exists() and len(losses(run)) == STEPS
    assert [record["world"] for record in records(run, "resume")] == [2, 1, 1]
    assert "stopped by the STOP file" in train_log(run) and "got SIGUSR1" in train_log(run)
    (watched,) = [text for block, text in said.items() if "mvar status" in block]
    assert "rank-000.log" in watched and "goodput" in watched and "step " in watched
    assert (folder / "sheet.png").exists() and (folder / "grid.png").exists() and (folder / "figures.json").exists()


def settle(cluster: Cluster, run: Path, block: str, before: int) -> None:
    """Between two blocks a user waits: for a training to get somewhere or to stop, for other jobs to end."""

    def queue() -> str:
        return cluster.run("squeue", "-h", "-o", "%j %T")

    if "train.sbatch" in block:
        until(lambda: steps_done(run) >= before + 10, PATIENCE_S, cluster.tail)
    elif "squeue" not in block:
        until(lambda: not queue(), PATIENCE_S, cluster.tail)
