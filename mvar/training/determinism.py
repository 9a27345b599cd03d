"""`engine.deterministic`: one switch for everything that would let two runs on GPUs differ.

On a CPU runs are the same to the bit anyway. On GPUs they are not: kernels add with atomics in whatever order threads
come, autotuners choose by a race, libraries pick algorithms by the memory that happens to be free. Most of these
decisions are read from the environment before the first use, so the switch comes before everything else.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

import torch
import torch.utils.deterministic

from mvar.errors import ConfigError

SETTINGS: dict[str, tuple[str, ...]] = {
    # cuBLAS: a workspace of fixed size for each stream, so that split sums are always split alike.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NCCL: one fixed order of sums; it would choose between algorithms by speed, and let switches add as they can.
    "NCCL_ALGO": ("Ring", "Tree"),
    "MAMBA_DETERMINISTIC": ("1",),
    "CAUSAL_CONV1D_DETERMINISTIC": ("1",),
    # Triton: what the autotuner chose once, it takes again (and mamba-ssm then tunes instead of taking the smallest).
    "TRITON_CACHE_AUTOTUNING": ("1",),
    # torch.compile: no kernel is chosen by timing.
    "TORCHINDUCTOR_DETERMINISTIC": ("1",),
}
"""Variable -> values that fit; the first one is set where there is none."""

READ_AT_IMPORT = ("mamba_ssm", "causal_conv1d")
"""Packages that decide at their import."""


def make_deterministic(environ: MutableMapping[str, str]) -> None:
    """Set what this process needs, before anything runs on a GPU.

    Raises ConfigError where a variable says otherwise, or where a package has already read it.
    """
    for name, fitting in SETTINGS.items():
        given = environ.setdefault(name, fitting[0])
        if given not in fitting:
            raise ConfigError(
                f"engine.deterministic=true: the environment sets {name}={given}, expected {' or '.join(fitting)}."
                " Unset it, or set engine.deterministic=false."
            )
    early = [name for name in READ_AT_IMPORT if name in sys.modules]
    if early:
        raise ConfigError(
            f"engine.deterministic=true: {' and '.join(early)} came before it, with other settings. Import mvar.train"
            " before them, or set MAMBA_DETERMINISTIC=1 and CAUSAL_CONV1D_DETERMINISTIC=1 in the environment and"
            " engine.deterministic=false."
        )
    # Strictly: an operation that has no deterministic form is an error, and flash attention's backward pass takes its
    # deterministic form only so (warn_only=True would leave it as it is).
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that nobody wrote: filling it first would cost a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
