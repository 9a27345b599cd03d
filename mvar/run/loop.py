"""The loop of a training, whatever is trained: read, step, vote, record, save, look, and how it ends.

Ranks decide nothing on their own: whether to stop, whether the run folder is still theirs, whether the next step's data
can be read is put to the vote, once a step. Shapes and figures are the affair of what is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from mvar.data.prefetch import Feed
from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, MvarError
from mvar.log import log
from mvar.run import garbage
from mvar.run.folder import RunFolder
from mvar.run.stopping import StopRequests, Watchdog
from mvar.run.tracking import Stopwatch, Tracker
from mvar.run.world import World


@dataclass(frozen=True)
class Votes:
    """What ranks tell each other once a step: this rank's answers (0 or 1, or a number), or their sums over ranks."""

    stop: int = 0
    """I was asked to stop."""
    lost: int = 0
    """The run folder is not ours any more."""
    unreadable: int = 0
    """The data of a step to come cannot be read."""
    written: int = 0
    """My part of the checkpoint under way is written."""
    damaged: int = 0
    """So many damaged pieces of data I left out that the others do not know of."""

    def numbers(self) -> list[int]:
        """To be summed over ranks; `Votes(*sums)` is what they said."""
        return list(astuple(self))


@dataclass(frozen=True)
class Session:
    """One process's part in a run, from its start to its end."""

    run: RunFolder
    world: World
    watchdog: Watchdog
    stops: StopRequests
    ours: Callable[[], bool]
    """Whether the run folder is still this job's."""
    takeover_s: float
    """A process that gave no sign of life for so long loses the folder."""

    def votes(self, feed: Feed[Any], *, written: bool = False, damaged: int = 0) -> Votes:
        """This rank's."""
        return Votes(
            stop=int(self.stops.reason is not None),
            lost=int(not self.ours()),
            unreadable=int(feed.error is not None),
            written=int(written),
            damaged=damaged,
        )

    def require_folder(self) -> None:
        """Called when a rank voted `lost`: all raise, TrainingError or RemoteError."""
        self.world.raise_together(None if self.ours() else self.run.loss(self.takeover_s))

    def ask(self) -> bool:
        """Between steps: whether any rank is asked to stop. All ranks raise if the folder is not ours any more."""
        answers = [float(self.stops.reason is not None), float(not self.ours())]
        stop, lost = self.world.sum(torch.tensor(answers)).tolist()
        if lost:
            self.require_folder()
        return bool(stop)


def claim(run: RunFolder, takeover_s: float, world: World) -> AbstractContextManager[Callable[[], bool]]:
    """Rank 0 claims the run folder for all ranks. Gives `Session.ours`; entering it raises TrainingError."""
    return run.claimed(takeover_s) if world.is_main else nullcontext(lambda: True)


def due(step: int, every: int) -> bool:
    """Whether something that is done after every `every`-th step (0: never) is to be done after this one."""
    return every > 0 and step % every == 0


class Stepped(Protocol):
    """What a step gave."""

    @property
    def votes(self) -> Votes:
        """Of all ranks."""


class StopAskedError(Exception):
    """Some rank was asked to stop in the middle of something long. Raised on all ranks together."""


@dataclass(frozen=True)
class Asked:
    """What the votes on a step ask for."""

    stop: bool = False
    unreadable: bool = False
    fault: MvarError | None = None
    """What all ranks agreed is too much to go on with."""

    def __bool__(self) -> bool:
        return self.stop or self.unreadable or self.fault is not None

    def __or__(self, other: Asked) -> Asked:
        return Asked(self.stop or other.stop, self.unreadable or other.unreadable, self.fault or other.fault)


B = TypeVar("B")
L = TypeVar("L")
R = TypeVar("R", bound=Stepped)


@dataclass(frozen=True)
class Underway(Generic[L]):
    """A step that was launched and not read yet."""

    done: int
    """Steps done with it."""
    launched: L
    watch: Stopwatch


class TrainingLoop(ABC, Generic[B, L, R]):
    """What happens around the steps. All methods are called by all ranks together."""

    reads_late = False
    """A step's numbers are read while the device works on the step after it, so votes count a step later: `feed` has to
    read two steps ahead then."""

    def __init__(self, session: Session, feed: Feed[B], tracker: Tracker, last_step: int, save_every: int) -> None:
        self.session, self.feed, self.tracker = session, feed, tracker
        self.last_step, self.save_every = last_step, save_every

    def loop(self, done: int) -> int:
        """From `done` steps to the last one: batch -> step -> record -> maybe save, look, stop. Returns the exit code.

        Before anything is saved or looked at, and at the end, the last step is waited for.
        """
        with garbage.collected_by_hand():
            return self._loop(done)

    def _loop(self, done: int) -> int:
        session = self.session
        missed = ({"val"} & self.looks_due(done)) - session.world.share(self.tracker.resumed) if done else set()
        if not self._look(done, missed):  # A kill or a stop came between the save and the validation.
            return self._stop(done, saved=True)
        before: Underway[L] | None = None
        while done < self.last_step:
            session.watchdog.feed()
            watch = Stopwatch()
            with watch.waiting():
                batches = self.feed.take()
            now = Underway(done + 1, self.launch(done, batches), watch)
            done += 1
            ending, looks = done == self.last_step, self.looks_due(done)
            saving = ending or due(done, self.save_every)
            asked = self._read(before) if before is not None else Asked()
            before = now
            if asked or saving or looks or not self.reads_late:
                asked, before = asked | self._read(now), None
            else:
                watch.stop()
            if asked or saving:
                self._save(done, last=ending or bool(asked))
            if (asked.unreadable or asked.fault) and not ending:
                session.world.raise_together(self.feed.error or (asked.fault if session.world.is_main else None))
            if (asked.stop and not ending) or not self._look(done, looks):
                return self._stop(done, saved=saving or bool(asked))
            if looks or due(done, garbage.EVERY):
                garbage.collect()
        session.ask()
        self.finish(done)
        return EXIT_FINISHED

    def _read(self, step: Underway[L]) -> Asked:
        """Wait for a step and record it; gives what was asked for in its votes."""
        result = self.result(step.launched)
        if result.votes.lost:
            self.session.require_folder()
        self.record(step.done, result, step.watch)
        return Asked(bool(result.votes.stop), bool(result.votes.unreadable), self.agree(result.votes))

    def _look(self, done: int, looks: set[str]) -> bool:
        """False if asked to stop before the end of it."""
        try:
            if looks:
                self.look(done, looks)
        except StopAskedError:
            return False
        return True

    def require_leisure(self) -> None:
        """Between two parts of something long: there is progress. Raises StopAskedError on all ranks together."""
        self.session.watchdog.feed("validate")
        if self.session.ask():
            raise StopAskedError

    def _save(self, done: int, *, last: bool) -> None:
        """Save, if the folder is still ours: a validation, or a machine that slept, may lie behind the last votes."""
        self.session.watchdog.feed("save")
        self.session.ask()
        self.save(done, last=last)

    def _stop(self, done: int, *, saved: bool) -> int:
        if saved:
            self.session.ask()
            self.settle()
        else:
            self._save(done, last=True)
        reason = self.session.stops.reason or "another rank was asked to"
        if self.session.world.is_main:
            log.info("stopped after step %d (%s); run the same command to go on.", done, reason)
            self.session.run.stop_file.unlink(missing_ok=True)
        self.stopped(done, reason)
        return EXIT_STOPPED

    @abstractmethod
    def launch(self, done: int, batches: Sequence[B]) -> L:
        """Do step number `done` (0-based), and have all ranks vote."""

    @abstractmethod
    def result(self, launched: L) -> R:
        """Wait for a step's numbers. Called for every step, in the order of steps."""

    @abstractmethod
    def record(self, done: int, result: R, watch: Stopwatch) -> None:
        """Write down what the step gave; `done` counts it from here on."""

    def agree(self, votes: Votes) -> MvarError | None:
        """Put together what ranks have to know of each other; an error of all of them ends the training, saved."""
        return None

    @abstractmethod
    def looks_due(self, done: int) -> set[str]:
        """Kinds of records that come from looking at the model after `done` steps."""

    @abstractmethod
    def look(self, done: int, looks: set[str]) -> None:
        """Validate and draw: give these records. May raise StopAskedError, on all ranks."""

    @abstractmethod
    def save(self, done: int, *, last: bool) -> None:
        """Save the state, whole on disk before this returns if it is the last one."""

    @abstractmethod
    def finish(self, done: int) -> None:
        """After the last step: write what users want, and say so."""

    def settle(self) -> None:
        """See to it that what was saved is whole on disk."""

    def stopped(self, done: int, reason: str) -> None:
        """After stopping on purpose, with everything saved."""
