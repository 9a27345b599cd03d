"""Our Triton kernels' numbers, in Triton's interpreter in a process of its own, and when they are taken."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from mvar.model.kernels import launch
from mvar.model.kernels.launch import block, cut, obstacle, usable, warps
from tests.golden import REPOSITORY

Found = dict[str, dict[str, float]]
BOUNDS = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1e-2}
"""Of 16-bit results about two units in the last place: the interpreter cuts off where a GPU rounds."""


def interpreted(*arguments: str) -> Found:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed (make setup-dev)")
    command = [sys.executable, "-m", "tests.fused_interpreter", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this numpy (3.6 with 2.5)")
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def differences() -> Found:
    return interpreted()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kernel", ["residual", "qk", "gated", "entropy"])
def test_kernels_equal_float64_autograd_forward_and_backward(differences: Found, kernel: str, dtype: str) -> None:
    cases = {name: case for name, case in differences.items() if name.startswith(f"{kernel} {dtype} ")}
    assert len(cases) >= 2
    for name, case in cases.items():
        for result, value in case.items():
            # Sums over tokens and what is carried on are float32, whatever the branch computes in.
            exact = result.startswith(("new", "dx", "dgate", "dscale", "dshift", "dweight"))
            assert value < BOUNDS["fp32" if exact else dtype], (name, result, value)


@pytest.mark.parametrize(
    ("case", "results"),
    [
        ("residual fp32 192", "new y dx dh dgate dscale dshift"),
        ("residual fp32 norm only", "new y dx dscale dshift"),
        ("residual fp32 residual only", "new dx dh dgate"),
        ("residual fp32 new unused", "new y dx dh dgate dscale dshift"),
        ("residual fp32 y unused", "new y dx dh dgate"),
        ("qk fp32 zeros", "q k v dqkv dscale"),
        ("gated fp32 strided", "out dy dz dweight"),
    ],
)
def test_every_result_and_gradient_was_compared(differences: Found, case: str, results: str) -> None:
    assert sorted(differences[case]) == sorted(results.split())


def test_recomputation_and_inference_give_the_same_bits(differences: Found) -> None:
    found = differences["recomputation"]
    assert len(found) == 13
    assert set(found.values()) == {0.0}


def test_nothing_is_kept_that_the_model_does_not_hold_anyway(differences: Found) -> None:
    assert differences["kept"] == {"residual": 1.0, "qk": 1.0}


@pytest.mark.slow
def test_a_whole_pyramid_of_tokens() -> None:
    found = interpreted("long")
    assert [len(case) for case in found.values()] == [7, 5, 4]
    assert all(value < 3e-6 for case in found.values() for value in case.values()), found


@pytest.mark.parametrize("items", [1, 2, 31, 32, 33, 680, 43520])
@pytest.mark.parametrize("programs", [1, 16, 1000, 4096])
@pytest.mark.parametrize("multiple", [1, 2, 32])
def test_runs_cover_every_item_once(items: int, programs: int, multiple: int) -> None:
    runs, each = cut(items, programs, multiple)
    assert runs <= programs
    assert each % multiple == 0
    assert (runs - 1) * each < items <= runs * each


@pytest.mark.parametrize(("width", "size", "number"), [(64, 64, 1), (768, 1024, 4), (1024, 1024, 4), (2304, 4096, 16)])
def test_a_row_fits_its_block(width: int, size: int, number: int) -> None:
    assert (block(width), warps(block(width))) == (size, number)


def test_why_kernels_are_not_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(2, 3, 64)
    assert not usable(x)
    assert obstacle(x) == "tensors on cpu, not on a CUDA device"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert obstacle(x.double()) == "no kernels for torch.float64"
    assert obstacle(x, width=8193) == "rows of 8193 elements, more than 8192"
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    launch._installed.cache_clear()
    assert obstacle(x) == "the package triton is not installed"
    launch._installed.cache_clear()
