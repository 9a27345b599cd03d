"""The shipped recipes of the published models: they load, they fit together, and they are what was published."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mvar.config import TrainConfig
from mvar.ds_config import BatchSplit, resolve
from mvar.schedule import Plan
from mvar.settings import load
from mvar.training.engine import build_model
from tests.golden import golden_json

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
IMAGENET = 1_281_167
PUBLISHED: dict[str, tuple[Any, ...]] = {
    # epochs, batch, peak lr, last lr as a share of it, last decay, gamma, parameters
    "d12": (200, 768, 3e-4, 0.1, 0.05, 1e-3, 198_435_568),
    "d16": (200, 768, 3e-4, 0.1, 0.05, 1e-3, 464_157_440 - 16 * 16),
    "d20": (250, 768, 3e-4, 0.1, 0.05, 1e-3, 900_529_136 - 20 * 20),
    "d24": (350, 768, 2.4e-4, 0.01, 0.05, 1e-4, 1_550_067_136),
    "d30": (350, 1024, 3.2e-4, 0.01, 0.08, 1e-5, 3_017_065_756),
    "d32": (350, 1024, 3.2e-4, 0.01, 0.08, 1e-5, 3_658_707_968),
    "d36s_512": (350, 768, 2.4e-4, 0.01, 0.08, 5e-6, None),
}


def recipe(name: str) -> TrainConfig:
    return load(TrainConfig, RECIPES / f"{name}.yaml", ["run=r", "data.store=s"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_what_was_published(name: str) -> None:
    epochs, batch, peak, final, decay_end, gamma, parameters = PUBLISHED[name]
    config = recipe(name)
    plan = Plan.of(config, IMAGENET)
    assert plan.total_steps == -(-epochs * IMAGENET // batch)
    assert plan.warmup_steps == pytest.approx(plan.total_steps / 50, abs=1)
    assert plan.peak_lr == pytest.approx(peak)
    assert plan.lr(plan.total_steps - 1) == pytest.approx(peak * final)
    assert plan.decay(plan.total_steps - 1) == pytest.approx(decay_end)
    assert (config.model.init_gamma, config.optim.clip_grad, config.model.label_drop) == (gamma, 2.0, 0.1)
    assert config.model.resolved_drop_path == pytest.approx(0.1 * config.model.depth / 24)
    if parameters is not None:
        with torch.device("meta"):
            model = build_model(config, config.model.model_copy(update={"num_classes": 1000}))
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_run_on_a_node_of_eight(name: str) -> None:
    config = recipe(name)
    split = BatchSplit.of(config.global_batch, 8, config.engine.micro_batch)
    assert resolve(config, split)["train_batch_size"] == config.global_batch


@pytest.mark.parametrize(
    ("name", "run"), [("d16", "d16_recipe_bs768_ep200"), ("d30", "d30_recipe_bs1024_ep350_wd_ramp")]
)
def test_the_schedule_of_a_recipe_follows_the_published_one(name: str, run: str) -> None:
    """The published length rounds each epoch up to whole batches; ours counts images: a thousandth less at most."""
    published = golden_json("schedules", "lr_wd.json")[run]
    plan = Plan.of(recipe(name), IMAGENET)
    assert plan.total_steps == pytest.approx(published["config"]["max_it"], rel=1e-3)
    for row in published["rows"]:
        step = round(row["it"] / (published["config"]["max_it"] - 1) * (plan.total_steps - 1))
        assert plan.lr(step) == pytest.approx(row["lr"], rel=5e-3)
        assert plan.decay(step) == pytest.approx(row["wd_decay_group"], rel=1e-3)
