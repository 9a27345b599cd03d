"""The loop of a training, whatever is trained: read, step, vote, record, look, save, and how it ends.

Ranks decide nothing on their own: whether to stop, whether the run folder is still theirs, whether the next step's data
can be read is put to the vote, once a step. Shapes and figures are the affair of what is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any, Generic, Protocol, TypeVar

from mvar.data.prefetch import Feed
from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, MvarError
from mvar.run.folder import RunFolder
from mvar.run.stopping import StopRequests, Watchdog
from mvar.run.tracking import Stopwatch
from mvar.run.world import World


@dataclass(frozen=True)
class Votes:
    """What ranks tell each other once a step: this rank's answers (0 or 1, or a number), or their sums over ranks."""

    stop: int = 0
    """I was asked to stop."""
    lost: int = 0
    """The run folder is not ours any more."""
    unreadable: int = 0
    """The next step's data cannot be read."""
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


B = TypeVar("B")
R = TypeVar("R", bound=Stepped)


class TrainingLoop(ABC, Generic[B, R]):
    """What happens around the steps. All methods are called by all ranks together."""

    def __init__(self, session: Session, feed: Feed[B], last_step: int, save_every: int) -> None:
        self.session, self.feed, self.last_step, self.save_every = session, feed, last_step, save_every

    def loop(self, done: int) -> int:
        """From `done` steps to the last one; returns the exit code."""
        session = self.session
        while done < self.last_step:
            session.watchdog.feed()
            watch = Stopwatch()
            with watch.waiting():
                batches = self.feed.take()
            result = self.step(done, batches)
            votes = result.votes
            done += 1
            ending = done == self.last_step
            if votes.lost:
                session.require_folder()
            self.record(done, result, watch)
            fault = self.agree(votes)
            found = self.look(done, ending=ending)
            leaving = bool(ending or votes.stop or votes.unreadable or fault)
            if leaving or due(done, self.save_every):
                session.watchdog.feed()
                self.save(done, found, last=leaving)
            if (votes.unreadable or fault) and not ending:
                session.world.raise_together(self.feed.error or (fault if session.world.is_main else None))
            if votes.stop and not ending:
                return self._stop(done)
        self.finish(done)
        return EXIT_FINISHED

    def _stop(self, done: int) -> int:
        reason = self.session.stops.reason or "another rank was asked to"
        if self.session.world.is_main:
            print(f"stopped after step {done} ({reason}); run the same command to go on.", flush=True)
            self.session.run.stop_file.unlink(missing_ok=True)
        self.stopped(done, reason)
        return EXIT_STOPPED

    @abstractmethod
    def step(self, done: int, batches: Sequence[B]) -> R:
        """Do step number `done` (0-based), and have all ranks vote."""

    @abstractmethod
    def record(self, done: int, result: R, watch: Stopwatch) -> None:
        """Write down what the step gave; `done` counts it from here on."""

    def agree(self, votes: Votes) -> MvarError | None:
        """Put together what ranks have to know of each other; an error of all of them ends the training, saved."""
        return None

    @abstractmethod
    def look(self, done: int, *, ending: bool) -> float | None:
        """Validate and draw where it is due; the loss of a validation, if there was one."""

    @abstractmethod
    def save(self, done: int, validation_loss: float | None, *, last: bool) -> None:
        """Save the state, whole on disk before this returns if it is the last one."""

    @abstractmethod
    def finish(self, done: int) -> None:
        """After the last step: write what users want, and say so."""

    def stopped(self, done: int, reason: str) -> None:
        """After stopping on purpose, with everything saved."""
