"""What happens around the steps of a training, and in which order, with a training that does nothing."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mvar.config import Phase, TrackingConfig
from mvar.data.prefetch import Feed
from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, StoreError, TrainingError
from mvar.run import garbage
from mvar.run.folder import RunFolder
from mvar.run.launcher import Place
from mvar.run.loop import Session, StopAskedError, TrainingLoop, Votes, due
from mvar.run.stopping import StopRequests, Watchdog
from mvar.run.tracking import Stopwatch, Tracker
from mvar.run.world import World

NEVER: dict[Phase, float] = dict.fromkeys(("start", "step", "validate", "save"), 0)


@dataclass(frozen=True)
class Result:
    votes: Votes


class Noted(TrainingLoop[int, Result, Result]):
    """Writes down what it is told to do, and what is asked of it while it looks."""

    def __init__(
        self, folder: Path, batches: Iterator[int], last_step: int = 4, *, lost_at: int | None = None, resumed: int = 0
    ) -> None:
        self.did: list[str] = []
        self.lost_at = lost_at
        self.stop_while_looking = False
        self.robbed = False
        run, world = RunFolder(folder), World(Place("alone"), torch.device("cpu"))
        stops = StopRequests(run.stop_file, 0, environ={})
        session = Session(run, world, Watchdog(NEVER), stops, self.ours, takeover_s=9)
        config = TrackingConfig(wandb="disabled")  # A client that is never closed would be the next test's.
        tracker = Tracker(folder, config, is_main=True, resumed_step=resumed, samples_at=int, settings={}, lines=str)
        feed = Feed(batches, 1, ahead=2 if self.reads_late else 1)
        super().__init__(session, feed, tracker, last_step, save_every=2)

    def ours(self) -> bool:
        return len(self.steps) != self.lost_at and not self.robbed

    @property
    def steps(self) -> list[str]:
        return [act for act in self.did if act.startswith("step")]

    def launch(self, done: int, batches: Sequence[int]) -> Result:
        self.did.append(f"step {done} of {batches}")
        return Result(self.session.votes(self.feed))

    def result(self, launched: Result) -> Result:
        return launched

    def record(self, done: int, result: Result, watch: Stopwatch) -> None:
        self.did.append(f"record {done}")

    def looks_due(self, done: int) -> set[str]:
        return {"val", "sample"} if done in (3, self.last_step) else set()

    def look(self, done: int, looks: set[str]) -> None:
        self.did.append(f"look {done} for {' '.join(sorted(looks))}")
        if self.stop_while_looking:
            self.session.stops._note(signal.SIGTERM, None)
        self.require_leisure()

    def save(self, done: int, *, last: bool) -> None:
        self.did.append(f"save {done} {last}")

    def settle(self) -> None:
        self.did.append("settle")

    def finish(self, done: int) -> None:
        self.did.append(f"finish {done}")

    def stopped(self, done: int, reason: str) -> None:
        self.did.append(f"stopped {done}: {reason.rpartition('/')[2]}")


class Late(Noted):
    """The same, told of each step while the next one is under way."""

    reads_late = True


def test_steps_are_recorded_saved_and_then_looked_at(tmp_path: Path) -> None:
    training = Noted(tmp_path, iter(range(10)))
    assert training.loop(0) == EXIT_FINISHED
    assert training.did == [
        *("step 0 of [0]", "record 1"),
        *("step 1 of [1]", "record 2", "save 2 False"),
        *("step 2 of [2]", "record 3", "look 3 for sample val"),
        *("step 3 of [3]", "record 4", "save 4 True", "look 4 for sample val", "finish 4"),
    ]


def test_a_step_is_read_while_the_next_is_under_way_but_before_anything_else(tmp_path: Path) -> None:
    training = Late(tmp_path, iter(range(10)), last_step=6)
    assert training.loop(0) == EXIT_FINISHED
    assert training.did == [
        *("step 0 of [0]", "step 1 of [1]", "record 1", "record 2", "save 2 False"),
        *("step 2 of [2]", "record 3", "look 3 for sample val", "step 3 of [3]", "record 4", "save 4 False"),
        *("step 4 of [4]", "step 5 of [5]", "record 5", "record 6", "save 6 True", "look 6 for sample val", "finish 6"),
    ]


def test_nothing_is_done_again_where_all_is_done(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "val", "step": 4}\n')
    training = Noted(tmp_path, iter(range(10)), resumed=4)
    assert training.loop(4) == EXIT_FINISHED
    assert training.did == ["finish 4"]


def test_a_validation_that_a_kill_prevented_is_made_up_for(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "val", "step": 3}\n{"kind": "train", "step": 4}\n')
    training = Noted(tmp_path, iter(range(10)), resumed=4)
    assert training.loop(4) == EXIT_FINISHED
    assert training.did == ["look 4 for val", "finish 4"]


@pytest.mark.parametrize(("kind", "steps"), [(Noted, 1), (Late, 2)])
def test_who_asks_to_stop_finds_everything_saved(tmp_path: Path, kind: type[Noted], steps: int) -> None:
    training = kind(tmp_path, iter(range(10)))
    training.session.run.stop_file.touch()
    assert training.loop(0) == EXIT_STOPPED
    assert len(training.steps) == steps
    assert training.did[-3:] == [f"save {steps} True", "settle", f"stopped {steps}: STOP exists"]
    assert not training.session.run.stop_file.exists()


@pytest.mark.parametrize(("last_step", "acts"), [(9, ["save 3 True"]), (3, ["settle"])])
def test_who_asks_to_stop_while_it_looks_finds_everything_saved(
    tmp_path: Path, last_step: int, acts: list[str]
) -> None:
    training = Noted(tmp_path, iter(range(10)), last_step)
    training.stop_while_looking = True
    assert training.loop(0) == EXIT_STOPPED
    assert training.did[-3:] == ["look 3 for sample val", *acts, "stopped 3: got SIGTERM"]


@pytest.mark.parametrize(("kind", "good"), [(Noted, 1), (Late, 2)])
def test_data_that_cannot_be_read_end_the_training_after_the_step_that_still_had_some(
    tmp_path: Path, kind: type[Noted], good: int
) -> None:
    def batches() -> Iterator[int]:
        yield from range(good)
        raise StoreError("a damaged shard")

    training = kind(tmp_path, batches())
    with pytest.raises(StoreError, match="a damaged shard"):
        training.loop(0)
    assert training.steps == [f"step {step} of [{step}]" for step in range(good)]
    assert training.did[-2:] == [f"record {good}", f"save {good} True"]


def test_what_ranks_agreed_to_be_a_fault_ends_the_training_saved_and_is_nothing_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Noted(tmp_path, iter(range(10)), last_step=2)
    fault = StoreError("too much is damaged")
    monkeypatch.setattr(training, "agree", lambda votes: fault)
    with pytest.raises(StoreError, match="too much is damaged"):
        training.loop(0)
    assert training.did == ["step 0 of [0]", "record 1", "save 1 True"]
    assert training.loop(1) == EXIT_FINISHED
    assert training.did[-3:] == ["save 2 True", "look 2 for sample val", "finish 2"]


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


@dataclass(frozen=True)
class Robbed:
    """Another process takes the folder over while a training looks at its model: it slept for long."""

    training: Noted
    asks: bool
    """Whether it is then asked to stop."""
    leisure: bool
    """Whether it goes on looking."""

    def look(self, done: int, looks: set[str]) -> None:
        self.training.robbed = True
        self.training.did.append(f"look {done}")
        if self.leisure:
            self.training.require_leisure()
        if self.asks:
            raise StopAskedError


@pytest.mark.parametrize("last_step", [3, 9])
@pytest.mark.parametrize(("asks", "leisure"), [(False, False), (True, False), (False, True)])
def test_who_lost_the_folder_while_it_looked_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_step: int, asks: bool, leisure: bool
) -> None:
    training = Noted(tmp_path, iter(range(10)), last_step)
    monkeypatch.setattr(training, "look", Robbed(training, asks, leisure).look)
    with pytest.raises(TrainingError, match="took it over"):
        training.loop(0)
    written = training.did[training.did.index("look 3") + 1 :]
    assert not [act for act in written if act.startswith(("save", "finish", "record"))]


def test_the_garbage_collector_rests_between_steps_and_works_again_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(Noted):
        reads_late = False

        def launch(self, done: int, batches: Sequence[int]) -> Result:
            assert not gc.isenabled() and gc.get_freeze_count() > 0
            if done == 3:
                raise StoreError("unreadable")
            return super().launch(done, batches)

    swept: list[int] = []
    monkeypatch.setattr(garbage, "EVERY", 2)
    monkeypatch.setattr(garbage, "collect", lambda: swept.append(len(training.steps)))
    training: Noted = Watched(tmp_path, iter(range(9)))
    with pytest.raises(StoreError):
        training.loop(0)
    assert 2 in swept and gc.isenabled() and gc.get_freeze_count() == 0
