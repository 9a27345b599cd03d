"""Our own kernels of the Mamba-2 mixer: their numbers in Triton's interpreter, in a process of its own, and their
binaries."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch

from mvar.model.mamba2 import Mamba2, MambaState
from tests.golden import REPOSITORY

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed (make setup-dev)", allow_module_level=True)

from mvar.model.kernels import causal_conv_triton, gated_norm_triton, mixer_triton, ssd_triton
from mvar.model.kernels.mixer_triton import Layout
from mvar.model.kernels.ssd_triton import Decays
from tests.mixer_interpreter import CASES
from tests.triton_compiler import Launch, recorded

TOKENS = 680
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SPILLED_BYTES = {80: 256, 90: 32, 100: 32}
"""What a thread keeps outside of its registers, at most. The kernels are made for Hopper and later: with Triton 3.7 it
is nothing there, with 3.6 24 bytes in the kernel that starts from a state."""
PARAMETERS = [name for name, _ in Mamba2(32, backend="torch").named_parameters()]


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "tests.mixer_interpreter"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this numpy (3.6 with 2.5)")
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", [*(f"{name} fp32" for name in CASES), "two chunks fp16"])
def test_results_and_gradients_equal_float64(differences: dict[str, dict[str, float]], case: str) -> None:
    found = differences[case]
    assert found.keys() == {"out", "dx", *(f"d{name}" for name in PARAMETERS)}
    assert max(found.values()) < (1e-2 if "fp16" in case else 5e-5), found


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_state_carried_over_the_scales_equals_float64(differences: dict[str, dict[str, float]], dtype: str) -> None:
    found = differences[f"carried {dtype}"]
    assert found.keys() == {"out", "state", "tail"}
    assert max(found.values()) < (2e-3 if dtype == "fp16" else 5e-6), found


def test_a_training_keeps_the_input_and_the_output_of_the_scan_alone() -> None:
    """And a number a token, of the norm; parameters are there anyway."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with recorded(causal_conv_triton, ssd_triton, gated_norm_triton):
        module = Mamba2(64, backend="triton").to(torch.bfloat16)
        parameters = {parameter.data_ptr() for parameter in module.parameters()}
        zxbcdt_BLE = torch.empty(2, TOKENS, module.in_proj.weight.shape[0], dtype=torch.bfloat16).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            module._mix_triton(zxbcdt_BLE, None)
    found = sum(size for at, size in kept.items() if at not in parameters)
    assert found == zxbcdt_BLE.nbytes + 2 * TOKENS * (2 * 128 + 4)


def launches(width: int, dtype: torch.dtype, precision: str = "ieee") -> list[Launch]:
    """Every launch of a mixer: forward and backward, and forward from a state."""
    inner, heads = 2 * width, width // 32
    with recorded(causal_conv_triton, ssd_triton, gated_norm_triton) as found:
        zxbcdt_BLE = torch.empty(2, TOKENS, 2 * inner + 128 + heads, dtype=dtype)
        conv, of_heads, norm_I = (inner + 128, 4), [torch.empty(heads) for _ in range(3)], torch.empty(inner)
        weight_KW, bias_K, layout = torch.empty(conv), torch.empty(conv[0]), Layout(inner, 64, 1e-5, precision)
        out = mixer_triton.mix(
            zxbcdt_BLE.clone().requires_grad_(), weight_KW, bias_K, *of_heads, norm_I, layout, torch.empty(3, heads)
        )
        out.backward(torch.empty_like(out))
        before = torch.empty(2, 3, conv[0]), torch.empty(2, heads, 64, 64)
        mixer_triton.carry(zxbcdt_BLE, weight_KW, bias_K, Decays(*of_heads), norm_I, layout, *before)
    return found


@pytest.mark.parametrize(
    ("architecture", "width", "dtype"),
    [
        (80, 768, torch.float16),
        (90, 1024, torch.bfloat16),
        (90, 1920, torch.float16),  # whose rows begin at multiples of 4 elements
        (100, 1536, torch.bfloat16),
    ],
)
def test_kernels_compile_and_fit(architecture: int, width: int, dtype: torch.dtype) -> None:
    found = [one for one in launches(width, dtype) if "gated_norm" not in one.kernel.__module__]
    assert len(found) == 13  # forward 3; backward the convolution and the steps again, 4 and 1; from a state 3
    for launch in found:
        binary = launch.compiled_for(architecture)
        name = f"{launch.kernel.__module__}.{launch.kernel.__name__}"
        assert binary.stack_bytes <= SPILLED_BYTES[architecture], (name, binary.stack_bytes)
        assert binary.shared_bytes <= SHARED_BYTES[architecture], (name, binary.shared_bytes)
        assert not re.search(r"\b(atom|red)\.", binary.ptx), f"{name}: adds in whatever order programs end"
        if "conv" in name:
            assert not re.search(r"\b(ld|st)\.global\.b16", binary.ptx), f"{name}: moves one number at a time"


def test_products_run_on_the_tensor_cores() -> None:
    for launch in launches(1024, torch.bfloat16):
        if "ssd" in launch.kernel.__module__ and launch.kernel.__name__ != "ssd_steps_kernel":
            assert "wgmma.mma_async" in launch.compiled_for(90).ptx, launch.kernel.__name__


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_kernels_of_float32_compile(precision: str) -> None:
    for launch in launches(1024, torch.float32, precision):
        binary = launch.compiled_for(90)
        assert binary.stack_bytes <= 512
        assert binary.shared_bytes <= SHARED_BYTES[90]


def test_with_gradients_a_state_is_carried_in_torch() -> None:
    """The kernels do not differentiate through one; on a CPU without the interpreter they could not run at all."""
    torch.manual_seed(0)
    module = Mamba2(32, backend="triton")
    u_BLC, state = torch.randn(1, 4, 32), MambaState()
    zxbcdt_BLE = module.in_proj(u_BLC)
    mixed_BLI = module._mix_triton(zxbcdt_BLE, state)
    assert mixed_BLI.requires_grad and state.ssm_BHPN is not None and state.ssm_BHPN.requires_grad
