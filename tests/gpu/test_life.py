"""A run's life on a GPU, by its command line: trained, drawn from on the way, killed with SIGKILL, resumed, sampled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvar.config import EngineConfig
from mvar.testing.code_stores import make_store
from mvar.testing.tiny_runs import losses, records, write_config
from tests.golden import REPOSITORY

pytestmark = pytest.mark.gpu

STEPS, SAVE_EVERY, KILL_AT = 24, 8, 11
SECONDS = 200
"""Longest that a process may take; a test that hangs must not take the others' time."""


def start(module: str, arguments: Sequence[str], log: Path, device: torch.device) -> subprocess.Popen[bytes]:
    environ = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
    with log.open("ab") as file:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environ, stdout=file, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        code = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        code = -1
    assert code == 0, f"exit code {code}\n{log.read_text(errors='replace')[-3000:]}"


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int, log: Path) -> None:
    """Until the run has recorded `step`; its process must live."""
    metrics, since_s = run / "metrics.jsonl", time.monotonic()
    while process.poll() is None and time.monotonic() - since_s < SECONDS:
        if metrics.exists() and f'"kind": "train", "step": {step},' in metrics.read_text():
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"step {step} was not reached; exit code {process.wait()}\n{log.read_text(errors='replace')[-3000:]}")


def lives(folder: Path, device: torch.device, **overrides: Any) -> tuple[Path, Path]:
    """Folders of a run that nobody disturbed and of one that was killed and resumed.

    The second begins once the first has done a step: the kernels that the first has tuned are then the second's too.
    """
    store = make_store(folder / "store", train=64)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "checkpoint__every_steps": SAVE_EVERY,
        "data__tokenizer": str(store / "tokenizer.safetensors"),
        "tracking__sample_every": STEPS // 2,
        "engine__precision": "bf16",
    }
    settings |= overrides
    logs = {name: folder / f"{name}.log" for name in ("whole", "killed")}
    arguments = {name: ["--config", str(write_config(folder, store, name, **settings))] for name in logs}
    whole = start("mvar.train", arguments["whole"], logs["whole"], device)
    wait_for_step(whole, folder / "whole", 1, logs["whole"])
    killed = start("mvar.train", arguments["killed"], logs["killed"], device)
    wait_for_step(killed, folder / "killed", KILL_AT, logs["killed"])
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    finish(start("mvar.train", arguments["killed"], logs["killed"], device), logs["killed"])
    finish(whole, logs["whole"])
    assert len(losses(folder / "killed")) == len(losses(folder / "whole")) == STEPS
    assert [record["last_step"] for record in records(folder / "killed", "resume")] == [STEPS, STEPS]
    return folder / "whole", folder / "killed"


@pytest.mark.xdist_group("life")
def test_a_killed_run_goes_on_and_can_be_drawn_from(device: torch.device, tmp_path: Path) -> None:
    whole, killed = lives(tmp_path, device)
    # Atomics and tuned kernels differ by rounding from run to run; training makes that grow.
    assert losses(killed) == pytest.approx(losses(whole), rel=2e-2)
    drawn = sorted((killed / "samples").glob("*.png"))
    assert len(drawn) == 2
    for path in drawn:
        assert np.asarray(Image.open(path)).std() > 0
    out = tmp_path / "samples"
    arguments = ["--weights", str(killed), "--tokenizer", str(tmp_path / "store/tokenizer.safetensors")]
    arguments += ["--per-class", "2", "--precision", "bf16", "--out", str(out)]
    log = tmp_path / "sample.log"
    finish(start("mvar.sample", arguments, log, device), log)
    assert len(list(out.glob("*/*.png"))) == 6


@pytest.mark.xdist_group("deterministic_life")
@pytest.mark.skipif("deterministic" not in EngineConfig.model_fields, reason="this mvar has no engine.deterministic")
def test_a_deterministic_run_that_was_killed_ends_with_the_same_bits(device: torch.device, tmp_path: Path) -> None:
    whole, killed = lives(tmp_path, device, engine__deterministic=True)
    assert losses(killed) == losses(whole)
    names = [run / f"checkpoints/step-{STEPS:09d}/checkpoint.json" for run in (whole, killed)]
    saved = [json.loads(name.read_text())["files"] for name in names]
    for files in saved:
        assert files.pop("config.yaml")  # it names the run
    assert saved[0] == saved[1], "sizes and digests of weights and moments"
