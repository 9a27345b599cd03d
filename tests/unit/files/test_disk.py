"""The one writer: complete or absent, synced file and folder, every error the project's own."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvar.errors import WriteError
from mvar.files.disk import (
    discard_folder,
    keep_beside,
    place,
    remove_stale,
    remove_tree,
    write_file,
    write_once,
    write_text,
    writing,
    writing_folder,
)

CALLS = ("fsync", "replace", "rename")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the writer asks of the operating system, in order: `fsync file`, `replace`, `rename`, `fsync folder`."""
    found: list[str] = []

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, *more: Any) -> Any:
            kind = ""
            if name == "fsync":
                kind = " folder" if stat.S_ISDIR(os.fstat(what).st_mode) else " file"
            found.append(name + kind)
            return original(what, *more)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    return found


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_afterwards(tmp_path: Path, calls: list[str]) -> None:
    with writing(tmp_path / "new/a.bin") as file:
        file.write(b"first ")
        file.write(b"second")
        assert not (tmp_path / "new/a.bin").exists()
    assert calls == ["fsync file", "replace", "fsync folder"]
    assert (tmp_path / "new/a.bin").read_bytes() == b"first second"
    write_file(tmp_path / "b.bin", b"bytes")
    write_text(tmp_path / "c.txt", "für\n")
    assert (tmp_path / "b.bin").read_bytes() == b"bytes" and (tmp_path / "c.txt").read_bytes() == "für\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["b.bin", "c.txt", "new"]


def test_without_sync_a_file_is_still_complete_or_absent(tmp_path: Path, calls: list[str]) -> None:
    with writing(tmp_path / "a", sync=False) as file:
        file.write(b"x")
    assert calls == ["replace"] and (tmp_path / "a").read_bytes() == b"x"
    with pytest.raises(ValueError), writing(tmp_path / "b", sync=False) as file:
        file.write(b"half")
        raise ValueError
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_is_synced_before_it_has_its_name_and_takes_the_place_of_an_old_one(
    tmp_path: Path, calls: list[str]
) -> None:
    for number in range(2):
        with writing_folder(tmp_path / "out") as folder:
            (folder / f"{number}").write_text("x")
    assert calls == ["fsync folder", "rename", "fsync folder", "fsync folder", "rename", "rename", "fsync folder"]
    assert os.listdir(tmp_path / "out") == ["1"] and os.listdir(tmp_path) == ["out"]


def test_what_raises_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with writing_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(KeyError), writing(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyError
    with pytest.raises(KeyError), writing_folder(tmp_path / "f") as folder:
        (folder / "y").write_text("new")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path / "f") == ["x"]
    assert sorted(os.listdir(tmp_path)) == ["a", "f"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_told_with_the_path_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_text(tmp_path / "a", "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(WriteError, match=r"/a: cannot be written \(No space left on device\)\. Make room"):
        write_text(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_place_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (
        lambda path: write_text(path, "x"),
        lambda path: writing_folder(path).__enter__(),
        lambda path: place(path, lambda link: link.symlink_to("x")),
    ):
        with pytest.raises(WriteError, match=r"file/a: cannot be written \((File exists|Not a directory)\)"):
            write(tmp_path / "file/a")


@pytest.mark.parametrize(
    ("number", "tolerated"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.ENOSYS, True), (errno.EIO, False)]
)
def test_file_systems_that_cannot_sync_folders_are_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, tolerated: bool
) -> None:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if tolerated:
        write_text(tmp_path / "a", "x")
    else:
        with pytest.raises(WriteError, match="Input/output error"):
            write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_a_link_is_replaced_in_one_step(tmp_path: Path) -> None:
    for target in ("one", "two"):
        place(tmp_path / "latest", lambda link, target=target: link.symlink_to(target))
        assert os.readlink(tmp_path / "latest") == target
    assert os.listdir(tmp_path) == ["latest"]


def test_what_is_written_once_keeps_its_first_content(tmp_path, monkeypatch):
    path = tmp_path / "new" / "job.json"
    write_once(path, b"first")
    write_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in path.parent.iterdir()] == ["job.json"]

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    write_once(path, b"third")
    assert path.read_bytes() == b"first"
    write_once(tmp_path / "other.json", b"fourth")
    assert (tmp_path / "other.json").read_bytes() == b"fourth"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "other.json"]


# ---- what some file systems do otherwise


def refusing(number: int) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV])
def test_a_second_name_is_a_copy_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_text(tmp_path / "new", "one")
    write_text(tmp_path / "before", "zero")
    monkeypatch.setattr(os, "link", refusing(number))
    keep_beside(tmp_path / "new", tmp_path / "before")
    write_text(tmp_path / "new", "two")
    assert (tmp_path / "before").read_text() == "one" and sorted(os.listdir(tmp_path)) == ["before", "new"]


def test_a_second_name_costs_no_copy_where_there_are_hard_links(tmp_path: Path) -> None:
    write_text(tmp_path / "new", "one")
    keep_beside(tmp_path / "new", tmp_path / "before")
    keep_beside(tmp_path / "new", tmp_path / "before")  # As after a save that failed in between.
    assert (tmp_path / "new").samefile(tmp_path / "before") and sorted(os.listdir(tmp_path)) == ["before", "new"]
    with pytest.raises(WriteError, match="other: cannot be written"):
        keep_beside(tmp_path / "missing", tmp_path / "other")


def test_a_copy_that_finds_no_room_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "new", "one")
    write_text(tmp_path / "before", "zero")
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    monkeypatch.setattr(os, "fsync", refusing(errno.ENOSPC))
    with pytest.raises(WriteError, match="No space left"):
        keep_beside(tmp_path / "new", tmp_path / "before")
    assert (tmp_path / "before").read_text() == "zero" and sorted(os.listdir(tmp_path)) == ["before", "new"]


@pytest.mark.parametrize("number", [errno.ENOSYS, None])
def test_without_locks_the_age_says_which_temporaries_are_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    """None: a file system that grants every lock to everybody."""
    monkeypatch.setattr(fcntl, "flock", refusing(number) if number is not None else lambda *_: None)
    with writing(tmp_path / "a") as file:
        file.write(b"x")
        assert remove_stale(tmp_path) == 0
        (own,) = tmp_path.iterdir()
    assert (tmp_path / "a").read_bytes() == b"x"
    own.touch()
    os.utime(own, (0, 0))
    assert remove_stale(tmp_path) == 1 and os.listdir(tmp_path) == ["a"]


class Nfs:
    """As NFS removes a file that somebody has open: it gets another name in its folder, which cannot be removed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *open_files: str) -> None:
        self._unlink, self._open = os.unlink, {*open_files}
        monkeypatch.setattr(os, "unlink", self.unlink)

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        name = os.path.basename(path)
        if name.startswith(".nfs") and self._open:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        if name in self._open:
            hidden = os.path.join(os.path.dirname(path), f".nfs0000{name}")
            os.rename(path, hidden, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            self._unlink(path, dir_fd=dir_fd)

    def close(self) -> None:
        self._open.clear()


def filled(folder: Path) -> Path:
    (folder / "below").mkdir(parents=True)
    for name in ("a", "below/b", "c"):
        (folder / name).write_text(name)
    return folder


def test_what_nfs_keeps_of_open_files_stays_until_they_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nfs = Nfs(monkeypatch, "a", "b")
    folder = filled(tmp_path / "folder")
    remove_tree(folder)
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {".nfs0000a", ".nfs0000b"}
    remove_tree(folder)
    nfs.close()
    remove_tree(folder)
    assert not folder.exists()


def test_a_folder_is_discarded_and_replaced_again_while_nfs_keeps_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nfs(monkeypatch, "a")
    for _ in range(2):
        discard_folder(filled(tmp_path / "step"))
        assert not (tmp_path / "step").exists()
    for number in range(3):
        with writing_folder(tmp_path / "out") as folder:
            (folder / "a").write_text(str(number))
        assert (tmp_path / "out" / "a").read_text() == str(number)


def test_a_folder_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path / "folder")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refusing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            remove_tree(folder)
        with pytest.raises(OSError, match="Input/output error"):
            discard_folder(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refusing(errno.EACCES))
        with pytest.raises(OSError, match="Permission denied"):
            remove_tree(shutil.copytree(next(tmp_path.iterdir()), tmp_path / "copy"))
