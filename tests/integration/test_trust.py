"""Machines that change bits, compute wrong or stay behind, planted on one rank of two: noticed, named, and not saved.

`entry` functions below run in real processes, spoil one thing on rank 1, and call a command.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar.checkpoint.choosing import verify
from mvar.checkpoint.partition import WEIGHT
from mvar.run import strikes
from mvar.run.history import History
from mvar.run.names import folder_of, steps_in
from mvar.run.world import World
from mvar.status import main as status
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import Ranks, command, run_ranks
from mvar.testing.tiny_runs import config, losses, records, write_config
from tests.integration.test_train_stages import build


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("trust") / "store")


@pytest.fixture(scope="module")
def calm(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, on two ranks."""
    folder = tmp_path_factory.mktemp("calm")
    job = start("none", folder, "--config", str(write_config(folder, store)))
    assert job.wait() == [0, 0], job.output()
    return folder / "run"


def start(entry: str, folder: Path, *words: str, ranks: int = 2, environ: dict[str, str] | None = None) -> Ranks:
    return Ranks(f"tests.integration.test_trust:{entry}", [list(words)], ranks, folder / "logs", environ)


def none(argv: list[str]) -> int:
    return command("mvar.train", argv)


def here() -> bool:
    return os.environ.get("RANK") == "1"


def flip(values: Tensor, place: int = 5) -> None:
    """Change one bit, the lowest."""
    values.detach().view(-1).view({2: torch.int16, 4: torch.int32}[values.element_size()])[place] ^= 1


# ---- weights that differ


def flipping(argv: list[str]) -> int:
    """One bit of one weight of rank 1 changes in the fourteenth step, after which a checkpoint is due."""
    from mvar.training.engine import Engine

    original: Any = Engine._update

    def update(self: Engine) -> Any:
        done = original(self)
        if here() and self.partition.adam_steps == 14:
            flip(dict(self._engine.module.named_parameters())["blocks.1.ffn.fc1.weight"])
        return done

    Engine._update = update  # type: ignore[method-assign]
    return command("mvar.train", argv)


def test_a_flipped_bit_ends_the_run_before_it_is_saved_and_names_the_rank(tmp_path: Path, store: Path) -> None:
    run, settings = tmp_path / "run", write_config(tmp_path, store)
    job = start("flipping", tmp_path, "--config", str(settings), environ={"SLURMD_NODENAME": "n7"})
    assert job.wait() == [1, 1], job.output()
    assert steps_in(run / "checkpoints") == [7]
    verify(folder_of(run / "checkpoints", 7))
    told = job.logs[1].read_text()
    assert "the weights after step 14 differ between ranks: rank 1 on n7 (cpu)" in told, told
    assert "blocks.1.ffn.fc1.weight" in told and "Traceback" not in told
    (strike,) = strikes.read(run)
    assert (strike.rank, strike.node, strike.step, strike.out) == (1, "n7", 14, False)
    (begun,) = History(run).starts()
    assert begun.code == 1 and "rank 1 on n7" in begun.reason


# ---- computing twice, and how long it takes


def wavering(argv: list[str]) -> int:
    """Rank 1 is slow, and of two computations of one gradient the second has another bit in it."""
    from mvar.training.engine import Engine
    from mvar.training.objective import Objective

    differentiate: Any = Engine.differentiate
    call: Any = Objective.__call__
    calls = []

    def spoiled(self: Engine, *arguments: Any) -> Any:
        loss, gradients = differentiate(self, *arguments)
        calls.append(loss)
        if here() and len(calls) % 2 == 0:
            flip(gradients[3])
        return loss, gradients

    def slow(self: Objective, *arguments: Any, **named: Any) -> Any:
        if here() and torch.is_grad_enabled():
            time.sleep(0.3)
        return call(self, *arguments, **named)

    Engine.differentiate = spoiled  # type: ignore[method-assign]
    Objective.__call__ = slow  # type: ignore[method-assign]
    return command(argv[0], argv[1:])


def test_a_rank_that_wavers_and_stays_behind_is_noted_and_the_training_is_the_same(
    tmp_path: Path, store: Path, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = write_config(tmp_path, store, trust__verify_every=10, trust__slow_steps=6)
    job = start("wavering", tmp_path, "mvar.train", "--config", str(settings))
    assert job.wait() == [0, 0], job.output()
    assert losses(run) == losses(calm)
    found = [(strike.step, strike.rank, strike.what) for strike in strikes.read(run)]
    twice = "computes differently twice"
    assert found == [(6, 1, "stays behind"), (10, 1, twice), (20, 1, twice)]
    assert [(record["step"], record["differing"]) for record in records(run, "verify")] == [(10, [1]), (20, [1])]
    assert {record["slowest_rank"] for record in records(run)} == {1}
    assert all(record["slowest_s"] > record["forward_s"] + 0.2 for record in records(run)[1:])
    assert status([str(run)]) == 0
    shown = capsys.readouterr().out
    assert "(rank 1 in 25 of 25 steps)" in shown and "3 strikes" in shown and twice in shown


def test_the_command_computes_twice_with_the_weights_of_a_run_and_names_the_rank(calm: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in calm.rglob("*") if path.is_file()}
    job = start("sound", tmp_path, str(calm), ranks=1)
    assert job.wait() == [0], job.output()
    assert "rank 0 on" in job.output() and "the same bits" in job.output()
    assert {path: path.read_bytes() for path in calm.rglob("*") if path.is_file()} == before
    job = start("wavering", tmp_path / "bad", "mvar.verify_step", str(calm))
    assert job.wait() == [1, 1], job.output()
    assert "  rank 0" in job.output() and "! rank 1" in job.output()
    (strike,) = strikes.read(calm)
    (calm / strikes.NAME).unlink()
    assert (strike.rank, strike.step, strike.what) == (1, 25, "computes differently twice")
    assert "the gradient of" in strike.evidence


def sound(argv: list[str]) -> int:
    return command("mvar.verify_step", argv)


# ---- before the training


def miscalculating(argv: list[str]) -> int:
    """One number of one product of rank 1 is wrong."""
    from mvar.machine import selfcheck

    original = selfcheck.multiply

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        c = original(a, b)
        if here() and a.dtype == torch.bfloat16:
            c[17, 4] += 1
        return c

    selfcheck.multiply = multiply
    return command("mvar.train", argv)


def test_a_machine_that_multiplies_wrong_does_not_begin_to_train(tmp_path: Path, store: Path) -> None:
    words = ("--config", str(write_config(tmp_path, store)))
    job = start("miscalculating", tmp_path, *words, environ={"MVAR_NODE_CHECK": "on", "SLURMD_NODENAME": "n7"})
    assert job.wait() == [1, 1], job.output()
    assert "rank 1 on n7 (cpu): a product of matrices in bfloat16 is wrong: 1 of 512 rows" in job.output()
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
    proven = [strike for strike in strikes.read(tmp_path / "run") if strike.out]
    assert [(strike.rank, strike.node, strike.step) for strike in proven] == [(1, "n7", None)]


# ---- every stage


def look_and_train(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each case: the same steps with and without looks between them; then what looks say of a weight with one bit
    changed on rank 1."""
    from mvar.config import TrainConfig
    from mvar.training.agreement import disagreement
    from mvar.training.twice import difference

    found: dict[str, Any] = {}
    for name, tree in trees.items():
        curves = []
        for looks in (False, True):
            engine, job = build(world, TrainConfig.model_validate(tree).model_dump(mode="json"))
            engine.initialise()
            stream = job.stream.rank_batches(0, world.rank, world.size, job.split.micro_batch)
            curve = []
            for step in range(4):
                batches = [next(stream) for _ in range(job.split.accumulation)]
                if looks:
                    assert difference(engine, step, batches[0]) is None
                    assert disagreement(engine.partition, engine.weights, world) is None
                result = engine.step(step, batches)
                curve.append([result.averages.loss, result.grad_norm])
            stream.close()
            curves.append(
                curve + [[float(v.double().sum())] for _, kind, v in engine.partition.blocks() if kind == WEIGHT]
            )
        found[name] = {"same": curves[0] == curves[1]}
        if engine.stage < 3:
            if world.rank == 1:
                flip(engine.weights["blocks.1.ffn.fc1.weight"])
            other = disagreement(engine.partition, engine.weights, world)
            assert other is not None
            found[name] |= {"ranks": list(other.ranks), "certain": other.certain, "evidence": other.evidence}
    return found


PRECISION = {0: "fp32", 1: "bf16", 2: "fp32", 3: "bf16"}


@pytest.mark.parametrize("stages", [(0, 1, 2), (3,)])
def test_looks_change_nothing_in_any_stage_and_see_one_bit(
    tmp_path: Path, store: Path, stages: tuple[int, ...]
) -> None:
    cases = {}
    for stage in stages:
        precision = PRECISION[stage]
        tree = config(tmp_path, store, stage=stage, engine__precision=precision, engine__micro_batch=2)
        cases[f"{stage} {precision}"] = json.loads(tree.model_dump_json())
    for name, found in run_ranks(look_and_train, 2, tmp_path / "job", trees=cases)[0].items():
        assert found["same"], name
        if name[0] in "12":
            assert (found["ranks"], found["certain"]) == ([1], True), name
            assert "blocks.1.ffn.fc1.weight" in found["evidence"]
        elif name[0] == "0":  # Two copies without a master: one of them is wrong, and nothing says which.
            assert (found["ranks"], found["certain"]) == ([0, 1], False)
