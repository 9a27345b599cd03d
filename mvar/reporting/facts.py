"""What is known of a run, read from its folder: whatever is missing is empty, whatever is damaged is passed over.

Nothing is loaded that a training needs: neither weights nor a tokenizer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mvar.checkpoint.record import CheckpointRecord
from mvar.errors import MvarError
from mvar.files.json_lines import JsonRecord, read
from mvar.reporting.records import of_kind, read_evaluations
from mvar.run.folder import RunFolder
from mvar.run.history import History, Start, Trouble
from mvar.run.names import folder_of, steps_in

RECONSTRUCTIONS = "reconstructions.png"
_TRANSFORMER = {"model", "data"}
"""Sections that only a transformer's configuration has."""


@dataclass(frozen=True)
class Sheet:
    """A picture in the run's folder. `samples`: images seen when it was drawn, None where nothing tells."""

    path: Path
    step: int | None
    samples: float | None


@dataclass(frozen=True)
class RunFacts:
    """A run as its files tell it."""

    path: Path
    trains: str
    """What is trained: "tokenizer" or "transformer"."""
    metrics: Sequence[JsonRecord]
    evaluations: Sequence[JsonRecord]
    starts: Sequence[Start]
    troubles: Sequence[Trouble]
    config: str
    """The text of config.yaml; empty without it."""
    environment: Mapping[str, str]
    """Versions, devices, git commit: what is known of them."""
    sheets: Sequence[Sheet]
    """Pictures over time, oldest first."""
    reconstructions: Sheet | None
    finished: bool

    def of_kind(self, kind: str) -> list[JsonRecord]:
        return of_kind(self.metrics, kind)


def facts_of(path: Path) -> RunFacts:
    """Raises MvarError: the folder is no run's."""
    run = RunFolder(path)
    history = History(path, writes=False)
    if not any(file.is_file() for file in (run.config, run.metrics, history.path)):
        what = (
            "is no run folder (no config.yaml, history.jsonl or metrics.jsonl in it)" if path.is_dir() else "not found"
        )
        raise MvarError(f"{path}: {what}. Give the folder of a training, run=... or out=... of its command.")
    metrics = read(run.metrics)
    config = run.config.read_text(encoding="utf-8", errors="replace") if run.config.is_file() else ""
    reconstructions = path / RECONSTRUCTIONS
    return RunFacts(
        path=path,
        trains=_trains(config, metrics),
        metrics=metrics,
        evaluations=read_evaluations(path, metrics),
        starts=history.starts(),
        troubles=history.troubles(),
        config=config,
        environment=_environment(run, history),
        sheets=_sheets(run, metrics),
        reconstructions=Sheet(reconstructions, None, None) if reconstructions.is_file() else None,
        finished=run.finished.exists() or (path / "tokenizer.safetensors").is_file(),
    )


def _trains(config: str, metrics: Sequence[JsonRecord]) -> str:
    with contextlib.suppress(yaml.YAMLError):
        tree = yaml.safe_load(config)
        if isinstance(tree, dict):
            return "transformer" if set(tree) >= _TRANSFORMER else "tokenizer"
    return "tokenizer" if any("psnr_db" in record for record in metrics) else "transformer"


def _sheets(run: RunFolder, metrics: Sequence[JsonRecord]) -> list[Sheet]:
    """As they lie in the folder: a grid without a record counts too, a record without its grid does not."""
    seen = {str(record.get("file")): record.get("samples") for record in of_kind(metrics, "sample")}
    found = []
    for path in sorted(run.samples.glob("step-*.png")) if run.samples.is_dir() else ():
        step = path.stem.removeprefix("step-")
        samples = seen.get(f"{run.samples.name}/{path.name}")
        found.append(Sheet(path, int(step) if step.isdecimal() else None, samples))
    return found


def _environment(run: RunFolder, history: History) -> dict[str, str]:
    found: dict[str, Any] = {}
    for record in (_of_checkpoint(run), _of_snapshot(run), history.environment()):
        versions = record.pop("versions", None)
        found |= versions if isinstance(versions, dict) else {}
        found |= {key: value for key, value in record.items() if value not in (None, "", [])}
    return {str(key).replace("_", " "): str(value) for key, value in found.items()}


def _of_checkpoint(run: RunFolder) -> dict[str, Any]:
    for step in reversed(steps_in(run.checkpoints)):
        with contextlib.suppress(MvarError):
            record = CheckpointRecord.read(folder_of(run.checkpoints, step))
            return {"versions": record.versions, "ranks": record.world_size, "zero_stage": record.zero_stage}
    return {}


def _of_snapshot(run: RunFolder) -> dict[str, Any]:
    """What a chain of jobs noted when it kept the code."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((run.path / "snapshot" / "snapshot.json").read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return {key: record.get(key) for key in ("versions", "commit", "uncommitted_changes")}
    return {}
