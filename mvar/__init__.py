"""mvar: train and run M-VAR (arXiv 2411.10433).

The library's whole face: `from mvar import MVAR, VQVAE, MVARPipeline, edit, generate`. Names load on first use, so
`import mvar` alone needs neither torch nor DeepSpeed, and changes nothing of the program around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mvar.omp import sleep_when_idle_in_own_commands
from mvar.version import __version__

sleep_when_idle_in_own_commands()

__all__ = ["MVAR", "VQVAE", "MVARPipeline", "MvarError", "SamplingOptions", "__version__", "edit", "generate"]

if TYPE_CHECKING:
    from mvar.errors import MvarError
    from mvar.model.transformer import MVAR
    from mvar.sampling.editing import edit
    from mvar.sampling.options import SamplingOptions
    from mvar.sampling.pipeline import MVARPipeline
    from mvar.sampling.sampler import generate
    from mvar.tokenizer.vqvae import VQVAE

_HOMES = {
    "MVAR": "mvar.model.transformer",
    "VQVAE": "mvar.tokenizer.vqvae",
    "MVARPipeline": "mvar.sampling.pipeline",
    "SamplingOptions": "mvar.sampling.options",
    "edit": "mvar.sampling.editing",
    "generate": "mvar.sampling.sampler",
    "MvarError": "mvar.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mvar' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
