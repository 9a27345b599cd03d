"""Training killed with SIGKILL again and again, everywhere: it ends with the bits of the run that nobody disturbed.

A kill comes from outside at a random moment, or strikes one rank inside a chosen act (see `POINTS`) while the other is
killed too or left to notice. 10 kills in `make test`, 100 in `make test-slow`.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvar.checkpoint.choosing import verify
from mvar.checkpoint.record import RECORD
from mvar.run.history import History
from mvar.run.names import folder_of, steps_in
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import Ranks, command
from mvar.testing.tiny_runs import losses, records, write_config

POINTS = ("step", "snapshot", "write", "sync", "commit", "retention", "load", "choose", "metrics")


def run_and_die(config: str, victim: int, point: str, count: int) -> int:
    """`mvar train`, in which rank `victim` kills itself at the `count`-th `point`, half-way through it."""
    if point and int(os.environ["RANK"]) == victim:
        arm(point, count)
    return command("mvar.train", ["--config", config])


def arm(point: str, count: int) -> None:

    from mvar.checkpoint import snapshot, tensors
    from mvar.checkpoint.loading import CheckpointReader
    from mvar.files import disk
    from mvar.run.tracking import JsonLines
    from mvar.training.engine import Engine

    owner, name = {
        "step": (Engine, "_update"),
        "snapshot": (snapshot.Snapshot, "take"),
        "write": (tensors, "_chunks"),
        "sync": (disk, "sync_folder"),
        "commit": (os, "rename"),
        "retention": (shutil, "rmtree"),
        "load": (CheckpointReader, "read"),
        "choose": (disk, "sha256_of"),
        "metrics": (JsonLines, "write"),
    }[point]
    original: Callable[..., Any] = getattr(owner, name)
    left = [count]

    def dying(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0]:
            return original(*arguments, **options)
        halfway(point, original, arguments)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def halfway(point: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """What is done of the act before its process dies."""
    if point == "retention" and Path(arguments[0]).is_dir():
        next(iter(Path(arguments[0]).iterdir())).unlink()
    elif point == "metrics":
        lines = arguments[0]
        lines._file.write(b'{"kind": "train", "st')
    elif point in ("step", "snapshot", "commit"):
        original(*arguments)


class Storm:
    """One run and its kills."""

    def __init__(self, folder: Path, store: Path, steps: int, seed: int) -> None:
        overrides: dict[str, Any] = {
            "stage": 2,
            "engine__micro_batch": 2,
            "epochs": 1000,
            "max_steps": steps,
            "checkpoint__every_steps": 2,
            "checkpoint__keep_last": 2,
            "checkpoint__keep_every": 20,
            "tracking__validate_every": 5,
            "optim__ema_decay": 0.9,
        }
        self.folder, self.run, self.calm = folder, folder / "storm", folder / "calm"
        self.config = write_config(folder, store, "storm", **overrides)
        self.calm_config = write_config(folder, store, "calm", **overrides)
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()

    def start(self, config: Path, victim: int = 0, point: str = "", count: int = 0) -> Ranks:
        entry = "tests.integration.test_kill_storm:run_and_die"
        return Ranks(entry, [str(config), victim, point, count], 2, self.folder / "logs")

    def to_the_end(self, config: Path) -> None:
        job = self.start(config)
        assert job.wait() == [0, 0], job.output()

    def strike(self) -> None:
        """Start the run and kill it, at the latest after some ten steps."""
        begin = self.written()
        if self.random.random() < 0.4:
            job = self.start(self.config)
            begins_s, most = time.monotonic(), self.random.randint(0, 12)
            patience_s = self.random.choice([100.0, self.random.uniform(0.3, 3.0)])
            while job.alive() and self.written() - begin <= most and time.monotonic() - begins_s < patience_s:
                time.sleep(self.random.uniform(0.001, 0.02))
            struck = job.alive()
            job.kill()
            self.kills["any moment"] += struck
            return
        point = self.random.choice(POINTS)
        victim = 0 if point in ("sync", "commit", "retention", "metrics") else self.random.randrange(2)
        most = {"load": 60, "step": 8, "metrics": 12, "write": 3, "retention": 2}.get(point, 3)
        job = self.start(self.config, victim, point, self.random.randint(1, most))
        left_alone = self.random.random() < 0.5
        while job.alive() and self.written() - begin <= 24:
            time.sleep(0.002)
        if left_alone and not job.alive():
            job.wait()  # The other rank finds out.
        else:
            job.kill()
        self.kills[point if job.processes[victim].exitcode == -signal.SIGKILL else "missed"] += 1

    def written(self) -> int:
        """Lines of metrics.jsonl, a measure of progress."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def check(self) -> None:
        """Everything is as if nothing had happened."""
        assert losses(self.run) == losses(self.calm)
        for kind in ("train", "val"):
            timeless = [[without_times(r) for r in records(run, kind)] for run in (self.run, self.calm)]
            assert timeless[0] == timeless[1]
        for kept in ("weight", "exp_avg", "exp_avg_sq", "ema"):
            ours, calm = (tensors_of(run, kept) for run in (self.run, self.calm))
            assert ours == calm
        checkpoints = self.run / "checkpoints"
        assert steps_in(checkpoints) == steps_in(self.calm / "checkpoints")
        for step in steps_in(checkpoints):
            verify(folder_of(checkpoints, step))
        assert not [path.name for path in checkpoints.iterdir() if not (path / RECORD).is_file()]
        starts = History(self.run).starts()
        assert len(starts) > sum(self.kills.values()) / 2  # Some died before they had the folder.
        assert starts[-1].code == 0 and all(start.code in (None, 1) for start in starts[:-1])


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not k.endswith("_s") and k not in ("memory_gib", "slowest_rank")}


def tensors_of(run: Path, kind: str) -> dict[str, bytes]:
    from mvar.checkpoint.loading import CheckpointReader

    checkpoints = run / "checkpoints"
    reader = CheckpointReader(folder_of(checkpoints, steps_in(checkpoints)[-1]))
    sizes = {name: math.prod(shape) for name, shape in reader.record.shapes.items()}
    return {name: reader.read(name, kind, 0, size).numpy().tobytes() for name, size in sizes.items()}


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_storm_of_kills_changes_no_bit(tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "store")
    storm = Storm(tmp_path, store, steps=10 * kills, seed=kills)
    storm.to_the_end(storm.calm_config)
    while sum(storm.kills.values()) < kills:
        storm.strike()
        assert not (storm.run / "FINISHED").exists(), "the run ended before it was killed often enough"
    storm.to_the_end(storm.config)
    storm.check()
    with capsys.disabled():
        print(f"\n{sum(storm.kills.values())} kills over {10 * kills} steps: {dict(storm.kills.most_common())}")
