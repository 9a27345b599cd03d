"""`pip wheel .`: what is built is whole, and every command works from it, far from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from mvar import shipped
from mvar.cli import COMMANDS
from mvar.testing.tiny_pairs import write_pair
from tests.golden import REPOSITORY

PACKAGES = ("mvar", "data_prep")


@dataclass(frozen=True)
class Installed:
    """A wheel, and an environment that has it: beside the test environment's packages, without its checkout."""

    wheel: Path
    binaries: Path
    folder: Path
    """Empty at first; commands run here."""

    def run(self, program: str, *arguments: str, code: int = 0, **environ: str) -> str:
        """What a program of the environment prints."""
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MVAR_HOME")} | environ
        env["PATH"] = f"{self.binaries}:{env['PATH']}"
        command = [str(self.binaries / program), *arguments]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source, binaries = folder / "source", folder / "venv" / "bin"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in (*PACKAGES, *shipped.FOLDERS):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "slurm" / "site.env").write_text("export SBATCH_ACCOUNT=secret\n")
    (source / "build/lib/mvar").mkdir(parents=True)
    (source / "build/lib/mvar/old.py").touch()  # What a build of another version left.
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")

    venv.create(folder / "venv", with_pip=False)
    python = str(binaries / "python")
    subprocess.run([*pip, "-q", "--python", python, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    # As a path alone: the .pth files there, one of which leads to the checkout, are not read.
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "test-environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    return Installed(wheel, binaries, folder / "empty")


def test_the_wheel_is_whole_and_holds_nothing_else(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    code = {path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")}
    data = {path for folder in shipped.FOLDERS for path in (REPOSITORY / folder).iterdir() if path.name != "site.env"}
    expected = {path.relative_to(REPOSITORY).as_posix() for path in code}
    expected |= {f"mvar/{shipped.IN_WHEEL}/{path.relative_to(REPOSITORY).as_posix()}" for path in data}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert installed.wheel.name.startswith("mvar_imagegen-")  # The index's `mvar` is somebody else's.


def test_every_command_explains_itself(installed: Installed) -> None:
    assert all(name in installed.run("mvar", "--help") for name in COMMANDS)
    # In one process, since each start imports torch.
    code = """
import contextlib, io, sys, mvar
from mvar.cli import COMMANDS, main
assert mvar.__file__.startswith(sys.prefix), mvar.__file__
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            code = main([name, "--help"])
        except SystemExit as stop:
            code = stop.code
    print(name, code or 0, name in said.getvalue())
"""
    assert installed.run("python", "-c", code).splitlines() == [f"{name} 0 True" for name in COMMANDS]
    assert "begin --config FILE" in installed.run("python", "-m", "mvar.cluster.chain", "--help")


def test_recipes_are_found_by_name(installed: Installed) -> None:
    words = [
        "train",
        "--dry-run",
        "--config",
        "d16.yaml",
        "run=run",
        "data.store=codes",
        "--pretend-world",
        "8",
        "engine.ds_config=zero1.json",
    ]
    said = installed.run("mvar", *words)
    assert "464,157,184 parameters" in said and "768 = 8 ranks" in said
    assert "zero2" in installed.run("mvar", "plan", "--config", "recipes/d16.yaml", "--gpu", "h100-80gb")
    assert list(installed.folder.iterdir()) == []


WITHOUT_DEEPSPEED = """
import sys, mvar
assert mvar.__file__.startswith(sys.prefix), mvar.__file__
sys.modules["deepspeed"] = None
pipe = mvar.MVARPipeline.from_pretrained(sys.argv[1])
print([image.size for image in pipe([0, 1], guidance=1.0, seeds=[0, 1]).images])
"""


def test_a_hub_folder_loads_from_the_wheel_without_deepspeed(installed: Installed, tmp_path: Path) -> None:
    words = [*write_pair(tmp_path), "--to", "hub", str(tmp_path / "hub"), "--license", "mit"]
    assert "wrote" in installed.run("mvar", "export", *words)
    assert installed.run("python", "-c", WITHOUT_DEEPSPEED, str(tmp_path / "hub")).strip() == "[(8, 8), (8, 8)]"


def test_jobs_are_submitted_without_a_checkout(installed: Installed, tmp_path: Path) -> None:
    """The scripts are copied out; a run's snapshot holds what it needs, and is found by what runs from it."""
    assert installed.run("mvar", "slurm-scripts", str(tmp_path)).strip() == str(tmp_path / "slurm")
    assert "is there already" in installed.run("mvar", "slurm-scripts", str(tmp_path), code=2)
    words = ["--images", "i", "--tokenizer", "t", "--config", "d16.yaml", "--out", "o", "--dry-run"]
    done = subprocess.run([tmp_path / "slurm/pipeline.sh", *words], capture_output=True, text=True, check=True)
    assert f"{tmp_path}/slurm/train.sbatch --config d16.yaml" in done.stdout

    run, job = tmp_path / "run", {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    words = ["-m", "mvar.cluster.chain", "begin", "--config", "d16.yaml", f"run={run}", "data.store=codes"]
    installed.run("python", *words, **job)
    kept = run / "snapshot" / "code"
    for name in ("mvar/train.py", "data_prep/tokenize.py", "recipes/d16.yaml", "slurm/common.sh"):
        assert (kept / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert not (kept / "mvar" / shipped.IN_WHEEL).exists()
    code = "import mvar.shipped as s; print(s.INSTALLED, s.find('recipes', s.Path('d16.yaml')))"
    assert installed.run("python", "-c", code, PYTHONPATH=str(kept)).strip() == f"False {kept}/recipes/d16.yaml"
