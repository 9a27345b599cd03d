"""Whose kernels compute Mamba-2 between its linear layers: mamba-ssm's, our own, or plain torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from mvar.config import MambaBackend
from mvar.errors import BackendError
from mvar.log import Chosen
from mvar.model.kernels import mamba_ssm
from mvar.model.kernels.launch import DTYPES
from mvar.model.kernels.optional import load


def _triton() -> Any:
    from mvar.model.kernels import mixer_triton

    return mixer_triton


_KERNELS: dict[str, Callable[[], Any]] = {"mamba_ssm": mamba_ssm.entry_points, "triton": _triton}
"""In the order in which `auto` tries them: what was measured comes first."""
_ADVICE = {
    "mamba_ssm": "Install mamba-ssm and causal-conv1d, built for CUDA, as requirements-gpu.txt says",
    "triton": "Install triton",
}


def require(backend: MambaBackend) -> None:
    """Raises BackendError, naming what to install, where kernels asked for by name cannot be imported."""
    if backend in _KERNELS:
        advice = f"{_ADVICE[backend]}, or use model.mamba_backend=torch."
        load(_KERNELS[backend]).require(f"model.mamba_backend={backend}", advice)


@lru_cache(maxsize=64)
def choose(backend: MambaBackend, dtype: torch.dtype, device: torch.device, tf32: bool) -> Chosen:
    """The kernels for a projection of that kind; `tf32`: whether float32 products may run in TF32.

    Raises BackendError where kernels are asked for by name that cannot run there.
    """
    if backend == "torch":
        return Chosen("mamba", "torch")
    if backend != "auto":
        if unfit := _unfit(backend, dtype, device):
            raise BackendError(f"model.mamba_backend={backend}: {unfit}. Use model.mamba_backend=torch or auto.")
        require(backend)
        return Chosen("mamba", backend)
    problems: list[str] = []
    for name, importer in _KERNELS.items():
        problem = _unfit(name, dtype, device)
        if not problem and name == "mamba_ssm" and dtype == torch.float32 and not tf32:
            problem = "mamba-ssm's scan multiplies float32 in TF32"
        if not problem and (missing := load(importer).problem):
            problem = f"{name}'s kernels cannot be imported ({missing})"
        if not problem:
            return Chosen("mamba", name, " and ".join(problems))
        problems.append(problem)
    return Chosen("mamba", "torch", " and ".join(dict.fromkeys(problems)), slow=device.type == "cuda")


def _unfit(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why kernels cannot take such tensors; empty if they can."""
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return f"the kernels need a CUDA device, and tensors are on {device}"
    if dtype not in DTYPES:
        return f"there are no kernels for {dtype}".replace("torch.", "")
    if name == "triton" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"our own kernels need compute capability 8.0, and {device} has less"
    return ""
