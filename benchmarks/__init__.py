"""One module per claim. Each prints a ratio against a named baseline; `--json FILE` writes the same for machines.

Idle threads sleep, as in mvar's own commands: figures are those of `mvar train` and `mvar sample`.
"""

from mvar.omp import sleep_when_idle

sleep_when_idle()
