"""The mamba-ssm path without a GPU: the official Triton kernels in Triton's interpreter, in a process of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.golden import REPOSITORY


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    for package in ("mamba_ssm", "causal_conv1d", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed (make setup-dev)")
    command = [sys.executable, "-m", "tests.mamba_interpreter"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", ["fused", "odd", "unfused"])
def test_official_kernels_equal_torch_forward_and_backward(differences: dict[str, float], path: str) -> None:
    """`fused`: the one kernel call of training; `odd`: the same where rows are no multiple of 8, as at depth 30;
    `unfused`: such rows with an older mamba-ssm."""
    found = {name: value for name, value in differences.items() if name.startswith(f"{path}_")}
    assert len(found) == 10
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("tokens", [1, 4, 9, 16])
def test_state_carried_over_the_scales_equals_torch(differences: dict[str, float], tokens: int) -> None:
    for what in ("output", "state", "tail"):
        assert differences[f"carried_{tokens}_{what}"] < 1e-5
