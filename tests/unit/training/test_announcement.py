"""What a training decides by itself is told with its reason."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvar.log import Chosen
from mvar.model.kernels import precision
from mvar.run.launcher import Place
from mvar.run.world import World
from mvar.testing.code_stores import make_store
from mvar.testing.tiny_runs import config
from mvar.training import announcement as module
from mvar.training.announcement import announce, chosen
from mvar.training.job import prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("instructions", [True, False])
def test_batch_threads_and_products_of_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: bool
) -> None:
    monkeypatch.setattr(precision, "_cpu_multiplies", lambda _: instructions)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    settings = config(tmp_path, make_store(tmp_path / "store"), engine__precision="bf16", engine__threads=None)
    world = World(Place("torchrun", 0, 2, 0, 2, "host", 1), CPU, own_cores=4)
    products, batch, threads = chosen(prepare(settings, 2, 2), world)
    assert products.slow is not instructions
    assert str(products) == (
        "matrix products: bfloat16 on cpu"
        if instructions
        else "matrix products: float32 on cpu, because this CPU has no instructions for bfloat16"
    )
    assert str(batch).startswith("micro-batch: 4 images a rank, 1 times a step, because")
    assert "4 of this machine's 8 cores are this rank's" in str(threads) and not threads.slow


def test_what_was_asked_for_has_no_reason(tmp_path: Path) -> None:
    settings = config(tmp_path, make_store(tmp_path / "store"), engine__micro_batch=2)
    found = chosen(prepare(settings, 1), World(Place("alone"), CPU))
    assert [one.reason for one in found] == ["", "", ""] and "2 images a rank, 4 times a step" in str(found[1])


@pytest.mark.parametrize(
    ("device", "machine", "own", "loud"),
    [
        (GPU, 8, 1, True),
        (GPU, 64, 2, False),
        (CPU, 64, 1, True),  # Pinned, as by what it inherited from another job.
        (CPU, 8, 1, False),  # There are no more.
    ],
)
def test_a_rank_that_has_one_core_is_told_loudly(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, machine: int, own: int, loud: bool
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    job: Any = SimpleNamespace(config=SimpleNamespace(engine=SimpleNamespace(threads=None)))
    told = module.threads(job, World(Place("srun", 0, 8, 0, 8, "host", 1), device, own_cores=own))
    assert told.slow == loud and ("--cpus-per-task" in told.reason) == loud


@dataclass(frozen=True)
class Told(World):
    """A world in which the other ranks have said what they have to say."""

    others: tuple[list[Chosen], ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_ranks_that_compute_otherwise_are_named(caplog: pytest.LogCaptureFixture) -> None:
    usual = Chosen("mamba", "mamba_ssm")
    broken = Chosen("mamba", "torch", "mamba-ssm cannot be imported (undefined symbol: x)", slow=True)
    world = Told(Place("srun", 0, 4, 0, 2, "host", 1), CPU, ([usual], [broken], [broken]))
    with caplog.at_level(logging.INFO, "mvar"):
        announce(world, [usual])
    assert caplog.messages == ["mamba: mamba_ssm", f"2 ranks, from rank 2 on, differ: {broken}"]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
