"""What happens around the steps of a training, and in which order, with a training that does nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mvar.data.prefetch import Feed
from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, StoreError, TrainingError
from mvar.run.folder import RunFolder
from mvar.run.launcher import Place
from mvar.run.loop import Session, TrainingLoop, Votes, due
from mvar.run.stopping import StopRequests, Watchdog
from mvar.run.tracking import Stopwatch
from mvar.run.world import World


@dataclass(frozen=True)
class Result:
    votes: Votes


class Noted(TrainingLoop[int, Result]):
    """Writes down what it is told to do."""

    def __init__(self, folder: Path, batches: Iterator[int], last_step: int = 4, *, lost_at: int | None = None) -> None:
        self.did: list[str] = []
        self.lost_at = lost_at
        run, world = RunFolder(folder), World(Place("alone"), torch.device("cpu"))
        stops = StopRequests(run.stop_file, 0, environ={})
        session = Session(run, world, Watchdog(0), stops, lambda: len(self.steps) != lost_at, takeover_s=9)
        super().__init__(session, Feed(batches, 1), last_step, save_every=2)

    @property
    def steps(self) -> list[str]:
        return [act for act in self.did if act.startswith("step")]

    def step(self, done: int, batches: Sequence[int]) -> Result:
        self.did.append(f"step {done} of {batches}")
        return Result(self.session.votes(self.feed))

    def record(self, done: int, result: Result, watch: Stopwatch) -> None:
        self.did.append(f"record {done}")

    def look(self, done: int, *, ending: bool) -> float | None:
        return float(done) if ending else None

    def save(self, done: int, validation_loss: float | None, *, last: bool) -> None:
        self.did.append(f"save {done} {validation_loss} {last}")

    def finish(self, done: int) -> None:
        self.did.append(f"finish {done}")

    def stopped(self, done: int, reason: str) -> None:
        self.did.append(f"stopped {done}: {reason.rpartition('/')[2]}")


def test_steps_are_recorded_and_saved_and_the_last_one_is_looked_at_and_ends(tmp_path: Path) -> None:
    training = Noted(tmp_path, iter(range(10)), last_step=3)
    assert training.loop(0) == EXIT_FINISHED
    assert training.did == [
        *("step 0 of [0]", "record 1"),
        *("step 1 of [1]", "record 2", "save 2 None False"),
        *("step 2 of [2]", "record 3", "save 3 3.0 True", "finish 3"),
    ]


def test_nothing_is_done_again_where_all_is_done(tmp_path: Path) -> None:
    training = Noted(tmp_path, iter(range(10)))
    assert training.loop(4) == EXIT_FINISHED
    assert training.did == ["finish 4"]


def test_who_asks_to_stop_finds_everything_saved(tmp_path: Path) -> None:
    training = Noted(tmp_path, iter(range(10)))
    training.session.run.stop_file.touch()
    assert training.loop(0) == EXIT_STOPPED
    assert training.did == ["step 0 of [0]", "record 1", "save 1 None True", "stopped 1: STOP exists"]
    assert not training.session.run.stop_file.exists()


def test_data_that_cannot_be_read_end_the_training_after_the_step_that_still_had_some(tmp_path: Path) -> None:
    def batches() -> Iterator[int]:
        yield 0
        raise StoreError("a damaged shard")

    training = Noted(tmp_path, batches())
    with pytest.raises(StoreError, match="a damaged shard"):
        training.loop(0)
    assert training.did == ["step 0 of [0]", "record 1", "save 1 None True"]


def test_what_ranks_agreed_to_be_a_fault_ends_the_training_saved_and_is_nothing_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Noted(tmp_path, iter(range(10)), last_step=2)
    fault = StoreError("too much is damaged")
    monkeypatch.setattr(training, "agree", lambda votes: fault)
    with pytest.raises(StoreError, match="too much is damaged"):
        training.loop(0)
    assert training.did == ["step 0 of [0]", "record 1", "save 1 None True"]
    assert training.loop(1) == EXIT_FINISHED
    assert training.did[-2:] == ["save 2 2.0 True", "finish 2"]


def test_who_lost_the_folder_writes_nothing_into_it(tmp_path: Path) -> None:
    training = Noted(tmp_path, iter(range(10)), lost_at=1)
    with pytest.raises(TrainingError, match=r"another process took it over.* 9 s \(takeover_s\)"):
        training.loop(0)
    assert training.did == ["step 0 of [0]"]


def test_votes_are_summed_by_name(tmp_path: Path) -> None:
    own, other = Votes(stop=1, written=1, damaged=2), Votes(lost=1, written=1, damaged=1)
    sums = [a + b for a, b in zip(own.numbers(), other.numbers(), strict=True)]
    assert Votes(*sums) == Votes(stop=1, lost=1, unreadable=0, written=2, damaged=3)


@pytest.mark.parametrize(("step", "every", "expected"), [(4, 2, True), (3, 2, False), (3, 0, False)])
def test_due(step: int, every: int, expected: bool) -> None:
    assert due(step, every) == expected
