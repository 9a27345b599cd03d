"""What this process may use of its machine: cores and memory, by affinity and control groups.

Whoever divides a machine (Slurm, a container, systemd) sets limits on some group above a process, not on the process's
own: the least over all groups above it counts. Both versions of control groups are read, and a machine may have both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
MOUNTS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2**63 where there is no limit."""


def cores() -> int:
    """Cores that this process may use: of its affinity, and what its groups' quotas come to, rounded down."""
    quota = cpu_quota()
    may = len(affinity())
    return may if quota is None else max(1, min(may, int(quota)))


def affinity() -> set[int]:
    """The numbers of the cores that this process may run on."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}


def share_of_cores(masks: list[set[int]], mine: int, quota: float | None) -> int:
    """Cores for one process alone, of several on a machine: which cores each may run on, and what all may use together.

    Processes that were bound to different cores do not share them; those that were not share all.
    """
    own = sum(1 / sum(core in mask for mask in masks) for core in masks[mine])
    allowed = own if quota is None else min(own, quota / len(masks))
    return max(1, int(allowed + 1e-9))


def cpu_quota(groups: Path | None = None, mounts: Path | None = None) -> float | None:
    """Cores' worth of time that this process's groups may use; None without a limit."""
    found = []
    for folder in _folders("cpu", groups, mounts):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit(groups: Path | None = None, mounts: Path | None = None) -> int | None:
    """Bytes that this process's groups may use; None without a limit."""
    return min((limit for _, limit in _memory_limits(groups, mounts)), default=None)


def memory_left(groups: Path | None = None, mounts: Path | None = None) -> int | None:
    """Bytes until the first of this process's groups is at its limit; None without a limit.

    A group's use counts without what it holds of files and nobody has read lately: the kernel gives that back first.
    """
    left = []
    for folder, limit in _memory_limits(groups, mounts):
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        with contextlib.suppress(ValueError):
            left.append(max(0, limit - max(0, int(used) - _inactive(folder))))
    return min(left, default=None)


def _memory_limits(groups: Path | None, mounts: Path | None) -> Iterator[tuple[Path, int]]:
    for folder in _folders("memory", groups, mounts):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        if limit.isdigit() and int(limit) < _NO_LIMIT:
            yield folder, int(limit)


def _inactive(folder: Path) -> int:
    fields = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    return int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)


def _folders(controller: str, groups: Path | None, mounts: Path | None) -> Iterator[Path]:
    """Of each hierarchy that may limit this: the folder of this process's group and those of all groups above it.

    What is above may lie outside of a container, and its name be another inside: such folders are not there to be read.
    """
    mounts = MOUNTS if mounts is None else mounts
    for line in _text(GROUPS if groups is None else groups).splitlines():
        names, _, path = line.partition(":")[2].partition(":")
        if names and controller not in names.split(","):
            continue
        parts = Path(os.path.normpath(f"/{path}")).parts[1:]
        for mount in [mounts / names, mounts / controller] if names else [mounts, mounts / "unified"]:
            for depth in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:depth])


def _text(path: Path) -> str:
    """A small file's text, without the space around it; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
