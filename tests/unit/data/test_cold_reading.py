"""Samples that have to be waited for are waited for together."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvar.data import store as stores
from mvar.data.store import CodeStore
from mvar.errors import StoreError
from mvar.testing.code_stores import make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("cold") / "store", train=50, views=2)


def test_a_slow_disk_is_asked_for_many_samples_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = CodeStore.open(folder, reader="ram").split("train")
    indices, views = np.arange(17), np.arange(17) % 2
    together = threading.Barrier(8)  # Eight samples wait at once, or nobody gets any further.
    first = threading.Event()
    original: Any = stores._copy

    def slow(*arguments: int) -> None:
        if not first.is_set():
            first.set()
            time.sleep(0.005)  # By this it shows that nothing is in memory.
        else:
            together.wait(30)
        original(*arguments)

    monkeypatch.setattr(stores, "_copy", slow)
    cold = CodeStore.open(folder).split("train")
    assert np.array_equal(cold.codes(indices, views), calm.codes(indices, views))


def test_what_is_in_memory_needs_no_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SLOW_S", 1e9)
    split = CodeStore.open(folder).split("train")
    before = set(threading.enumerate())  # Other tests' readers among them.
    split.codes(np.arange(50), np.zeros(50, np.int64))
    assert set(threading.enumerate()) <= before


def test_an_error_in_a_thread_is_the_readers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SLOW_S", -1.0)
    split = CodeStore.open(folder).split("train")
    split.codes(np.arange(5), np.zeros(5, np.int64))

    address = split._addresses.pop(0)

    def damaged(_: int) -> int:
        if threading.current_thread() is threading.main_thread():
            return address
        raise StoreError("shard train-000000.tar: damaged")

    monkeypatch.setattr(split, "_open", damaged)
    with pytest.raises(StoreError, match=r"train-000000\.tar: damaged"):
        split.codes(np.arange(5), np.zeros(5, np.int64))


def test_a_shard_without_samples_is_no_obstacle_to_loading(tmp_path: Path) -> None:
    store = CodeStore.open(make_store(tmp_path / "store", train=5, val=0), reader="ram")
    assert len(store.split("train")) == 5 and len(store.split("val")) == 0
