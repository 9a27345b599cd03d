"""The life of a run folder: who may work in it, when to stop, how it ends.

config.yaml       the resolved configuration of the last start
metrics.jsonl     every measurement (see mvar.run.tracking)
checkpoints/      step-000000123/ ... (see mvar.checkpoint.record)
samples/          grids of pictures
STOP              made by a user: save, stop with exit code 75; removed when heeded
FINISHED          made at the end: the same command has nothing left to do
history.jsonl     every start of this run and how it ended (see mvar.run.history)
.run.claim        whose process trains here (see mvar.run.claims)
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mvar.errors import CheckpointError, TrainingError
from mvar.run.claims import Claims, claim_path
from mvar.run.names import CLAIM, remove_leftovers

EXIT_FINISHED = 0
EXIT_STOPPED = 75
"""Stopped on purpose, with a checkpoint saved: run the same command again."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
CLAIM_PATIENCE_S = 5.0
"""A killed predecessor on this host may take this long to let go of the folder."""


class RunFolder:
    """Paths of a run, and the questions that only its folder can answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.stop_file = path / "STOP"
        self.finished = path / "FINISHED"

    @contextmanager
    def claimed(self, takeover_s: float) -> Iterator[Callable[[], bool]]:
        """Keep every other process out for as long as this lasts, and tidy up after killed ones.

        Gives a function that says whether the folder is still ours. A dead holder is replaced: on this host at once, of
        another host once it gave no sign of life for `takeover_s`. Raises TrainingError if the holder is alive.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with Claims(self.path, heartbeat_s=takeover_s / 9, stale_after_s=takeover_s) as claims:
            self._take(claims)
            remove_leftovers(self.checkpoints)
            yield lambda: claims.holds(CLAIM)

    def loss(self, takeover_s: float) -> TrainingError:
        """What to say when `claimed`'s function says that the folder is not ours any more."""
        return TrainingError(
            f"run folder {self.path}: another process took it over, because this one gave no sign of life for"
            f" {takeover_s:g} s (takeover_s). This one ends; nothing was changed."
        )

    def _take(self, claims: Claims) -> None:
        begin, first, told = time.monotonic(), None, False
        while not claims.take(CLAIM):
            with contextlib.suppress(OSError):  # Given back just now.
                holder, beat = claims.holder(CLAIM)
                first = beat if first is None else first
                waited_s = time.monotonic() - begin
                here = holder.endswith(f" on {socket.gethostname()}")
                if beat != first or (here and waited_s > CLAIM_PATIENCE_S):
                    raise TrainingError(
                        f"run folder {self.path}: {holder} is training in it. Wait for its end, or give run=... another"
                        " folder."
                    )
                if not here and not told:
                    print(f"{self.path}: {holder} had this run; waiting for a sign of its life.", flush=True)
                    told = True
            time.sleep(0.1)

    def finished_at(self) -> tuple[int, int]:
        """Steps and samples after which the run was finished; (-1, -1) if it was not."""
        try:
            tree = json.loads(self.finished.read_text(encoding="utf-8"))
            return int(tree["step"]), int(tree["samples"])
        except FileNotFoundError:
            return -1, -1
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{self.finished}: damaged ({error}). Remove it to go on training.") from None

    def finish(self, step: int, samples: int) -> None:
        temporary = self.finished.with_name(".FINISHED.tmp")
        temporary.write_text(json.dumps({"step": step, "samples": samples}) + "\n", encoding="utf-8")
        os.replace(temporary, self.finished)

    def require_no_history(self) -> None:
        """Called where no checkpoint is usable: may a run begin here? Raises CheckpointError if one was ever saved."""
        saved = [path.name for path in self.checkpoints.iterdir()] if self.checkpoints.is_dir() else []
        if saved or self._ever_saved():
            raise CheckpointError(
                f"run folder {self.path} has a history but no usable checkpoint"
                f" ({', '.join(sorted(saved)) or 'the folder checkpoints/ is empty'}). Put one back, or add"
                " --from-scratch to begin again at step 0 (what is there is moved aside, not deleted)."
            )

    def _ever_saved(self) -> bool:
        if not self.metrics.is_file():
            return False
        with self.metrics.open(encoding="utf-8", errors="replace") as lines:
            return any('"kind": "checkpoint"' in line for line in lines)

    def set_aside(self) -> Path | None:
        """Move everything in the folder into `before-from-scratch-N`; None if there was nothing."""
        entries = [
            e
            for e in self.path.iterdir()
            if not e.name.startswith((claim_path(self.path, CLAIM).name, "before-from-scratch-"))
        ]
        if not entries:
            return None
        number = 1
        while (aside := self.path / f"before-from-scratch-{number}").exists():
            number += 1
        aside.mkdir()
        for entry in entries:
            shutil.move(str(entry), aside / entry.name)
        return aside


class StopRequests:
    """Everything that may ask this process to stop: signals, the STOP file, the end of a Slurm job's time.

    Asking is local; the engine tells all ranks in the same step. Use as a context manager; handlers are put back.
    """

    def __init__(
        self,
        stop_file: Path,
        margin_s: float,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stop_file, self._clock = stop_file, clock
        end = environ.get("SLURM_JOB_END_TIME", "")
        self._deadline = float(end) - margin_s if end.isdigit() else None
        self._signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal is not None:
            return f"got {self._signal}"
        if self._deadline is not None and self._clock() >= self._deadline:
            return "the job's time is nearly over"
        if self._stop_file.exists():
            return f"{self._stop_file} exists"
        return None


class Watchdog:
    """Ends this process (exit code 1, stacks of all its threads on stderr) when `feed` is not called for `limit_s`.

    A rank that hangs makes the others wait for it, so the watchdogs of all ranks bite within moments, and the log shows
    where each one stood. It works while a thread is stuck in foreign code: Python's faulthandler needs no interpreter.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def __enter__(self) -> Watchdog:
        self.feed()
        return self

    def feed(self) -> None:
        if self._limit_s:
            faulthandler.dump_traceback_later(self._limit_s, exit=True, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
