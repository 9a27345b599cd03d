"""Compiled extensions: a folder for each build, and no start waits for a compile that was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from torch.utils.file_baton import FileBaton

from mvar.run import compiled_extensions
from mvar.run.compiled_extensions import default_folder, free_locks, prepare

FORK = multiprocessing.get_context("fork")


def compile_in(folder: Path, begun: Event) -> None:
    """What a process that compiles does: takes torch's lock on the extension `folder`, and is busy."""
    assert FileBaton(str(folder / "lock")).try_acquire()
    begun.set()
    signal.pause()


def test_the_lock_of_a_killed_compile_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cpu_adam").mkdir()
    begun = FORK.Event()
    process = FORK.Process(target=compile_in, args=(tmp_path / "cpu_adam", begun))
    process.start()
    begun.wait()
    lock = tmp_path / "cpu_adam" / "lock"
    try:
        free_locks(tmp_path)
        assert lock.exists() and not caplog.messages  # Alive: torch waits for it, as it should.
    finally:
        process.kill()
        process.join()
    assert not FileBaton(str(lock)).try_acquire()  # What a start would wait for.
    free_locks(tmp_path)
    assert "cpu_adam that was killed; removed" in caplog.text
    assert FileBaton(str(lock)).try_acquire()


def test_what_another_machine_compiles_is_waited_for_until_it_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (tmp_path / ".hosts").mkdir()
    (tmp_path / ".hosts" / "another-1").touch()
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert lock.exists()
        if len(slept) == 3:  # Long ago, from here on.
            for path in (lock, lock.parent):
                os.utime(path, (time.time() - 1000, time.time() - 1000))

    monkeypatch.setattr(compiled_extensions.time, "sleep", sleep)
    free_locks(tmp_path)
    assert len(slept) == 3 and not lock.exists()
    told = caplog.messages
    assert ["another machine" in told[0], "removed" in told[1]] == [True, True] and len(told) == 2


def test_a_lock_that_another_machine_gives_back_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (tmp_path / ".hosts").mkdir()
    (tmp_path / ".hosts" / "another-1").touch()
    monkeypatch.setattr(compiled_extensions.time, "sleep", lambda _: lock.unlink())
    free_locks(tmp_path)
    assert "removed" not in caplog.text


def test_the_folder_is_of_this_python_torch_cpu_and_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"MVAR_HOME": str(tmp_path)}
    folder = default_folder(environ)
    assert folder.is_dir() and folder.parent == tmp_path / ".cache" / "torch_extensions"
    assert f"py{sys.version_info[0]}.{sys.version_info[1]}" in folder.name and torch.__version__ in folder.name
    others = set()
    for name, value in (("_cpu", "another"), ("_user", "another")):
        with monkeypatch.context() as patch:
            patch.setattr(compiled_extensions, name, lambda value=value: value)
            others.add(default_folder(environ))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        others.add(default_folder(environ))
    assert len(others | {folder}) == 4
    prepare(environ)
    assert environ["TORCH_EXTENSIONS_DIR"] == str(folder)


def test_a_folder_that_was_named_stays(tmp_path: Path) -> None:
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "mine"), "MVAR_HOME": str(tmp_path)}
    prepare(environ)
    assert environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "mine") and not (tmp_path / ".cache").exists()


def test_a_checkout_that_cannot_be_written_leaves_the_users_cache(tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / ".cache").touch()  # No folder can be made here, not even by root.
    environ = {"MVAR_HOME": str(tmp_path / "checkout"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert default_folder(environ).is_relative_to(tmp_path / "cache" / "mvar")
