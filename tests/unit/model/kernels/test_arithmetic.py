"""What fp32 means: torch's flags can be set and read without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from mvar.config import Precision, Switch
from mvar.errors import BackendError
from mvar.model.kernels.arithmetic import Arithmetic, ieee, products, running_sum, tf32_allowed
from mvar.tokenizer.quantizer import Quantizer

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what a test changes."""
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    os.environ.pop("TRITON_F32_DEFAULT", None)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def allowed() -> tuple[bool, bool]:
    """TF32 in matrix products, in convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("precision", "tf32", "matmuls", "convolutions"),
    [
        ("bf16", "auto", True, False),
        ("bf16_autocast", "auto", True, False),
        ("fp16", "auto", True, False),
        ("fp32", "auto", False, False),
        ("bf16", "off", False, False),
        ("fp32", "on", True, True),
    ],
)
def test_tf32_is_for_runs_in_16_bits_and_by_name(
    precision: Precision, tf32: Switch, matmuls: bool, convolutions: bool
) -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    found = Arithmetic.of(precision, tf32, GPU)
    found.apply()
    assert allowed() == (matmuls, convolutions) and tf32_allowed() == matmuls
    assert os.environ.get("TRITON_F32_DEFAULT") == (None if matmuls else "ieee")
    assert ("in TF32" in str(found)) == matmuls and precision in str(found)


def test_a_cpu_is_left_alone_and_has_no_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    Arithmetic.of("bf16", "auto", CPU).apply()
    assert allowed() == (False, True)
    with pytest.raises(BackendError, match=r"engine\.tf32=on: got device cpu"):
        Arithmetic.of("bf16", "on", CPU)


def test_what_must_be_exact_is_exact_whatever_the_process_allows() -> None:
    Arithmetic.of("fp32", "on", GPU).apply()
    with ieee(GPU):
        assert allowed() == (False, False)
        with products(GPU, tf32=True):
            assert allowed() == (True, True)
        assert allowed() == (False, False)
    assert allowed() == (True, True)
    with pytest.raises(RuntimeError, match="inside"), ieee(GPU):
        raise RuntimeError("inside")
    assert allowed() == (True, True)


def test_the_quantizer_asks_for_exact_products_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr("mvar.tokenizer.quantizer.ieee", lambda device: (asked.append(device), ieee(device))[1])
    quantizer = Quantizer(16, 4, (1, 2, 3))
    for call in (
        lambda: quantizer.encode(torch.randn(1, 4, 3, 3)),
        lambda: quantizer(torch.randn(1, 4, 3, 3)),
        lambda: quantizer.inputs_from_codes(torch.zeros(1, 14, dtype=torch.int64)),
        lambda: quantizer.nearest(torch.randn(2, 4)),
    ):
        asked.clear()
        call()
        assert asked and set(asked) == {CPU}


def test_running_sums_are_cumsum_and_leave_the_switch_alone() -> None:
    x = torch.randn(3, 5)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(running_sum(x, 1, torch.float64), x.cumsum(1, dtype=torch.float64))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
