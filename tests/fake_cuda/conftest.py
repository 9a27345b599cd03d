"""Tests of what only a GPU does, without one: `make test-fake-cuda`. They need torch's CUDA build, and skip without."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def built_with_cuda() -> None:
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built without CUDA (make test-fake-cuda installs the other build)")
