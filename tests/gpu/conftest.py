"""Tests that need one GPU: `make test-gpu`. Without one they skip.

`MVAR_GPU_TESTS_ON=cpu` rehearses them on a CPU, without the kernels that only a GPU has. `=interpreter` adds
mamba-ssm's kernels in Triton's interpreter, which knows float32 alone and takes minutes.
"""

from __future__ import annotations

import os

import pytest
import torch

ON = os.environ.get("MVAR_GPU_TESTS_ON", "cuda")

# One configuration for each of mamba-ssm's kernels. Otherwise each process compiles all, minutes of them, to time them.
os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
os.environ.setdefault("CAUSAL_CONV1D_DETERMINISTIC", "1")
os.environ.pop("TRITON_CACHE_AUTOTUNING", None)  # it would have them compiled and timed after all
if ON == "interpreter":
    from tests.mamba_interpreter import install

    install()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once what fails: a run that is cut off has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        last = str(report.longrepr).strip().splitlines()[-1:]
        print(f"\nFAILED {report.nodeid} ({report.when}): {' '.join(last)[:300]}", flush=True)


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
