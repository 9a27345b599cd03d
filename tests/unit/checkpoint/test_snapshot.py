"""A snapshot's memory: its pages are locked for a GPU, and who cannot lock them says what that costs.

That copies beside a step are of their moment: tests/integration/test_train_stages.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mvar.checkpoint import snapshot


def test_on_a_cpu_nothing_is_locked_or_copied_aside() -> None:
    assert snapshot.aside_of(torch.device("cpu"), torch.empty(4)) is None


@pytest.mark.parametrize("code", [0, 2])
def test_pages_are_locked_as_they_are_or_it_is_said(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, int, int]] = []

    def register(pointer: int, size: int, flags: int) -> int:
        asked.append((pointer, size, flags))
        return code

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(snapshot, "Aside", lambda device: device)
    buffer, gpu = torch.empty(1000), torch.device("cuda", 1)
    assert snapshot.aside_of(gpu, buffer) == gpu
    assert asked == [(buffer.data_ptr(), 4000, 0)]
    assert ("cannot be locked" in caplog.text and "ulimit -l" in caplog.text) == bool(code)
