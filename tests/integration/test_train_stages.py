"""All ZeRO stages are one and the same training, and their checkpoints are one and the same thing.

Jobs of two ranks do many cases in one process group, because starting processes is what costs time here. Stage 3 has a
job of its own: DeepSpeed replaces torch's linear layer for the rest of the process when it is used (but for selective
recomputation, which must come first).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mvar import ds_config
from mvar.checkpoint import snapshot
from mvar.checkpoint.loading import CheckpointReader
from mvar.checkpoint.partition import KINDS
from mvar.checkpoint.saving import save
from mvar.checkpoint.snapshot import Snapshot
from mvar.checkpoint.weights import load_weights
from mvar.cli import main as mvar
from mvar.config import TrainConfig
from mvar.ds_config import BatchSplit, Tree
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR, drop_path_rates
from mvar.randomness import drop_path, label_drop
from mvar.run.names import folder_of
from mvar.run.world import World
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import run_ranks
from mvar.testing.tiny_runs import STAGES, config
from mvar.training.engine import Engine
from mvar.training.job import TrainingJob, prepare
from mvar.training.objective import Objective
from mvar.training.optimizer import parameter_groups

STEPS, SAVED_AT = 20, 8
RESOLVE = ds_config.resolve
OTHER = {"0": "1", "1": "2", "2": "0", "3": "2"}
"""Stage -> the stage whose checkpoint it also goes on from."""


def build(world: World, tree: dict[str, Any]) -> tuple[Engine, TrainingJob]:
    job = prepare(TrainConfig.model_validate(tree), world.size)
    objective = Objective(job.store.quantizer(), world.device)
    return Engine(job.config, job.model, job.plan, job.split, objective, world), job


def run_steps(engine: Engine, job: TrainingJob, world: World, first: int, last: int) -> list[list[float]]:
    """[loss, gradient norm] of each step."""
    found = []
    stream = job.stream.rank_batches(first * job.config.global_batch, world.rank, world.size, job.split.micro_batch)
    for step in range(first, last):
        result = engine.step(step, [next(stream) for _ in range(job.split.accumulation)])
        assert not result.skipped and result.grad_norm is not None
        found.append([result.averages.loss, result.grad_norm])
    stream.close()
    return found


class LateCopies:
    """A device that copies no sooner than it has to: when it is told to finish before it goes on."""

    def __init__(self, *_: Any) -> None:
        self._due: list[tuple[Tensor, Tensor]] = []

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> LateCopies:
        self._due = list(pairs)
        return self

    def wait(self) -> None:
        for place, values in self._due:
            place.copy_(values)
        self._due = []

    synchronize = wait


def train_stages(world: World, trees: dict[str, dict[str, Any]], folder: str) -> dict[str, Any]:
    """Each stage: train from the start and save on the way; restore its own and another stage's checkpoint, save it
    again unchanged, and go on from there."""
    results: dict[str, Any] = {}
    for stage, tree in trees.items():
        engine, job = build(world, tree)
        engine.initialise()
        head = run_steps(engine, job, world, 0, SAVED_AT)
        save(Path(folder) / f"stage{stage}", engine.partition, world, engine.progress(SAVED_AT), job.identity)
        at_that_moment = [values.clone() for _, _, values in engine.partition.blocks()]
        with patch.object(snapshot, "aside_of", LateCopies):
            taken = Snapshot(engine.partition, world.device).take()
        results[stage] = {"whole": head + run_steps(engine, job, world, SAVED_AT, STEPS)}
        results[stage]["snapshot"] = all(torch.equal(*pair) for pair in zip(taken, at_that_moment, strict=True))
    for stage, tree in trees.items():
        for label, source in (("same", stage), ("other", OTHER[stage])):
            engine, job = build(world, tree)
            saved = folder_of(Path(folder) / f"stage{source}", SAVED_AT)
            assert engine.restore(saved).step == SAVED_AT
            save(
                Path(folder) / f"stage{stage}-from-{label}",
                engine.partition,
                world,
                engine.progress(SAVED_AT),
                job.identity,
            )
            results[stage][label] = run_steps(engine, job, world, SAVED_AT, STEPS)
    return results


def plain_pytorch(tree: TrainConfig) -> list[float]:
    """The same training with nothing but torch, the whole global batch at once. Returns the losses."""
    torch.manual_seed(0)
    job = prepare(tree, 1)
    assert job.model.num_classes is not None
    model = MVAR.from_config(job.model, num_classes=job.model.num_classes)
    init_weights_(model, tree.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=tree.optim.betas, eps=tree.optim.eps)
    objective = Objective(job.store.quantizer(), torch.device("cpu"))
    rates = drop_path_rates(job.model.depth, job.model.resolved_drop_path)
    found = []
    for step in range(STEPS):
        batch = job.stream.batch(step * tree.global_batch, 0, tree.global_batch)
        dropped = torch.from_numpy(label_drop(tree.seed, step, batch.positions_B, job.model.label_drop))
        labels = batch.labels_B.masked_fill(dropped, job.model.num_classes)
        branches = torch.from_numpy(drop_path(tree.seed, step, batch.positions_B, rates))
        loss = objective(model, batch.codes_BL, labels, branches).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), tree.optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = job.plan.lr(step)
            group["weight_decay"] = job.plan.decay(step) if group["decays"] else 0.0
        optimizer.step()
        found.append(loss.item())
    return found


@dataclass(frozen=True)
class Trained:
    folder: Path
    results: dict[str, Any]
    """By stage: losses and gradient norms of each way to the end."""
    tree: TrainConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("stages")
    store = make_store(folder / "store")
    configs = [config(folder, store, stage=stage, engine__micro_batch=2) for stage in STAGES]
    trees = {str(stage): tree.model_dump(mode="json") for stage, tree in zip(STAGES, configs, strict=True)}
    sharded = {"3": trees.pop("3")}
    results: dict[str, Any] = {}
    for name, stages in (("job012", trees), ("job3", sharded)):
        ranks = run_ranks(train_stages, 2, folder / name, trees=stages, folder=str(folder))
        assert ranks[0] == ranks[1], "ranks disagree about losses or gradient norms"
        results |= ranks[0]
    return Trained(folder, results, configs[0])


@pytest.mark.parametrize("stage", [str(stage) for stage in STAGES])
def test_a_snapshot_that_a_device_copies_late_is_of_its_moment(trained: Trained, stage: str) -> None:
    """As on a GPU, where copies go on beside the next step: updates wait for them."""
    assert trained.results[stage]["snapshot"]


def test_every_stage_on_two_ranks_equals_plain_pytorch(trained: Trained, expected: list[float]) -> None:
    assert expected[-1] < expected[0] - 0.3, "the tiny run must learn, or it proves nothing"
    for result in trained.results.values():
        assert [loss for loss, _ in result["whole"]] == pytest.approx(expected, abs=1e-5)


def test_going_on_in_the_same_stage_is_bit_exact(trained: Trained) -> None:
    for result in trained.results.values():
        assert result["same"] == result["whole"][SAVED_AT:]


def test_going_on_in_another_stage_stays_within_rounding(trained: Trained) -> None:
    for result in trained.results.values():
        for (loss, norm), (loss_before, norm_before) in zip(result["other"], result["whole"][SAVED_AT:], strict=True):
            assert loss == pytest.approx(loss_before, abs=1e-5)
            assert norm == pytest.approx(norm_before, rel=1e-4)


def test_restored_weights_and_moments_are_the_saved_bits(trained: Trained) -> None:
    for stage in STAGES:
        for label, source in (("same", str(stage)), ("other", OTHER[str(stage)])):
            saved = CheckpointReader(folder_of(trained.folder / f"stage{source}", SAVED_AT))
            again = CheckpointReader(folder_of(trained.folder / f"stage{stage}-from-{label}", SAVED_AT))
            assert saved.record.progress == again.record.progress
            for name, shape in saved.record.shapes.items():
                for kind in KINDS:
                    whole = (name, kind, 0, torch.Size(shape).numel())
                    assert torch.equal(saved.read(*whole), again.read(*whole)), (stage, label, name, kind)


def test_every_stage_begins_with_the_same_weights(trained: Trained) -> None:
    losses, norms = zip(*(result["whole"][0] for result in trained.results.values()), strict=True)
    assert set(losses) == {losses[0]}
    assert norms == pytest.approx([norms[0]] * len(STAGES), rel=1e-6)  # Each stage sums squares in another order.


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_any_stage_is_exported_without_the_ranks_that_wrote_it(
    trained: Trained, tmp_path: Path, stage: int
) -> None:
    folder = folder_of(trained.folder / f"stage{stage}", SAVED_AT)
    assert mvar(["export", "--weights", str(folder), "--out", str(tmp_path / "model.safetensors")]) == 0
    saved = CheckpointReader(folder)
    _, exported = load_weights(tmp_path / "model.safetensors")
    assert exported.keys() == saved.record.shapes.keys()
    for name, shape in saved.record.shapes.items():
        assert torch.equal(exported[name].flatten(), saved.read(name, "weight", 0, torch.Size(shape).numel()))


def train_cases(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Losses of a whole training of each case, one after the other."""
    found = {}
    for name, tree in trees.items():
        engine, job = build(world, tree)
        engine.initialise()
        found[name] = [loss for loss, _ in run_steps(engine, job, world, 0, STEPS)]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stages", [(0, 1, 2), pytest.param((3,), marks=pytest.mark.slow)])
def test_every_stage_with_every_recomputation_on_every_number_of_ranks_is_the_same_training(
    tmp_path: Path, trained: Trained, expected: list[float], ranks: int, stages: tuple[int, ...]
) -> None:
    store = Path(trained.tree.data.store)
    cases = {
        f"stage {stage}, {recompute}": config(
            tmp_path, store, stage=stage, engine__micro_batch=2, engine__activation_checkpointing=recompute
        ).model_dump(mode="json")
        for stage in stages
        for recompute in ("selective", "off", "every")  # In this order: see the note at the top on stage 3.
    }
    for name, losses in run_ranks(train_cases, ranks, tmp_path / "job", trees=cases)[0].items():
        assert losses == pytest.approx(expected, rel=1e-5), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("stages", [(0, 1, 2), pytest.param((3,), marks=pytest.mark.slow)])
def test_every_stage_with_every_recomputation_trains_the_same_when_compiled(
    tmp_path: Path, trained: Trained, expected: list[float], stages: tuple[int, ...]
) -> None:
    store = Path(trained.tree.data.store)
    cases = {
        f"stage {stage}, {recompute}": config(
            tmp_path, store, stage=stage, engine__activation_checkpointing=recompute, engine__compile="on"
        ).model_dump(mode="json")
        for stage in stages
        for recompute in ("selective", "off", "every")
    }
    for name, losses in run_ranks(train_compiled, 1, tmp_path / "job", trees=cases)[0].items():
        assert losses == pytest.approx(expected, rel=1e-5), name


def train_compiled(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """`train_cases`, after a look that chains really are compiled, none of them in too many forms."""
    from torch._dynamo.utils import counters

    found = train_cases(world, trees)
    # Six chains and the trial; a norm's vectors lie otherwise in memory before the head than in a block.
    assert counters["stats"]["unique_graphs"] == 6 + 1 + 1, counters["stats"]
    assert not counters["graph_break"] and not counters["unimplemented"], counters
    return found


def train_with_gradients_in(world: World, tree: dict[str, Any], dtypes: list[str]) -> list[list[list[float]]]:
    """Losses and gradient norms of a training whose engine keeps its gradients in each of these dtypes."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for speed; any processor can compute it.
    found = []
    for dtype in dtypes:

        def resolve(config: TrainConfig, split: BatchSplit, dtype: str = dtype) -> Tree:
            return RESOLVE(config, split) | {"data_types": {"grad_accum_dtype": dtype}}

        with patch("mvar.training.engine.ds_config.resolve", side_effect=resolve):
            engine, job = build(world, tree)
        engine.initialise()
        found.append(run_steps(engine, job, world, 0, STEPS))
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_in_16_bits_lose_nothing_in_stage_3_without_accumulation(
    tmp_path: Path, trained: Trained, precision: str
) -> None:
    store = Path(trained.tree.data.store)
    tree = config(tmp_path, store, stage=3, engine__precision=precision, engine__micro_batch=4)
    assert ds_config.resolve(tree, BatchSplit.of(8, 2, 4))["data_types"] == {"grad_accum_dtype": precision}
    assert ds_config.resolve(tree, BatchSplit.of(8, 2, 2))["data_types"] == {"grad_accum_dtype": "fp32"}
    dtypes = [precision, "fp32"]
    narrow, wide = run_ranks(
        train_with_gradients_in, 2, tmp_path / "job", tree=tree.model_dump(mode="json"), dtypes=dtypes
    )[0]
    assert narrow == wide


@pytest.fixture(scope="module")
def expected(trained: Trained) -> list[float]:
    return plain_pytorch(trained.tree)
