"""How OpenMP's idle threads wait, in mvar's own commands: asleep.

OpenMP reads this once, when torch is loaded. By default idle threads spin for milliseconds at every barrier: that makes
small tensors up to a hundred times slower as soon as anything else (another rank, image decoding) wants the cores. A
program that uses mvar as a library keeps its own choice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence

PACKAGES = ("mvar", "data_prep")


def sleep_when_idle(environ: MutableMapping[str, str] = os.environ) -> None:
    """For this process, if torch is not loaded yet, and for those that it starts."""
    environ.setdefault("OMP_WAIT_POLICY", "passive")


def is_own_command(argv: Sequence[str], words: Sequence[str]) -> bool:
    """Whether Python is about to run a module of ours, as in `python -m mvar.train`. `argv`, `words`: sys.argv and
    sys.orig_argv. While Python looks for the module, and loads its package, argv begins with -m."""
    if argv[:1] != ["-m"] or "-m" not in words[:-1]:
        return False
    return words[words.index("-m") + 1].partition(".")[0] in PACKAGES


def sleep_when_idle_in_own_commands() -> None:
    """To be called when a package of ours is loaded, before torch is."""
    if is_own_command(sys.argv, sys.orig_argv):
        sleep_when_idle()
