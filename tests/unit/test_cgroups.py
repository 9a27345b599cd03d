"""Limits of control groups: the least over all groups above a process, in both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mvar import cgroups
from mvar.cgroups import cores, cpu_quota, memory_left, memory_limit, share_of_cores

GIB = 2**30


class Tree:
    """Control groups in a folder."""

    def __init__(self, folder: Path, *groups: str) -> None:
        self.groups, self.mounts = folder / "cgroup", folder / "mounts"
        self.groups.write_text("\n".join(groups) + "\n")

    def set(self, path: str, **values: object) -> Tree:
        for name, value in values.items():
            file = self.mounts / path / name.replace("__", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
        return self

    def limit(self) -> int | None:
        return memory_limit(self.groups, self.mounts)

    def left(self) -> int | None:
        return memory_left(self.groups, self.mounts)

    def quota(self) -> float | None:
        return cpu_quota(self.groups, self.mounts)


JOB = "system.slice/slurmstepd.scope/job_7"


def test_slurm_sets_a_jobs_limits_on_a_group_above_that_of_the_task(tmp_path: Path) -> None:
    tree = Tree(tmp_path, f"0::/{JOB}/step_0/user/task_0")
    tree.set(f"{JOB}/step_0/user/task_0", memory__max="max", memory__current=GIB, cpu__max="max 100000")
    tree.set(f"{JOB}/step_0", memory__max=8 * GIB, memory__current=7 * GIB)
    tree.set(JOB, memory__max=16 * GIB, memory__current=31 * GIB // 2, cpu__max="400000 100000")
    assert tree.limit() == 8 * GIB
    assert tree.left() == GIB // 2, "of the job: another step of it uses the rest"
    assert tree.quota() == 4


def test_version_1_has_a_tree_for_each_controller(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "5:cpuacct,cpu:/slurm/job_7", "4:memory:/slurm/uid_0/job_7/step_0", "3:freezer:/x", "0::/")
    tree.set("memory/slurm/uid_0/job_7/step_0", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GIB)
    tree.set("memory/slurm/uid_0/job_7", memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=3 * GIB)
    tree.set("memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=99 * GIB)
    tree.set("freezer/x", memory__limit_in_bytes=1)
    tree.set("cpuacct,cpu/slurm/job_7", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    tree.set("cpuacct,cpu/slurm", cpu__cfs_quota_us=250000, cpu__cfs_period_us=100000)
    assert (tree.limit(), tree.left(), tree.quota()) == (4 * GIB, GIB, 2.5)


def test_of_two_versions_at_once_the_tighter_one_counts(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "2:cpu:/", "1:memory:/a", "0::/b")
    tree.set("memory/a", memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=0)
    tree.set("unified/b", memory__max=2 * GIB, memory__current=0, cpu__max="300000 100000")
    tree.set("cpu", cpu__cfs_quota_us=200000, cpu__cfs_period_us=100000)
    assert (tree.limit(), tree.left(), tree.quota()) == (2 * GIB, 2 * GIB, 2)


@pytest.mark.parametrize("group", ["0::/", "0::/docker/4f2a/nested", "0::/../../outside"])
def test_in_a_container_the_root_is_the_containers_whatever_its_name_outside(tmp_path: Path, group: str) -> None:
    tree = Tree(tmp_path, group).set("", memory__max=GIB, memory__current=0, cpu__max="150000 100000")
    assert (tree.limit(), tree.quota()) == (GIB, 1.5)


def test_pages_of_files_that_nobody_reads_are_not_in_use(tmp_path: Path) -> None:
    """Reading a large store fills a group to its limit with them."""
    tree = Tree(tmp_path, "0::/a").set("a", memory__max=8 * GIB, memory__current=8 * GIB)
    tree.set("a", memory__stat=f"anon {GIB}\ninactive_file {5 * GIB}\nactive_file {2 * GIB}")
    assert tree.left() == 5 * GIB


@pytest.mark.parametrize("group", ["", "0::/a", "4:memory:/a", "nonsense"])
def test_without_limits_there_are_none(tmp_path: Path, group: str) -> None:
    tree = Tree(tmp_path, group).set("a", memory__max="max", cpu__max="max 100000", memory__current="torn")
    assert (tree.limit(), tree.left(), tree.quota()) == (None, None, None)
    assert memory_limit(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), ("100000 100000", 1), ("50000 100000", 1), ("9 1", 8)])
def test_cores_are_the_lesser_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, expected: int
) -> None:
    tree = Tree(tmp_path, "0::/job/step")
    if quota is not None:
        tree.set("job", cpu__max=quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)})
    monkeypatch.setattr(cgroups, "GROUPS", tree.groups)
    monkeypatch.setattr(cgroups, "MOUNTS", tree.mounts)
    assert cores() == expected


@pytest.mark.parametrize(
    ("masks", "quota", "expected"),
    [
        ([{*range(8)}] * 4, None, [2, 2, 2, 2]),  # torchrun: all on all.
        ([{0, 1}, {2, 3}, {4, 5}, {6, 7}], None, [2, 2, 2, 2]),  # srun bound each to its own.
        ([{0}, {1}, {2}, {3}], None, [1, 1, 1, 1]),
        ([{0, 1, 2, 3}, {0, 1, 2, 3}, {4, 5, 6, 7}], None, [2, 2, 4]),
        ([{*range(64)}] * 8, 16.0, [2] * 8),
        ([{*range(2)}] * 4, None, [1] * 4),
        ([{*range(6)}] * 3, None, [2] * 3),  # Thirds add up.
    ],
)
def test_processes_share_the_cores_that_they_may_all_run_on(
    masks: list[set[int]], quota: float | None, expected: list[int]
) -> None:
    assert [share_of_cores(masks, place, quota) for place in range(len(masks))] == expected
