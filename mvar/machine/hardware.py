"""GPUs, cores, memory, compilers: what this machine has, and what of it this process may use."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from pathlib import Path

import torch

from mvar.cgroups import affinity, cpu_quota, memory_limit
from mvar.machine.findings import Finding
from mvar.plan.gpus import recognise

GIB = 2**30
ANSWER_WITHIN_S = 30.0
COMPILERS = {
    "nvcc": (True, "building causal-conv1d and flash-attn; DeepSpeed's own optimizers", "# nvcc: CUDA toolkit"),
    "g++": (False, "engine.compile on CPUs, DeepSpeed's own optimizers", "apt-get install g++"),
    "ninja": (False, "building extensions", "pip install ninja"),
}
"""Name -> whether only GPUs need it, what it is for, how to get it."""


def said_by(command: list[str]) -> str | None:
    """What a command prints; None if it fails, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def look_at_gpus() -> list[Finding]:
    """One line a GPU, as nvidia-smi and torch see them."""
    query = "index,name,memory.total,memory.used,driver_version,mig.mode.current,compute_mode"
    rows = said_by(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
    found = [_gpu(row) for row in (rows or "").splitlines()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}: sees {count} GPUs"
    if visible is not None:
        text += f" (CUDA_VISIBLE_DEVICES={visible!r})"
    hidden = bool(found) and not count and visible != ""
    found.append(Finding("torch", text, "bad" if hidden else "good"))
    if count and torch.distributed.is_nccl_available():
        found.append(Finding("nccl", ".".join(map(str, torch.cuda.nccl.version()))))
    return found


def _gpu(row: str) -> Finding:
    index, name, total, used, driver, mig, mode = ([part.strip() for part in row.split(",")] + [""] * 7)[:7]
    known = recognise(name)
    text = f"{name}, {total} MiB ({used} used), driver {driver}"
    if known is not None:
        text += f", {known.bf16_tflops} TFLOP/s bf16 by its data sheet"
    if mig == "Enabled":
        text += "; divided by MIG: each slice counts as a GPU"
    if mode not in ("Default", ""):
        text += f"; compute mode {mode}"
    return Finding(f"GPU {index}", text if known is not None else f"{text}; mvar does not know it: give peak_tflops")


def look_at_host() -> list[Finding]:
    """Cores and memory, and what the job may have of them."""
    may, quota = len(affinity()), cpu_quota()
    text = f"{may} of {os.cpu_count()} may be used" + (f", {quota:g} cores' time of them" if quota is not None else "")
    found = [
        Finding("python", f"{platform.python_version()} on {platform.node()}, {platform.platform()}"),
        Finding("cores", text),
    ]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    text = f"{total / GIB:.0f} GiB" + (f", the job may have {limit / GIB:.1f}" if limit else "")
    found.append(Finding("memory", text))
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    found.append(Finding("/dev/shm", f"{shm / GIB:.1f} GiB", "good" if shm >= GIB else "bad"))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    found.append(Finding("locked memory", "unlimited" if unlimited else f"{locked / 2**20:.0f} MiB (ulimit -l)"))
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found.append(Finding("open files", f"{files} (up to {most})", "good" if files >= 1024 else "bad", ""))
    return found


def look_at_compilers(has_gpu: bool) -> list[Finding]:
    found = []
    for name, (for_gpus, purpose, fix) in COMPILERS.items():
        path = shutil.which(name)
        version = said_by([path, "--version"]) if path else None
        if path and version is not None:
            number = re.search(r"\d+\.\d+(\.\d+)?", version)
            found.append(Finding(name, f"{number[0] if number else '?'} at {path}"))
        else:
            wanted = has_gpu or not for_gpus
            found.append(Finding(name, f"no (for {purpose})", "missing", fix if wanted else ""))
    return found
