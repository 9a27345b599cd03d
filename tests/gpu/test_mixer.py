"""Every backend of the Mamba-2 mixer against float64 on the CPU: all tokens at once, and scale by scale with a state.

causal-conv1d wants rows that begin at multiples of 8 elements. A row of the input projection has 4C + 128 + 2C/64:
3,224 at depth 12, a multiple, and 7,868 at depth 30, which is 4 more than one. Narrow layers stand for both.

Shapes: B images, L tokens, C width.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from mvar.model.mamba2 import Mamba2, MambaBackend, MambaState
from tests.golden import REPOSITORY
from tests.gpu.conftest import ON
from tests.gpu.parity import (
    BANDS,
    LENGTHS_256,
    MODES,
    TF32,
    Band,
    Mode,
    assert_near,
    backend_or_skip,
    error,
    place,
    results,
)

pytestmark = pytest.mark.gpu

NARROW = {"stride of depth 12": 256, "stride of depth 30": 128}
TRUE = {"depth 12": 768, "depth 30": 1920}
IMAGES = {"one image": 1, "many": 5}
LENGTHS = (1, 4, 9, 16) if ON == "interpreter" else LENGTHS_256
"""The interpreter needs minutes for the kernels' chunk of 256 tokens."""


@lru_cache
def reference(width: int, images: int) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Weights, input, cotangent and results in float64."""
    generator = torch.Generator().manual_seed(width + images)
    module = Mamba2(width, backend="torch").double()
    for name, parameter in module.named_parameters():
        if name == "A_log":
            nn.init.uniform_(parameter, 0.0, 2.7, generator=generator)
        elif name == "dt_bias":
            nn.init.uniform_(parameter, -6.0, -2.0, generator=generator)
        else:
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
    x_BLC, cotangent_BLC = (
        torch.randn(images, sum(LENGTHS), width, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return module.state_dict(), x_BLC, cotangent_BLC, results(module, module, x_BLC, cotangent_BLC)


@lru_cache
def reference_state(width: int, images: int) -> MambaState:
    weights, x_BLC, *_ = reference(width, images)
    module = Mamba2(width, backend="torch").double()
    module.load_state_dict(weights)
    state = MambaState()
    with torch.no_grad():
        module(x_BLC, state)
    return state


def mixer(width: int, backend: MambaBackend, weights: dict[str, Tensor], device: torch.device, mode: Mode) -> nn.Module:
    kernels = backend in ("mamba_ssm", "triton")
    if kernels and device.type == "cpu" and (ON != "interpreter" or mode.dtype != torch.float32):
        pytest.skip("the kernels need a GPU (MVAR_GPU_TESTS_ON=interpreter: float32 alone)")
    module = backend_or_skip(lambda: Mamba2(width, backend=backend))
    place(module, weights, device, mode)
    return module


def band_of(backend: MambaBackend, mode: Mode) -> Band:
    return TF32 if backend == "mamba_ssm" and mode.dtype == torch.float32 else BANDS[mode.dtype]


def run_whole(
    device: torch.device, backend: MambaBackend, width: int, images: int, mode: Mode
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is found, what is wanted."""
    weights, x_BLC, cotangent_BLC, wanted = reference(width, images)
    module = mixer(width, backend, weights, device, mode)

    def run(x: Tensor) -> Tensor:
        with mode.running(device):
            return module(x)  # type: ignore[no-any-return]

    x_BLC = x_BLC.to(device, mode.dtype if mode.stored else torch.float32)
    return results(module, run, x_BLC, cotangent_BLC), wanted


def run_carried(device: torch.device, backend: MambaBackend, width: int, images: int, mode: Mode) -> None:
    """Scale by scale, as sampling does it, against the whole sequence at once."""
    weights, x_BLC, _, wanted = reference(width, images)
    module, state, parts = mixer(width, backend, weights, device, mode), MambaState(), []
    with torch.no_grad(), mode.running(device):
        for part_BLC in x_BLC.to(device, mode.dtype if mode.stored else torch.float32).split(LENGTHS, dim=1):
            parts.append(module(part_BLC, state))
    band, end = band_of(backend, mode), reference_state(width, images)
    assert error(torch.cat(parts, dim=1), wanted["output"]) <= band.value
    assert state.ssm_BHPN is not None and state.tail_BVK is not None
    assert end.ssm_BHPN is not None and end.tail_BVK is not None
    assert state.ssm_BHPN.dtype == state.tail_BVK.dtype == torch.float32
    assert error(state.ssm_BHPN, end.ssm_BHPN) <= band.value
    assert error(state.tail_BVK, end.tail_BVK) <= band.value


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("stride", NARROW)
@pytest.mark.parametrize("backend", get_args(MambaBackend))
def test_mixer_equals_float64(
    device: torch.device, backend: MambaBackend, stride: str, images: str, mode: Mode
) -> None:
    found, wanted = run_whole(device, backend, NARROW[stride], IMAGES[images], mode)
    assert_near(found, wanted, band_of(backend, mode))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("stride", NARROW)
@pytest.mark.parametrize("backend", get_args(MambaBackend))
def test_state_carried_over_the_scales_equals_float64(
    device: torch.device, backend: MambaBackend, stride: str, images: str, mode: Mode
) -> None:
    run_carried(device, backend, NARROW[stride], IMAGES[images], mode)


@pytest.mark.skipif(ON == "interpreter", reason="hours in the interpreter")
@pytest.mark.parametrize("depth", TRUE)
def test_one_layer_of_true_width_equals_float64(device: torch.device, rehearsal: bool, depth: str) -> None:
    """What `auto` takes, in bf16, on two images, both ways."""
    mode, width = Mode(torch.bfloat16), NARROW[f"stride of {depth}"] if rehearsal else TRUE[depth]
    found, wanted = run_whole(device, "auto", width, 2, mode)
    assert_near(found, wanted, BANDS[mode.dtype])
    run_carried(device, "auto", width, 2, mode)


@pytest.mark.xdist_group("tuned")
def test_kernels_as_users_run_them_equal_float64(device: torch.device) -> None:
    """Tuned, and adding with atomics, in a process of its own. The first time on a machine it takes two minutes."""
    if device.type == "cpu":
        pytest.skip("nothing is tuned on a CPU")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MVAR_GPU_TESTS"))}
    environ |= {"MAMBA_DETERMINISTIC": "0", "CAUSAL_CONV1D_DETERMINISTIC": "0", "TRITON_CACHE_AUTOTUNING": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)), "-k", "true_width"]
    done = subprocess.run(command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-3000:]
