"""Ranks that wait in a start live as long as another one gets on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mvar import headway
from mvar.config import Phase
from mvar.run.heartbeat import Heartbeat
from mvar.run.launcher import Place
from mvar.run.stopping import Watchdog
from mvar.run.world import World
from mvar.testing.ranks import Ranks, run_ranks

LIMIT_S = 4.0


class Food:
    """In a watchdog's place: counts its meals and never bites."""

    def __init__(self, start_s: float) -> None:
        self.limits_s: dict[Phase, float] = {"start": start_s, "step": 50, "validate": 50, "save": 50}
        self.phases: list[Phase] = []

    def feed(self, phase: Phase = "step") -> None:
        self.phases.append(phase)


def patience_s() -> float:
    group: Any = dist.group.WORLD
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def one_gets_on(world: World) -> Any:
    """Rank 0 makes headway until rank 1, which waits in a collective, was fed three times."""
    watchdog: Any = Food(0.1)
    shared: Any = distributed_c10d._get_default_store()
    store = shared.clone()
    with Heartbeat(watchdog, world) as heartbeat:
        waits_s = patience_s()
        if world.rank:
            feed = watchdog.feed

            def fed(phase: Phase) -> None:
                feed(phase)
                if len(watchdog.phases) == 3:
                    store.set("enough", "")

            watchdog.feed = fed
        while not world.rank and not store.check(["enough"]):
            headway.made()
            time.sleep(0.01)
        world.gather(None)
        heartbeat.end()
        meals = len(watchdog.phases)
        headway.made()
        time.sleep(0.1)
    assert len(watchdog.phases) == meals, "the start is over"
    return [set(watchdog.phases) == {"start"}, waits_s, patience_s()]


def nobody_gets_on(world: World) -> int:
    """Meals of a rank in ten looks."""
    watchdog: Any = Food(0.1)
    with Heartbeat(watchdog, world):
        time.sleep(0.1)
    world.gather(None)
    return len(watchdog.phases)


def waiting(busy_s: float, gets_on: bool) -> int:
    """A start in which rank 0 is busy for longer than the watchdog allows, and rank 1 waits for it."""
    from mvar.run import world as worlds

    world = worlds.start(threads=1)
    with Watchdog({"start": LIMIT_S, "step": 50, "validate": 50, "save": 50}) as watchdog, Heartbeat(watchdog, world):
        until = time.monotonic() + busy_s
        while not world.rank and time.monotonic() < until:
            time.sleep(0.1)
            if gets_on:
                headway.made()
        world.gather(None)
    worlds.finish()
    return 0


def test_a_rank_that_waits_is_fed_by_the_one_that_gets_on(tmp_path: Path) -> None:
    assert run_ranks(one_gets_on, 2, tmp_path) == [[True, 30 * 86400.0, 110.0]] * 2


def test_ranks_are_not_fed_when_nobody_gets_on(tmp_path: Path) -> None:
    assert run_ranks(nobody_gets_on, 2, tmp_path) == [0, 0]


def test_a_start_longer_than_the_limit_goes_on_while_somebody_gets_on(tmp_path: Path) -> None:
    job = Ranks("tests.unit.run.test_heartbeat:waiting", [2 * LIMIT_S, True], 2, tmp_path)
    assert job.wait() == [0, 0], job.output()


def test_a_start_in_which_nobody_gets_on_ends_with_stacks(tmp_path: Path) -> None:
    job = Ranks("tests.unit.run.test_heartbeat:waiting", [100 * LIMIT_S, False], 2, tmp_path)
    assert job.wait() == [1, 1], job.output()
    for log in job.logs:
        assert "Timeout (0:00:04)!" in log.read_text()


class Silent:
    """A store whose server is gone."""

    def add(self, *_: object) -> int:
        raise RuntimeError("connection reset")

    def clone(self) -> Silent:
        return self


def test_without_a_store_that_answers_own_headway_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_c10d, "_get_default_store", Silent)
    watchdog: Any = Food(0.1)
    with Heartbeat(watchdog, World(Place("torchrun", 0, 2, 0, 1, "host", 1), torch.device("cpu"))):
        while not watchdog.phases:
            headway.made()
            time.sleep(0.01)
    assert set(watchdog.phases) == {"start"}


def test_a_process_that_is_alone_is_fed_by_itself_and_not_at_all_without_a_limit() -> None:
    alone = World(Place("alone"), torch.device("cpu"))
    watchdog: Any = Food(0.1)
    with Heartbeat(watchdog, alone):
        while not watchdog.phases:
            headway.made()
            time.sleep(0.01)
    watchdog = Food(0)
    with Heartbeat(watchdog, alone):
        headway.made()
    assert watchdog.phases == []
