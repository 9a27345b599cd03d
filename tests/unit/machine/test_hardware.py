"""What nvidia-smi and the kernel say of a machine, read right."""

from pathlib import Path

import pytest

from mvar.machine import hardware
from mvar.machine.hardware import look_at_compilers, look_at_gpus


def stand_in(folder: Path, name: str, prints: str) -> None:
    """A program that prints something whatever it is asked."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\n")
    path.chmod(0o755)


def test_gpus_are_named_with_what_matters_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        "0, NVIDIA H100 80GB HBM3, 81559, 12, 580.159.04, Disabled, Default",
        "1, NVIDIA A100-SXM4-80GB, 81920, 5, 580.159.04, Enabled, Exclusive_Process",
        "2, Some Card, 1000, 0, 1.0, [N/A], Default",
    ]
    stand_in(tmp_path, "nvidia-smi", "\n".join(rows))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    first, second, third, torch_says, *_ = look_at_gpus()
    assert first.name == "GPU 0" and "81559 MiB (12 used), driver 580.159.04, 989 TFLOP/s" in first.text
    assert "MIG" in second.text and "Exclusive_Process" in second.text and "MIG" not in first.text
    assert "peak_tflops" in third.text
    assert torch_says.name == "torch"


def test_gpus_that_torch_does_not_see_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "nvidia-smi", "0, NVIDIA H100 80GB HBM3, 81559, 12, 580.159.04, Disabled, Default")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert look_at_gpus()[-1].state == "bad"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert look_at_gpus()[-1].state == "good", "they are hidden on purpose"


def test_a_compiler_that_is_missing_is_named_with_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "g++", "g++ (Debian 12.2.0-14) 12.2.0")
    (tmp_path / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {finding.name: finding for finding in look_at_compilers(has_gpu=True)}
    assert found["g++"].text.startswith("12.2.0 at") and found["g++"].state == "good"
    assert found["nvcc"].state == "missing" and found["ninja"].fix == "pip install ninja"
    assert not {finding.name: finding for finding in look_at_compilers(has_gpu=False)}["nvcc"].fix


def test_what_a_job_may_use_of_a_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "affinity", lambda: {*range(16)})
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 2.5)
    monkeypatch.setattr(hardware, "memory_limit", lambda: 3 * 2**30)
    found = {finding.name: finding.text for finding in hardware.look_at_host()}
    assert found["cores"].startswith("16 of ") and found["cores"].endswith("2.5 cores' time of them")
    assert found["memory"].endswith("the job may have 3.0")


def test_a_command_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "ANSWER_WITHIN_S", 0.2)
    assert hardware.said_by(["sleep", "30"]) is None
    assert hardware.said_by(["false"]) is None
    assert hardware.said_by([str(tmp_path / "nothing")]) is None
