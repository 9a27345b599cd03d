"""mvar: train and run M-VAR (arXiv 2411.10433).

`from mvar import MVAR, VQVAE, generate` is the library's whole face. Names load on first use, so `import mvar` alone
needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mvar.version import __version__

# OpenMP reads this when torch is loaded. By default idle threads spin for milliseconds at every barrier, which makes
# small tensors up to a hundred times slower as soon as anything else (another rank, image decoding) wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = ["MVAR", "VQVAE", "MvarError", "__version__", "generate"]

if TYPE_CHECKING:
    from mvar.errors import MvarError
    from mvar.model.transformer import MVAR
    from mvar.sampling.sampler import generate
    from mvar.tokenizer.vqvae import VQVAE

_HOMES = {
    "MVAR": "mvar.model.transformer",
    "VQVAE": "mvar.tokenizer.vqvae",
    "generate": "mvar.sampling.sampler",
    "MvarError": "mvar.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mvar' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
