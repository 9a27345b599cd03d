"""The plan's bytes against a real DeepSpeed engine: what its ranks hold and send, for every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mvar.config import TrainConfig
from mvar.plan.memory import Setup, model_state
from mvar.plan.sizes import Sizes
from mvar.plan.traffic import traffic
from mvar.testing.code_stores import make_store
from mvar.testing.engine_bytes import measure
from mvar.testing.ranks import run_ranks
from mvar.testing.tiny_runs import config

CASES: tuple[dict[str, tuple[int, str, int, dict[str, Any]]], ...] = (
    # name -> stage, precision, accumulation, more of "zero_optimization"
    {
        "0 fp32": (0, "fp32", 2, {}),
        "1 fp32": (1, "fp32", 1, {}),
        "1 bf16": (1, "bf16", 2, {}),
        "2 fp32": (2, "fp32", 2, {}),
        "2 bf16": (2, "bf16", 2, {}),
    },
    # Stage 3 in processes of its own: DeepSpeed replaces torch's linear layer for good.
    {
        "3 fp32": (3, "fp32", 2, {}),
        "3 bf16": (3, "bf16", 2, {}),
        "3 bf16 gathered twice": (3, "bf16", 1, {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}),
    },
)
WORLDS = (1, 2, 4)
Measured = dict[tuple[int, str], list[dict[str, dict[str, int]]]]


def settings(folder: Path, store: Path, world: int, name: str) -> TrainConfig:
    stage, precision, accumulation, zero = next(cases[name] for cases in CASES if name in cases)
    if stage == 3:
        zero = zero | {"stage3_param_persistence_threshold": 0}
    template = folder / f"{name.replace(' ', '-')}.json"
    template.write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000} | zero}))
    return config(
        folder,
        store,
        global_batch=world * accumulation,
        model__depth=3,
        model__width=192,
        model__heads=3,
        engine__ds_config=str(template),
        engine__micro_batch=1,
        engine__precision=precision,
    )


def setup_of(tree: TrainConfig, world: int) -> Setup:
    zero = json.loads(tree.engine.ds_config.read_text())["zero_optimization"]
    return Setup(zero["stage"], tree.engine.precision, world, zero, accumulation=tree.global_batch // world)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, dict[tuple[int, str], TrainConfig]]:
    folder = tmp_path_factory.mktemp("plan")
    store = make_store(folder / "store")
    found: Measured = {}
    trees: dict[tuple[int, str], TrainConfig] = {}
    for world in WORLDS:
        for number, cases in enumerate(CASES):
            here = {name: settings(folder, store, world, name) for name in cases}
            plain = {name: tree.model_dump(mode="json") for name, tree in here.items()}
            ranks = run_ranks(measure, world, folder / f"world{world}-{number}", trees=plain)
            for name, tree in here.items():
                found[world, name] = [rank[name] for rank in ranks]
                trees[world, name] = tree
    return found, trees


NAMES = [name for cases in CASES for name in cases]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_model_state_is_what_ranks_hold(measured: Any, world: int, name: str) -> None:
    found, trees = measured
    tree = trees[world, name]
    planned = model_state(Sizes.of(tree.model.model_copy(update={"num_classes": 3})), setup_of(tree, world))
    most: dict[str, int] = max((rank["held"] for rank in found[world, name]), key=lambda held: sum(held.values()))
    state = most["weights"] + most["gradients"] + most["optimizer"]
    assert planned.total == pytest.approx(state, rel=0.02)
    assert planned.weights == pytest.approx(most["weights"], rel=0.02)
    assert planned.optimizer == pytest.approx(most["optimizer"], rel=0.02)
    assert most["other"] < 0.01 * state, "something large that the plan knows nothing of"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_messages_are_what_ranks_send(measured: Any, world: int, name: str) -> None:
    found, trees = measured
    tree = trees[world, name]
    planned = traffic(Sizes.of(tree.model.model_copy(update={"num_classes": 3})), setup_of(tree, world))
    for rank in found[world, name]:
        sent = rank["sent"]
        assert planned.all_reduce == pytest.approx(sent["all_reduce"], rel=0.05, abs=1000)
        assert planned.reduce_scatter == pytest.approx(sent["reduce_scatter_tensor"], rel=0.05, abs=1000)
        gathered = sent["all_gather_into_tensor"] + sent["all_gather"]
        assert planned.all_gather == pytest.approx(gathered, rel=0.05, abs=1000)
