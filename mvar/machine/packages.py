"""Packages that mvar can use, imported in processes of their own: a crashing extension takes only its process down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mvar.machine.findings import Finding, State

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements-gpu.txt"
IMPORT_WITHIN_S = 120.0
_TRY = """
import importlib, importlib.metadata, json, sys
module, package = sys.argv[1:]
try:
    found = importlib.import_module(module)
except BaseException as error:
    lines = str(error).strip().splitlines() or ["no message"]
    print("\\n" + json.dumps({"problem": f"{type(error).__name__}: {lines[0]}"}))
    raise SystemExit
try:
    version = importlib.metadata.version(package)
except importlib.metadata.PackageNotFoundError:
    version = getattr(sys.modules[module.partition(".")[0]], "__version__", "version unknown")
print("\\n" + json.dumps({"version": str(version)}))
"""


@dataclass(frozen=True)
class Package:
    """`module`: what has to be importable. `gives`: what mvar lacks without it."""

    name: str
    module: str
    gives: str
    needs_gpu: bool = True
    """Only of use where there is a GPU."""
    fix: str = ""
    """How to install it; empty: pip, as the requirements files name it."""


KERNELS = "pip install --no-build-isolation"
PACKAGES = (
    Package("triton", "triton", "our kernels and mamba-ssm's: engine.compile, model.mamba_backend=triton"),
    Package("causal-conv1d", "causal_conv1d", "model.mamba_backend=mamba_ssm", fix=KERNELS),
    Package("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "model.mamba_backend=mamba_ssm", fix=KERNELS),
    Package("flash-attn", "flash_attn", "model.attention_backend=flash (torch has an own kernel)", fix=KERNELS),
    Package("apex", "apex.optimizers", "optim.impl=apex", fix="# apex: see requirements-gpu.txt"),
    Package("deepspeed", "deepspeed", "training", needs_gpu=False),
    Package("webdataset", "webdataset", "stores at URLs", needs_gpu=False),
    Package("wandb", "wandb", "tracking.wandb", needs_gpu=False),
    Package("tensorboard", "tensorboard", "tracking.tensorboard", needs_gpu=False),
)


def attempt(module: str, package: str) -> subprocess.Popen[str]:
    """Start to import a module in a process of its own."""
    environ = os.environ | {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _TRY, module, package]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ)


def outcome(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Version and problem of what `attempt` started: one of them is empty."""
    try:
        output, _ = process.communicate(timeout=IMPORT_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", f"its import takes longer than {IMPORT_WITHIN_S:.0f} s"
    if process.returncode < 0:
        return "", f"its import ends the process with {signal.Signals(-process.returncode).name}"
    try:
        said = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return "", f"its import ends the process with exit code {process.returncode}"
    return said.get("version", ""), said.get("problem", "")


def look(has_gpu: bool, asked: Sequence[Package] = PACKAGES) -> list[Finding]:
    """All packages, imported side by side."""
    started = [(package, attempt(package.module, package.name)) for package in asked]
    found = []
    for package, process in started:
        version, problem = outcome(process)
        if not problem:
            found.append(Finding(package.name, version))
            continue
        # One that is installed and cannot be imported is a fault; one that is not installed is a choice.
        absent = f"ModuleNotFoundError: No module named {package.module.partition('.')[0]!r}" == problem
        wanted = has_gpu or not package.needs_gpu
        state: State = "bad" if wanted and not absent else "missing"
        text = f"{'not installed' if absent else problem} (for {package.gives})"
        found.append(Finding(package.name, text, state, install_command(package) if wanted else ""))
    return found


def install_command(package: Package) -> str:
    """How to install it in the version that is tested, where a requirements file names one."""
    if package.fix.startswith("#"):
        return package.fix
    return f"{package.fix or 'pip install'} '{pinned(package.name)}'"


def pinned(name: str) -> str:
    """The requirement as a requirements file has it, else the bare name."""
    for path in (REQUIREMENTS, REQUIREMENTS.with_name("requirements.txt")):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            requirement = line.partition("#")[0].strip()
            if requirement and requirement.replace("_", "-").startswith(name):
                return requirement
    return name
