"""RUN/snapshot: what a chain runs is what it was begun with, whatever becomes of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mvar.cluster import snapshot
from mvar.config import TrainConfig
from mvar.errors import MvarError
from mvar.settings import load
from mvar.testing.code_stores import make_store
from mvar.testing.tiny_runs import settings

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that may be edited, with a code store in it and a recipe that names everything relatively."""
    folder = tmp_path_factory.mktemp("snapshot") / "checkout"
    for package in snapshot.PACKAGES:
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    make_store(folder / "codes")
    tree = settings(folder, folder / "codes")
    tree["data"] = {"store": "codes", "tokenizer": "codes/tokenizer.safetensors"}
    tree["engine"]["ds_config"] = "ds_configs/zero1.json"
    tree.pop("run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder


def python(folder: Path, code: Path, *arguments: str | Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Python in `folder` with `code` first on its path, as a job of a chain starts it."""
    environ = os.environ | {"PYTHONPATH": str(code)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr + done.stdout
    return done


def test_a_chain_runs_what_it_was_begun_with(checkout: Path, tmp_path: Path) -> None:
    """Taken from a checkout, which is then edited: the run's own code trains with the run's own configuration."""
    checkout = Path(shutil.copytree(checkout, tmp_path / "checkout"))
    run, command = tmp_path / "my run", ["-m", "mvar.cluster.snapshot", tmp_path / "my run", "--config", "recipe.yaml"]
    done = python(checkout, checkout, *command, "seed=7")
    assert done.stdout == f"{run}/snapshot\n" and not done.stderr
    before = (run / "snapshot/config.yaml").read_bytes()

    (checkout / "mvar/train.py").write_text("raise SystemExit('edited')")
    (checkout / "ds_configs/zero1.json").write_text("{")
    code = run / "snapshot" / "code"
    where = python(tmp_path, code, "-c", "import mvar, data_prep; print(mvar.__file__, data_prep.__file__, sep='\\n')")
    assert where.stdout.splitlines() == [str(code / name / "__init__.py") for name in ("mvar", "data_prep")]
    dry = python(code, code, "-m", "mvar.train", "--config", "../config.yaml", "--dry-run")
    assert "dry run" in dry.stdout and "ZeRO stage 1" in dry.stdout

    again = python(checkout, checkout, *command, "seed=8")  # Says what it does not take over.
    assert again.stdout == done.stdout
    assert "2 files of the code" in again.stderr and "seed: 7 in the snapshot, 8 given" in again.stderr
    assert "zero1.json" in again.stderr and "--resnapshot" in again.stderr
    assert (run / "snapshot/config.yaml").read_bytes() == before
    (checkout / "recipe.yaml").unlink()
    assert "recipe.yaml" in python(checkout, checkout, *command).stderr  # Nor does this stop the chain.


def test_the_snapshot_says_where_it_comes_from(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    folder = snapshot.take(tmp_path / "run", load(TrainConfig, Path("recipe.yaml"), ["run=elsewhere"]))
    record = snapshot.verify(tmp_path / "run")
    assert record["source"] == str(REPOSITORY) and record["versions"]["torch"]
    assert record["replaces"] is None
    assert {"code/mvar/train.py", "code/ds_configs/zero2.json", "code/recipes/d16.yaml"} <= record["files"].keys()
    assert not [name for name in record["files"] if "__pycache__" in name]
    kept = load(TrainConfig, folder / "config.yaml")
    assert (kept.run, kept.data.store) == (tmp_path / "run", str(checkout / "codes"))
    assert kept.data.tokenizer == checkout / "codes/tokenizer.safetensors"
    assert kept.engine.ds_config.read_bytes() == (checkout / "ds_configs/zero1.json").read_bytes()
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["snapshot"]


def test_resnapshot_keeps_the_old_one_beside(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    run = tmp_path / "run"
    assert snapshot.main([str(run), "--config", "recipe.yaml"]) == 0
    assert snapshot.main([str(run), "--resnapshot", "seed=9"]) == 0  # The kept configuration, changed.
    assert snapshot.main([str(run), "--resnapshot", "--config", "recipe.yaml", "seed=10"]) == 0
    seeds = [load(TrainConfig, run / name / "config.yaml").seed for name in ("snapshot-1", "snapshot-2", "snapshot")]
    assert seeds == [3, 9, 10]
    assert snapshot.verify(run)["replaces"] == "snapshot-2"


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "record", "config", "emptied", "moved"])
def test_damage_is_named_and_resnapshot_mends_it(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(checkout)
    run = tmp_path / "run"
    folder = snapshot.take(run, load(TrainConfig, Path("recipe.yaml"), ["run=r"]))
    (folder / "code/mvar/__pycache__").mkdir()
    (folder / "code/mvar/__pycache__/train.pyc").touch()  # What running leaves there is no damage.
    snapshot.verify(run)
    if damage == "changed":
        (folder / "code/mvar/train.py").write_text("edited")
    elif damage == "missing":
        (folder / "code/ds_configs/zero1.json").unlink()
    elif damage == "added":
        (folder / "code/mvar/torch.py").touch()
    elif damage == "record":
        tree = json.loads((folder / "snapshot.json").read_text())
        (folder / "snapshot.json").write_text(json.dumps(tree | {"files": {}}))
    elif damage == "config":
        (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("seed: 3", "seed: 4"))
    elif damage == "emptied":
        (folder / "snapshot.json").write_bytes(b"")
    else:
        run = run.rename(tmp_path / "other")
    with pytest.raises(MvarError, match="--resnapshot"):
        snapshot.main([str(run), "--config", "recipe.yaml"])
    assert snapshot.main([str(run), "--config", "recipe.yaml", "--resnapshot"]) == 0
    snapshot.verify(run)


def test_nothing_half_made_stays(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "sync_folder", fail)
        with pytest.raises(MvarError, match="No space left"):
            snapshot.main([str(tmp_path / "run"), "--config", "recipe.yaml"])
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(MvarError, match="Give --config"):
        snapshot.main([str(tmp_path / "run")])
    assert snapshot.main([str(tmp_path / "run"), "--config", "recipe.yaml"]) == 0


def test_two_first_starts_at_once_agree(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    first, second = (load(TrainConfig, Path("recipe.yaml"), ["run=r", f"seed={seed}"]) for seed in (1, 2))
    snapshot.take(tmp_path / "run", first)
    snapshot.take(tmp_path / "run", second)  # Too late: what is there stays.
    assert load(TrainConfig, tmp_path / "run/snapshot/config.yaml").seed == 1


def test_no_torch_is_needed() -> None:
    probe = "import sys, mvar.cluster.snapshot; print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
