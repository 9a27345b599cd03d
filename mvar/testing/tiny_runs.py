"""A training small enough for tests: its configuration, its templates, and how to read what it recorded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mvar.config import TrainConfig
from mvar.testing.ranks import Ranks

STAGES = (0, 1, 2, 3)


def template(folder: Path, stage: int) -> Path:
    """A DeepSpeed template. Stage 3 shards even the smallest parameter, so that no mistake hides behind whole ones."""
    path = folder / f"zero{stage}.json"
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"zero_optimization": zero}))
    return path


def settings(folder: Path, store: Path, run: str = "run", *, stage: int = 2, **overrides: Any) -> dict[str, Any]:
    """Plain configuration tree of a run of 25 steps; `overrides` by dotted key with `__` for the dot."""
    tree: dict[str, Any] = {
        "run": str(folder / run),
        "seed": 3,
        "global_batch": 8,
        "epochs": 4,
        "model": {
            "depth": 2,
            "width": 64,
            "heads": 2,
            "patch_nums": [1, 2, 3],
            "vocab_size": 32,
            "latent_channels": 8,
            "drop_path": 0.1,
        },
        "data": {"store": str(store)},
        "optim": {"base_lr": 0.05, "clip_grad": 0.5, "warmup_epochs": 0.5, "weight_decay_end": 0.1},
        "engine": {"ds_config": str(template(folder, stage)), "precision": "fp32", "threads": 1},
        "checkpoint": {"every_steps": 7},
        "tracking": {"log_every": 5, "validate_every": 10, "wandb": "disabled"},
    }
    for key, value in overrides.items():
        *parents, leaf = key.split("__")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return tree


def config(folder: Path, store: Path, run: str = "run", *, stage: int = 2, **overrides: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings(folder, store, run, stage=stage, **overrides))


def write_config(folder: Path, store: Path, run: str = "run", *, stage: int = 2, **overrides: Any) -> Path:
    """The configuration as a file. JSON is YAML."""
    path = folder / f"{run}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings(folder, store, run, stage=stage, **overrides)))
    return path


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run: Path) -> list[float]:
    """One loss for each step, after a check that no step is missing or doubled."""
    found = records(run)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record["loss"] for record in found]


def wait_for_step(job: Ranks, run: Path, step: int) -> None:
    """Until the run has recorded `step`; its processes must live."""
    metrics = run / "metrics.jsonl"
    while job.alive() and not (metrics.exists() and f'"kind": "train", "step": {step},' in metrics.read_text()):
        time.sleep(0.005)
    assert job.alive(), job.output()
