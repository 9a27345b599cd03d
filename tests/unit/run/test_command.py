"""The main of a training: exit codes, one message for one mistake, and an end without the interpreter's goodbyes."""

from __future__ import annotations

import atexit
from pathlib import Path

import pytest
import torch

from mvar.cli import run_command
from mvar.errors import ConfigError, TrainingError
from mvar.run import world as worlds
from mvar.run.command import run_training
from mvar.run.launcher import Place
from mvar.run.world import World
from mvar.testing.ranks import Ranks

ALONE = World(Place("alone"), torch.device("cpu"))


def train(kind: str) -> int:
    """What a rank does in `kind` of training."""

    def work(_: str, world: World) -> int:
        print(f"rank {world.rank} works", flush=True)
        if kind == "mistake":
            world.raise_together(TrainingError("one message for all") if world.rank == 1 else None)
        if kind == "fault" and world.rank == 1:
            raise RuntimeError("broken")
        world.sum(torch.zeros(1))
        return 75 if kind == "stopped" else 0

    def goodbye() -> None:
        print("the interpreter said goodbye", flush=True)

    atexit.register(goodbye)
    return run_command(lambda _: run_training(lambda: kind, lambda _: worlds.join(), work))


@pytest.mark.parametrize(("kind", "codes"), [("finished", [0, 0]), ("stopped", [75, 75]), ("mistake", [2, 2])])
def test_ranks_end_at_once_with_the_trainings_code(tmp_path: Path, kind: str, codes: list[int]) -> None:
    job = Ranks("tests.unit.run.test_command:train", [kind], 2, tmp_path)
    assert job.wait() == codes, job.output()
    assert job.output().count("works") == 2
    assert "goodbye" not in job.output()
    assert job.output().count("mvar: error: rank 1 on") == (kind == "mistake")


def test_a_fault_shows_its_traceback_and_ends_the_rank_with_1(tmp_path: Path) -> None:
    job = Ranks("tests.unit.run.test_command:train", ["fault"], 2, tmp_path)
    assert job.wait()[1] == 1
    assert "RuntimeError: broken" in job.logs[1].read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_configuration_is_said_once(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("RANK", str(rank))

    def wrong() -> str:
        raise ConfigError("no such key")

    def never(*_: object) -> World:
        raise AssertionError("joined the others all the same")

    if rank:
        assert run_training(wrong, never, lambda *_: 0) == 2
    else:
        with pytest.raises(ConfigError):
            run_training(wrong, never, lambda *_: 0)


def test_a_process_that_is_alone_returns_and_raises_as_any_function() -> None:
    assert run_training(lambda: None, lambda _: ALONE, lambda *_: 7) == 0
    assert run_training(lambda: "config", lambda _: ALONE, lambda config, _: len(config)) == 6

    def fail(*_: object) -> int:
        raise TrainingError("diverged")

    with pytest.raises(TrainingError, match="diverged"):
        run_training(lambda: "config", lambda _: ALONE, fail)
