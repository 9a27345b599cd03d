"""data.reader=ram: the codes are in memory once a machine, and nothing of them stays behind, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mvar.data.store import CodeStore
from mvar.run import shared_memory
from mvar.run import world as worlds
from mvar.run.world import World
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import Ranks, run_ranks
from mvar.testing.tiny_runs import config
from mvar.training.job import hold_codes, prepare

RANKS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("shared") / "store", val=0)


def inode_of(array: Any) -> int:
    """Of the file or memory that an array lies in; 0: this process's own memory."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(text, 16) for text in line.split()[0].split("-"))
        if low <= address < high:
            return int(line.split()[4])
    return -1


def held(world: World, folder: str, store: str) -> dict[str, Any]:
    job = prepare(config(Path(folder), Path(store), data__reader="ram", global_batch=12), world.size)
    hold_codes(job, world)
    split = job.store.split("train")
    everything = split.codes(np.arange(len(split)), np.zeros(len(split), np.int64))
    return {
        "inode": inode_of(split._resident) if split._resident is not None else None,
        "codes": everything.tolist(),
    }


def test_ranks_of_a_machine_share_one_copy(tmp_path: Path, store: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    found = run_ranks(held, RANKS, tmp_path, folder=str(tmp_path), store=str(store))
    assert len({one["inode"] for one in found}) == 1 and found[0]["inode"] > 0
    expected = CodeStore.open(store).split("train").codes(np.arange(50), np.zeros(50, np.int64)).tolist()
    assert all(one["codes"] == expected for one in found)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "mvar" in name}


def apart(world: World, folder: str, store: str) -> dict[str, Any]:
    """As in containers that count their processes on their own: the number leads to another one."""
    original: Any = shared_memory._map
    shared_memory._map = lambda offer, size: original(  # type: ignore[assignment]
        type(offer)(os.getpid(), 0, offer.name), size
    )
    return held(world, folder, store)


def test_ranks_that_cannot_reach_the_memory_read_the_files(tmp_path: Path, store: Path) -> None:
    found = run_ranks(apart, 2, tmp_path, folder=str(tmp_path), store=str(store))
    assert found[0]["inode"] > 0 and found[1]["inode"] is None
    assert found[0]["codes"] == found[1]["codes"]
    assert "data.reader=ram: the memory of process" in (tmp_path / "rank1.log").read_text()


def full(world: World, folder: str, store: str) -> dict[str, Any]:
    from mvar.training import job

    job.available_memory = lambda: 100  # type: ignore[attr-defined]
    return held(world, folder, store)


def test_too_little_memory_is_told_and_the_files_are_read(tmp_path: Path, store: Path) -> None:
    (found,) = run_ranks(full, 1, tmp_path, folder=str(tmp_path), store=str(store))
    assert found["inode"] is None and len(found["codes"]) == 50
    assert "GiB of memory are free. The train split is read from its files" in (tmp_path / "rank0.log").read_text()


def killed(folder: str, store: str) -> int:
    """Rank 0, which filled the memory, is killed; the other reads on."""
    world = worlds.start(threads=1)
    job = prepare(config(Path(folder), Path(store), data__reader="ram", global_batch=2), world.size)
    hold_codes(job, world)
    main = world.share(os.getpid())
    if world.is_main:
        os.kill(main, signal.SIGKILL)
    while psutil.pid_exists(main) and psutil.Process(main).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    split = job.store.split("train")
    codes = split.codes(np.arange(50), np.ones(50, np.int64))
    (Path(folder) / "read.json").write_text(json.dumps(codes.tolist()))
    os._exit(0)


def test_the_memory_outlives_the_rank_that_filled_it_and_nothing_else(tmp_path: Path, store: Path) -> None:
    job = Ranks(f"{__name__}:killed", [str(tmp_path), str(store)], 2, tmp_path / "logs")
    assert job.wait() == [-signal.SIGKILL, 0], job.output()
    expected = CodeStore.open(store).split("train").codes(np.arange(50), np.ones(50, np.int64)).tolist()
    assert json.loads((tmp_path / "read.json").read_text()) == expected
