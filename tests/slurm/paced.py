"""`mvar.train` at the pace of a large model: it waits before every step. A rank may be told to hang, once, and a
node to multiply wrong."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from mvar.cli import run_command
from mvar.machine import selfcheck
from mvar.run.strikes import node_name
from mvar.train import main
from mvar.training.engine import Engine

PAUSE_S = float(os.environ.get("TEST_PAUSE_S", "0.05"))
HANG = os.environ.get("TEST_HANG")
"""`rank:step:file`: that rank hangs before that step, unless the file exists; it makes it."""


WRONG_NODE = os.environ.get("TEST_WRONG_NODE")
"""Its products have a wrong number in them."""


def hang(step: int) -> None:
    if HANG is None:
        return
    rank, when, file = HANG.split(":")
    if os.environ["RANK"] == rank and step == int(when) and not Path(file).exists():
        Path(file).touch()
        time.sleep(3600)


def pace(engine_launch: Any) -> Any:
    def launch(self: Engine, done: int, *others: Any, **named: Any) -> Any:
        time.sleep(PAUSE_S)
        hang(done)
        return engine_launch(self, done, *others, **named)

    return launch


def multiply_wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = a @ b
    c[0, 0] += 1
    return c


if __name__ == "__main__":
    if node_name() == WRONG_NODE:
        selfcheck.multiply = multiply_wrong
    Engine.launch = pace(Engine.launch)  # type: ignore[method-assign]
    raise SystemExit(run_command(main))
