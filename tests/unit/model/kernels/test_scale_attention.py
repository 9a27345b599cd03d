"""Our own attention kernels: their numbers in Triton's interpreter, in a process of its own, and their binaries."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch

from tests.golden import REPOSITORY

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed (make setup-dev)", allow_module_level=True)

from mvar.model.kernels import scale_attention_triton
from mvar.model.kernels.scale_attention_triton import attend, bounds
from tests.attention_interpreter import CASES
from tests.triton_compiler import recorded

TEN = tuple(side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "tests.attention_interpreter"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", [*(f"{name} fp32" for name in CASES), "pyramid fp16"])
def test_attention_and_its_gradients_equal_the_definition(differences: dict[str, dict[str, float]], case: str) -> None:
    found = differences[case]
    assert {"out", "dq", "dk", "dv"} <= found.keys()
    assert ("dscale" in found) == (not case.startswith(("plain", "one token")))
    assert max(found.values()) < (3e-3 if "fp16" in case else 3e-6), found


def test_bounds_are_those_of_each_tokens_scale() -> None:
    assert bounds((1, 4), torch.device("cpu")).tolist() == [[0, 1, 1, 1, 1], [1, 5, 5, 5, 5]]


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unit", [True, False])
def test_kernels_compile_without_spills(architecture: int, dtype: torch.dtype, unit: bool) -> None:
    with recorded(scale_attention_triton) as launches:
        qkv = torch.empty(2, sum(TEN), 3, 16, 64, dtype=dtype, requires_grad=True)
        out = attend(qkv, torch.empty(16, requires_grad=True) if unit else None, TEN, 1.0, 1e-12)
        out.backward(torch.empty_like(out))
    assert len(launches) == 3
    for launch in launches:
        binary = launch.compiled_for(architecture)
        assert binary.stack_bytes == 0 and binary.shared_bytes <= 100 << 10
        assert not re.search(r"\b(atom|red)\.", binary.ptx), "adds in whatever order programs end"
