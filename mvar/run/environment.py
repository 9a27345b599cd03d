"""What a process runs on and from which code: for the records that people read later."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

from mvar import shipped
from mvar.version import __version__

_DISTRIBUTIONS = ("torch", "deepspeed", "numpy", "pydantic", "safetensors")


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on, as far as they are installed."""
    found = {"python": platform.python_version(), "mvar": __version__}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git(paths: Sequence[str] = ()) -> dict[str, Any]:
    """Commit of the checkout, and whether its `paths` (default: all) differ from it; None where git cannot tell.

    Of an installed wheel too: a repository around it is somebody else's.
    """

    def ask(*words: str) -> str | None:
        if shipped.INSTALLED:
            return None
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(["git", "-C", str(shipped.CODE), *words], capture_output=True, text=True, timeout=20)
            return done.stdout.strip() if done.returncode == 0 else None
        return None

    commit = ask("rev-parse", "HEAD")
    changes = ask("status", "--porcelain", "--", *paths) if commit else None
    return {"commit": commit, "uncommitted_changes": None if changes is None else bool(changes)}


def environment(device: str) -> dict[str, Any]:
    """All of it, as plain JSON. `device`: what it computes on, in words."""
    return {"versions": versions(), "system": platform.platform(), "device": device, **git(("mvar", "data_prep"))}
