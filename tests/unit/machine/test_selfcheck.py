"""What a machine is made to prove, with faults planted where a bad one has them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar.machine import selfcheck
from mvar.machine.selfcheck import Proof, disk, gpu_errors, memory, product, try_rank, verdicts, wanted

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selfcheck, "SIDE", {"cpu": 128})
    monkeypatch.setattr(selfcheck, "MEMORY_MIB", {"cpu": 1})
    monkeypatch.setattr(selfcheck, "DISK_MIB", 1)
    monkeypatch.setenv("MVAR_CACHE", str(tmp_path))


def test_a_machine_in_order_proves_everything(tmp_path: Path) -> None:
    found = try_rank(CPU, [tmp_path / "..", tmp_path], first_here=True)
    assert [test.problem for test in found] == [None] * len(found)
    assert [test.name for test in found][:5] == ["product", "product", "memory", "disk", "disk"]
    assert all(test.rate for test in found)
    assert [test.name for test in try_rank(CPU, [tmp_path], first_here=False)] == ["product", "product", "memory"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [1.0, -2.0, 128.0])
def test_one_wrong_number_of_a_product_is_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, error: float
) -> None:
    def multiply(a: Tensor, b: Tensor) -> Tensor:
        c = a @ b
        c[3, 5] += error
        return c

    monkeypatch.setattr(selfcheck, "multiply", multiply)
    problem = product(CPU, dtype).problem
    assert problem is not None and "1 of 128 rows and 1 columns" in problem


def test_two_errors_that_cancel_in_a_row_show_in_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(a: Tensor, b: Tensor) -> Tensor:
        c = a @ b
        c[3, 5] += 1
        c[3, 6] -= 1
        return c

    monkeypatch.setattr(selfcheck, "multiply", multiply)
    assert "0 of 128 rows and 2 columns" in str(product(CPU, torch.float32).problem)


def test_memory_that_forgets_a_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clone: Any = Tensor.clone

    def forgetful(self: Tensor) -> Tensor:
        copied: Tensor = clone(self)
        copied[1000] ^= 1 << 40
        return copied

    monkeypatch.setattr(Tensor, "clone", forgetful)
    assert memory(CPU).problem == "1 of 131072 words differ from what they were copied from"


def test_a_full_disk_and_one_that_cannot_be_written_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (missing,) = (test for test in try_rank(CPU, [tmp_path / "none"], first_here=True) if test.problem)
    assert missing.name == "disk" and "No such file" in str(missing.problem)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 2**20))  # type: ignore[attr-defined]
    assert "1 MiB are free" in str(disk(tmp_path).problem)


def test_what_the_driver_counted_is_told_and_what_it_does_not_count_is_not() -> None:
    answers = {
        "--query-gpu": "0, GPU-a, 0, No\n1, GPU-b, 3, No\n2, GPU-c, [N/A], [N/A]\n3, GPU-d, 0, Yes\n",
        "--query-remapped-rows": "GPU-a, No, No\nGPU-b, 0, 1\nGPU-c, [N/A], [N/A]\nGPU-d, Yes, No\n",
    }
    found = gpu_errors(lambda command: answers[command[1].partition("=")[0]])
    assert [str(test.problem).partition(":")[0] for test in found] == [
        "GPU GPU-b",
        "GPU GPU-d",
        "GPU GPU-b",
        "GPU GPU-d",
    ]
    assert "3 memory errors" in str(found[0].problem) and "needs a reset" in str(found[3].problem)
    assert gpu_errors(lambda command: None) == []
    assert gpu_errors(lambda command: 'Field "x" is not a valid field to query.') == []


def test_wrong_is_out_and_slow_is_a_strike_beside_machines_of_its_kind() -> None:
    def rank(rate: float, problem: str | None = None, kind: str = "H100") -> list[Proof]:
        return [Proof("product", "right, so fast", problem, None if problem else rate, kind)]

    found = verdicts([rank(10), rank(9), rank(4), rank(0, "wrong"), rank(1, kind="A100"), rank(11)])
    assert [(verdict.rank, verdict.out) for verdict in found] == [(2, False), (3, True)]
    assert "0.40 of the median" in found[0].evidence and found[1].evidence == "wrong"
    assert [verdict.rank for verdict in verdicts([rank(10), rank(4)])] == [1]


def test_jobs_of_slurm_test_themselves_unless_told_not_to() -> None:
    assert not wanted({}) and wanted({"MVAR_NODE_CHECK": "on"}) and wanted({"SLURM_JOB_ID": "7"})
    assert not wanted({"SLURM_JOB_ID": "7", "MVAR_NODE_CHECK": "off"})
