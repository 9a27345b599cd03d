"""Training through DeepSpeed on one GPU over NCCL: every ZeRO stage and kind of recomputation is the same training.

The trainings run in a few processes of their own, all at once (see engine_runs); tests look at what these wrote. The
reference is the fp32 training on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.golden import REPOSITORY
from tests.gpu.engine_runs import FIRST_SCALE_POWER, cases_of

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("engine")]

GROUPS = ("zero012", "zero3", "zero3_default", "fp16", "memory", "reference")
BAND = {"fp32": 2e-4, "bf16": 5e-3}
"""Relative difference of each of the first steps' losses from the reference."""
MEMORY = (0.7, 1.1)
"""Peak of a step over the plan's."""
SECONDS = 200


@pytest.fixture(scope="module")
def found(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case wrote, or its error."""
    folder = tmp_path_factory.mktemp("engine")
    processes, results = {}, {}
    for group in GROUPS:
        environ = dict(os.environ)
        if group == "reference" or device.type == "cpu":
            environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        with (folder / f"{group}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.gpu.engine_runs", group, str(folder / group)]
            processes[group] = subprocess.Popen(
                command, cwd=REPOSITORY, env=environ, stdout=log, stderr=subprocess.STDOUT
            )
        if device.type == "cpu":
            processes[group].wait()  # a rehearsal: one after the other
    for group, process in processes.items():
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        written = folder / group / f"{group}.json"
        results |= json.loads(written.read_text()) if written.exists() else {}
        for name in cases_of(group).keys() - results.keys():
            tail = (folder / f"{group}.log").read_text(errors="replace")[-3000:]
            results[name] = {"error": f"not reached; exit code {process.poll()}\n{tail}"}
    return results


def result(found: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    assert "error" not in found[name], found[name]["error"]
    print(f"{name}: {found[name]}")
    return found[name]


TRAININGS = [name for group in ("zero012", "zero3", "zero3_default") for name in cases_of(group)]


@pytest.mark.parametrize("name", TRAININGS)
def test_it_is_the_training_of_the_cpu(found: dict[str, dict[str, Any]], name: str) -> None:
    wanted, ours = result(found, "fp32"), result(found, name)
    assert not any(ours["skipped"])
    band = BAND["fp32" if "fp32" in name else "bf16"]
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=band)
    assert ours["norms"] == pytest.approx(wanted["norms"], rel=5 * band)


@pytest.mark.parametrize("name", cases_of("fp16"))
def test_fp16_survives_overflow(found: dict[str, dict[str, Any]], name: str) -> None:
    """The first steps overflow and are skipped, the loss scale comes down, then it trains."""
    wanted, ours = result(found, "fp32"), result(found, name)
    skipped, losses, scales = ours["skipped"], ours["losses"], ours["scales"]
    assert skipped[0] and not skipped[-1]
    assert scales[-1] < scales[0] <= 2**FIRST_SCALE_POWER
    assert ours["skipped_steps"] == sum(skipped)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(wanted["losses"][0], rel=1e-2)
    assert losses[-1] < losses[0]
    assert all((norm is None) == skip for norm, skip in zip(ours["norms"], skipped, strict=True))


@pytest.mark.parametrize("name", cases_of("memory"))
def test_a_step_needs_the_memory_that_was_planned(found: dict[str, dict[str, Any]], name: str) -> None:
    ours = result(found, name)
    if ours["peak"] is None:
        pytest.skip("memory is measured on a GPU")
    assert MEMORY[0] <= ours["peak"] / ours["planned"] <= MEMORY[1], ours["peak"] / ours["planned"]
