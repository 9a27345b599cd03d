"""`mvar inspect-checkpoint`: what is in a checkpoint, whether it is in order, and who may go on from it.

    mvar inspect-checkpoint runs/d16                               the newest one of a run, damaged or not
    mvar inspect-checkpoint runs/d16/checkpoints/step-000001000
    mvar inspect-checkpoint runs/d16 --config recipes/d16.yaml run=runs/d16 data.store=codes

With --config it names what would keep that configuration from resuming. Nothing is changed.
Exit codes: 0 in order, 1 damaged or not to be resumed with --config, 2 wrong use.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvar.checkpoint.record import RECORD, CheckpointRecord, Identity, differences
from mvar.cli import run_command
from mvar.config import ModelConfig, TrainConfig
from mvar.durations import duration
from mvar.errors import CheckpointError
from mvar.paths import is_url
from mvar.run.names import folder_of, newest_step, steps_in
from mvar.settings import load

EXIT_UNUSABLE = 1


@dataclass(frozen=True)
class FileState:
    name: str
    bytes: int
    """As recorded."""
    problem: str | None


@dataclass(frozen=True)
class Inspection:
    path: str
    written: float
    """Unix seconds."""
    step: int
    samples: int
    adam_steps: int
    skipped_steps: int
    validation_loss: float | None
    config_sha256: str
    """Of the resolved configuration as JSON with sorted keys."""
    store_sha256: str
    model: str
    parameters: int
    kinds: tuple[str, ...]
    world_size: int
    zero_stage: int
    files: list[FileState]
    digests_checked: bool
    versions: dict[str, str]
    differences: list[str] | None
    """What keeps the given configuration from resuming; None if none was given."""
    not_compared: list[str]
    others: list[int]
    """Steps of the other checkpoints of the run."""

    @property
    def usable(self) -> bool:
        return not self.differences and all(file.problem is None for file in self.files)


def inspect(path: Path, *, digests: bool = True, config: TrainConfig | None = None) -> Inspection:
    """Read a checkpoint, or the newest of a run folder. Raises CheckpointError where its record cannot be read."""
    folder = _checkpoint_in(path)
    record = CheckpointRecord.read(folder)
    model, progress = ModelConfig.model_validate(record.model), record.progress
    found, skipped = (None, []) if config is None else _compare(record, model, config)
    return Inspection(
        path=str(folder),
        written=(folder / RECORD).stat().st_mtime,
        step=progress.step,
        samples=progress.samples,
        adam_steps=progress.adam_steps,
        skipped_steps=progress.skipped_steps,
        validation_loss=progress.validation_loss,
        config_sha256=hashlib.sha256(json.dumps(record.config, sort_keys=True).encode()).hexdigest(),
        store_sha256=record.store,
        model=f"depth {model.depth}, width {model.resolved_width}, {model.resolved_heads} heads,"
        f" {model.num_classes} classes, scales {list(model.patch_nums)}",
        parameters=sum(math.prod(shape) for shape in record.shapes.values()),
        kinds=record.kinds,
        world_size=record.world_size,
        zero_stage=record.zero_stage,
        files=[
            FileState(name, expected.bytes, expected.problem_of(folder / name, digest=digests))
            for name, expected in sorted(record.files.items())
        ],
        digests_checked=digests,
        versions=record.versions,
        differences=found,
        not_compared=skipped,
        others=[step for step in steps_in(folder.parent) if step != progress.step],
    )


def _checkpoint_in(path: Path) -> Path:
    if (path / RECORD).is_file():
        return path
    step = newest_step(path / "checkpoints")
    if step is not None:
        return folder_of(path / "checkpoints", step)
    raise CheckpointError(f"{path}: no checkpoint in it. Give a run folder, or a checkpoint's (it holds {RECORD}).")


def _compare(record: CheckpointRecord, saved: ModelConfig, config: TrainConfig) -> tuple[list[str], list[str]]:
    """Differences, and what could not be compared: the code store where it cannot be looked at from here."""
    classes, store, skipped = config.model.num_classes, record.store, []
    manifest = Path(config.data.store) / "manifest.json"
    try:
        if is_url(config.data.store):
            raise OSError(0, "it is not on this machine")
        data = manifest.read_bytes()
        store, classes = hashlib.sha256(data).hexdigest(), classes or len(json.loads(data)["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        skipped.append(f"data.store {config.data.store}: {getattr(error, 'strerror', None) or error}")
    model = config.model.model_copy(update={"num_classes": classes or saved.num_classes})
    return differences(record, Identity(config, model, store)), skipped


def show(found: Inspection, most: int = 12) -> str:
    """The screen. `most`: files shown, those with problems first."""
    age = duration(max(0.0, time.time() - found.written))
    loss = "" if found.validation_loss is None else f", validation loss {found.validation_loss:.4f}"
    total = sum(file.bytes for file in found.files)
    bad = [file for file in found.files if file.problem]
    how = "sizes and digests" if found.digests_checked else "sizes only"
    lines = [
        ("checkpoint", found.path),
        ("step", f"{found.step:,}, {found.samples:,} images seen, {found.adam_steps:,} updates made{loss}"),
        ("written", f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(found.written))} ({age} ago)"),
        ("model", f"{found.parameters:,} parameters: {found.model}"),
        ("holds", f"{', '.join(found.kinds)} in float32"),
        ("written by", f"{found.world_size} ranks, ZeRO stage {found.zero_stage}; any number and stage may read it"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        ("config", f"sha256 {found.config_sha256[:12]}; code store {found.store_sha256[:12]}"),
        ("files", f"{len(found.files)}, {total / 2**20:,.1f} MiB: {len(bad) or 'none'} damaged ({how})"),
    ]
    shown = (bad + [file for file in found.files if not file.problem])[:most]
    lines += [("", f"{file.name}  {file.bytes:,} bytes  {file.problem or 'in order'}") for file in shown]
    if len(found.files) > len(shown):
        lines.append(("", f"and {len(found.files) - len(shown)} more, in order" if len(bad) <= most else "and more"))
    if found.others:
        lines.append(("others", ", ".join(f"{step:,}" for step in found.others)))
    if found.differences is not None:
        lines.append(("resume", "nothing is in the way" if not found.differences else "refused, because of"))
        lines += [("", line) for line in found.differences]
        lines += [("", f"not compared: {line}") for line in found.not_compared]
    return "\n".join(f"{name:11} {text}".rstrip() for name, text in lines)


def to_json(found: Inspection) -> dict[str, Any]:
    return asdict(found) | {"usable": found.usable}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar inspect-checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--config", type=Path, help="configuration that might resume it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the configuration")
    parser.add_argument("--trust-sizes", action="store_true", help="do not read the files through")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    args = parser.parse_intermixed_args(argv)
    config = load(TrainConfig, args.config, args.overrides) if args.config or args.overrides else None
    found = inspect(args.path, digests=not args.trust_sizes, config=config)
    print(json.dumps(to_json(found), indent=1) if args.json else show(found))
    return 0 if found.usable else EXIT_UNUSABLE


if __name__ == "__main__":
    raise SystemExit(run_command(main))
