"""Helper threads use the GPU of their process, and open none on a machine without."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mvar.checkpoint.record import Progress
from mvar.data.prefetch import read_ahead
from mvar.threads import helper, on_one_core, same_gpu
from tests.unit.checkpoint.test_checkpoint import values
from tests.unit.checkpoint.test_saver import make


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A process on GPU 3: thread -> the GPU that it chose."""
    found: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: found.update({threading.current_thread().name: index}))
    return found


def test_threads_choose_the_gpu_of_who_starts_them(chosen: dict[str, int], tmp_path: Path) -> None:
    helper(lambda: None, "plain").join()
    reading = read_ahead(iter([1, 2]))
    assert next(reading) == 1
    reading.close()
    saving = make(tmp_path, values(1))
    saving.save(Progress(1))
    saving.settle()
    with ThreadPoolExecutor(1, "pool", initializer=same_gpu()) as pool:
        pool.submit(int).result()
    assert chosen == {"plain": 3, "mvar-read-ahead": 3, "mvar-checkpoint": 3, "pool_0": 3}


def test_without_a_gpu_nothing_of_cuda_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("CUDA was touched")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, name, never)
    ran = threading.Event()
    helper(ran.set, "plain").join()
    assert ran.is_set()


def test_work_on_one_core_leaves_the_threads_of_others_alone_and_raises_what_it_raised() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert on_one_core(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            on_one_core(lambda: 1 // 0)
    finally:
        torch.set_num_threads(before)
