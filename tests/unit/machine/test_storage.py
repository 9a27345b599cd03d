"""What a file system does is tried, not guessed."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from mvar.machine import storage
from mvar.machine.storage import is_shared, kind_of, look_at_caches, look_at_folder


def test_a_good_folder_passes_everything_and_nothing_stays_behind(tmp_path: Path) -> None:
    found = look_at_folder(tmp_path / "runs" / "d16")
    assert [finding.state for finding in found] == ["good"] * 5
    assert not list(tmp_path.iterdir()), "the run folder itself is not made"


def refusing(number: int) -> Any:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(("call", "what"), [("os.replace", "atomic rename"), ("os.fsync", "fsync")])
def test_what_mvar_cannot_do_without_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, what: str
) -> None:
    monkeypatch.setattr(call, refusing(errno.EPERM))
    bad = [finding for finding in look_at_folder(tmp_path) if finding.state != "good"]
    assert [(finding.name, finding.state) for finding in bad] == [(what, "bad")]
    assert "not permitted" in bad[0].text


@pytest.mark.parametrize(
    ("call", "number", "what", "instead"),
    [
        ("os.link", errno.EPERM, "hard links", "copied"),
        ("fcntl.flock", errno.ENOSYS, "flock", "90 s"),
        ("fcntl.flock", None, "flock", "90 s"),
    ],
)
def test_what_mvar_does_without_is_said_with_what_it_does_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int | None, what: str, instead: str
) -> None:
    """None: every lock is granted to everybody."""
    monkeypatch.setattr(call, refusing(number) if number is not None else lambda *_: None)
    lacking = [finding for finding in look_at_folder(tmp_path) if finding.state != "good"]
    assert [(finding.name, finding.state) for finding in lacking] == [(what, "missing")]
    assert instead in lacking[0].text


def test_a_folder_that_cannot_be_synced_is_said_and_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refusing(errno.EINVAL)()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    (found,) = [finding for finding in look_at_folder(tmp_path) if finding.name == "fsync"]
    assert found.state == "good" and "not of folders" in found.text


def test_the_innermost_mount_says_what_a_folder_is_on(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    inner = tmp_path / "with space"
    inner.mkdir()
    lines = ["disk / ext4 rw 0 0", f"server:/x {tmp_path} nfs4 rw 0 0"]
    lines.append(f"fast {str(inner).replace(' ', chr(92) + '040')} xfs rw 0 0")
    mounts.write_text("\n".join(lines) + "\n")
    assert kind_of(tmp_path / "a" / "b", mounts) == "nfs4"
    assert kind_of(inner / "deeper", mounts) == "xfs"
    assert kind_of(Path("/usr"), mounts) == "ext4"
    assert is_shared("nfs4") and is_shared("fuse.sshfs") and not is_shared("xfs") and not is_shared("tmpfs")


def test_a_cache_on_a_shared_disk_is_a_fault_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "kind_of", lambda path: "lustre" if "triton" in str(path) else "ext4")
    found = {finding.name: finding for finding in look_at_caches({"TRITON_CACHE_DIR": "/home/me/triton"})}
    assert found["TRITON_CACHE_DIR"].state == "bad" and "lustre" in found["TRITON_CACHE_DIR"].text
    assert found["TRITON_CACHE_DIR"].fix.startswith("export TRITON_CACHE_DIR=/")
    assert found["TORCH_EXTENSIONS_DIR"].state == "good" and "not set" in found["TORCH_EXTENSIONS_DIR"].text
