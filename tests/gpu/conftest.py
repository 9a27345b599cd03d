"""Tests that need one GPU: `make test-gpu`. Without one they skip.

`MVAR_GPU_TESTS_ON=cpu` rehearses them on a CPU, without the kernels that only a GPU has. `=interpreter` adds
mamba-ssm's kernels in Triton's interpreter, which knows float32 alone and takes minutes.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

ON = os.environ.get("MVAR_GPU_TESTS_ON", "cuda")

# One configuration for each of mamba-ssm's kernels. Otherwise each process compiles all, minutes of them, to time them.
os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
os.environ.setdefault("CAUSAL_CONV1D_DETERMINISTIC", "1")
if os.environ["MAMBA_DETERMINISTIC"] == "1":
    os.environ.pop("TRITON_CACHE_AUTOTUNING", None)  # it would have them compiled and timed after all
if ON == "interpreter":
    from tests.mamba_interpreter import install

    install()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With MVAR_GPU_TESTS_LOG=FILE, one line of JSON for each test as soon as it is done: a run that is cut off, on a
    machine that is lent by the minute, has then said what it found."""
    path = os.environ.get("MVAR_GPU_TESTS_LOG")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    line |= {"said": report.capstdout.strip()[-600:], "why": why.strip()[-2500:]}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU for a rehearsal."""
    if ON != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU here (MVAR_GPU_TESTS_ON=cpu rehearses on the CPU)")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def rehearsal() -> bool:
    """Whether this is no GPU, so that what is large may be small."""
    return ON != "cuda"
