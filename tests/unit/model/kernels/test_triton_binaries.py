"""Our Triton kernels compiled for GPUs that this machine does not have: what is launched fits registers and memory."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed (make setup-dev)")

from mvar.model.kernels import cross_entropy_triton, gated_norm_triton, qk_norm_triton, residual_norm_triton
from tests.triton_compiler import Launch, recorded

IMAGES, TOKENS = 2, 5
HEAD_WIDTH = 64
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Most that one program may have (CUDA programming guide, technical specifications by compute capability)."""
REGISTER_FILE = 65536


def block_launches(width: int, dtype: torch.dtype) -> list[Launch]:
    """Every launch of a block of the model, forward and backward, with slices and strides as the model hands them."""
    heads = width // HEAD_WIDTH
    with recorded(residual_norm_triton, qk_norm_triton, gated_norm_triton) as launches:
        x_BLC = torch.empty(IMAGES, TOKENS, width, requires_grad=True)
        h_BLC = torch.empty(IMAGES, TOKENS, width, dtype=dtype, requires_grad=True)
        vectors_B9C = torch.empty(IMAGES, 9, width, requires_grad=True)
        gate, scale, shift = vectors_B9C[:, 0], vectors_B9C[:, 3], vectors_B9C[:, 6]
        first, y = residual_norm_triton.fused(x_BLC, None, None, scale, shift, dtype, 1e-6)
        new, z = residual_norm_triton.fused(first, h_BLC, gate, scale, shift, dtype, 1e-6)
        last, _ = residual_norm_triton.fused(new, h_BLC, gate, None, None, dtype, 1e-6)
        assert y is not None and z is not None
        torch.autograd.backward((last, y, z), (torch.empty_like(last), torch.empty_like(y), torch.empty_like(z)))

        qkv = torch.empty(IMAGES, TOKENS, 3, heads, HEAD_WIDTH, dtype=dtype, requires_grad=True)
        parts = qk_norm_triton.fused(qkv, torch.empty(heads, requires_grad=True), 1e-12)
        torch.autograd.backward(parts, [torch.empty_like(part) for part in parts])

        scanned = torch.empty(IMAGES, TOKENS, 2 * width, dtype=dtype, requires_grad=True)
        projected = torch.empty(IMAGES, TOKENS, 4 * width + 128 + 2 * heads, dtype=dtype)  # rows as of in_proj
        weight = torch.empty(2 * width, requires_grad=True)
        out = gated_norm_triton.fused(scanned, projected[..., : 2 * width].requires_grad_(), weight, 1e-5)
        out.backward(torch.empty_like(out))
    return launches


def faults(launches: list[Launch], architecture: int) -> list[str]:
    """What is wrong with the binaries, one line each."""
    found = []
    for launch in launches:
        binary = launch.compiled_for(architecture)
        name = f"{launch.kernel.__module__}.{launch.kernel.__name__} {launch.arguments.get('WIDTH')}"
        if binary.stack_bytes:
            found.append(f"{name}: {binary.stack_bytes} bytes of registers spilled")
        if binary.registers * binary.warps * 32 > REGISTER_FILE:
            found.append(f"{name}: {binary.warps} warps of {binary.registers} registers do not fit")
        if binary.shared_bytes > SHARED_BYTES[architecture]:
            found.append(f"{name}: {binary.shared_bytes} bytes of shared memory")
        if re.search(r"\b(atom|red)\.", binary.ptx):
            found.append(f"{name}: adds in whatever order programs end")
        if re.search(r"\b(ld|st)\.global\.b16", binary.ptx):
            found.append(f"{name}: moves one number at a time")
    return found


def loss_launches(words: int, dtype: torch.dtype, smoothing: float) -> list[Launch]:
    with recorded(cross_entropy_triton) as launches:
        logits = torch.empty(TOKENS, words, dtype=dtype, requires_grad=True)
        loss, _, _ = cross_entropy_triton.fused(logits, torch.zeros(TOKENS, dtype=torch.int64), smoothing)
        loss.sum().backward()
    return launches


CASES = [
    (80, 768, torch.float16),
    (90, 1024, torch.bfloat16),
    (100, 1920, torch.bfloat16),
    (90, 2048, torch.float32),
    (90, 2304, torch.bfloat16),
]
ALL = [
    (architecture, 64 * depth, dtype)
    for architecture in SHARED_BYTES
    for depth in (12, 16, 20, 24, 30, 32, 36)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


@pytest.mark.parametrize(("architecture", "width", "dtype"), CASES)
def test_kernels_of_a_block_compile_and_fit(architecture: int, width: int, dtype: torch.dtype) -> None:
    launches = block_launches(width, dtype)
    assert len(launches) == 10
    assert faults(launches, architecture) == []


@pytest.mark.parametrize(("architecture", "smoothing"), [(80, 0.1), (90, 0.0), (100, 0.0)])
def test_kernels_of_the_loss_compile_and_fit(architecture: int, smoothing: float) -> None:
    launches = loss_launches(4096, torch.float32, smoothing)
    assert len(launches) == 2
    assert faults(launches, architecture) == []


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "width", "dtype"), [case for case in ALL if case not in CASES])
def test_kernels_of_a_block_compile_and_fit_at_every_depth(architecture: int, width: int, dtype: torch.dtype) -> None:
    assert faults(block_launches(width, dtype), architecture) == []
