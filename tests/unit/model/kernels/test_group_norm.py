"""Group norm and SiLU of channels_last maps: who computes it, our kernels' numbers in Triton's interpreter, and their
binaries."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mvar.model.kernels.group_norm import _ours, group_norm
from tests.golden import REPOSITORY
from tests.group_norm_interpreter import CASES

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    command = [sys.executable, "-m", "tests.group_norm_interpreter"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this numpy (3.6 with 2.5)")
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_triton
@pytest.mark.parametrize("case", [*(f"{name} fp32" for name in CASES), "several runs without SiLU"])
def test_kernels_equal_float64(differences: dict[str, float], case: str) -> None:
    assert differences[case] < (1e-5 if case.startswith("far") else 1e-6)
    assert differences["several runs fp16"] < 1e-3


@needs_triton
def test_an_image_does_not_depend_on_its_company(differences: dict[str, float]) -> None:
    assert differences["company"] == 0


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("channels", "dtype"), [(160, torch.bfloat16), (640, torch.bfloat16), (320, torch.float32)])
def test_kernels_compile_and_fit(architecture: int, channels: int, dtype: torch.dtype) -> None:
    from mvar.model.kernels import group_norm_triton
    from tests.triton_compiler import recorded

    with recorded(group_norm_triton) as launches:
        x_BCHW = torch.empty(2, channels, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
        group_norm_triton.fused(x_BCHW, torch.empty(channels), torch.empty(channels), 32, 1e-6, silu=True)
    assert len(launches) == 3
    for launch in launches:
        binary = launch.compiled_for(architecture)
        assert binary.stack_bytes == 0 and binary.registers <= 64
        assert not re.search(r"\b(atom|red)\.", binary.ptx), "adds in whatever order programs end"
        assert not re.search(r"\b(ld|st)\.global\.b16", binary.ptx), "moves one number at a time"


@pytest.mark.parametrize("silu", [False, True])
def test_elsewhere_torch_computes_it(silu: bool) -> None:
    norm, x_BCHW = nn.GroupNorm(4, 8), torch.randn(2, 8, 5, 5)
    wanted = F.silu(norm(x_BCHW)) if silu else norm(x_BCHW)
    assert torch.equal(group_norm(norm, x_BCHW, silu=silu), wanted)
    with torch.no_grad():
        assert torch.equal(group_norm(norm, x_BCHW, silu=silu), wanted)


def test_our_kernels_are_for_channels_last_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvar.model.kernels.group_norm.usable", lambda *_, **__: True)
    first = torch.randn(2, 8, 5, 5)
    last = first.contiguous(memory_format=torch.channels_last)
    assert not _ours(last), "a gradient may be wanted"
    with torch.no_grad():
        assert _ours(last) and not _ours(first) and not _ours(last[:, :4])
