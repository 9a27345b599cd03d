"""The folder of a run: what is in it, who may work in it, and whether it is finished.

config.yaml       the resolved configuration of the last start
metrics.jsonl     every measurement (see mvar.run.tracking)
checkpoints/      step-000000123/ ... (see mvar.checkpoint.record)
samples/          grids of pictures; at the end film.webp of them
logs/             under Slurm, what each rank says (see mvar.log); of a chain of jobs, see mvar.cluster.chain
STOP              made by a user: save, stop with exit code 75; removed when heeded
FINISHED          made at the end: the same command has nothing left to do
history.jsonl     every start of this run and how it ended (see mvar.run.history)
.run.claim        whose process trains here (see mvar.run.claims)
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mvar.errors import CheckpointError, TrainingError
from mvar.files.disk import write_text
from mvar.log import log
from mvar.run.claims import Claims, claim_path
from mvar.run.names import CLAIM, is_leftover, remove_leftovers

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
        self.logs = path / "logs"
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
        """Wait for the claim until it is ours, or its holder is known to be alive."""
        begin, first, told = time.monotonic(), None, False
        while not claims.take(CLAIM):
            with contextlib.suppress(OSError):  # Given back just now.
                holder = claims.holder(CLAIM)
                first = holder.beat_s if first is None else first
                waited_s = time.monotonic() - begin
                if holder.beat_s != first or (holder.alive and waited_s > CLAIM_PATIENCE_S):
                    raise TrainingError(
                        f"run folder {self.path}: {holder.words} is training in it. Wait for its end, or give run=..."
                        " another folder."
                    )
                if not holder.alive and not told:
                    log.info("%s: %s had this run; waiting for a sign of its life.", self.path, holder.words)
                    told = True
            time.sleep(0.1)
        if not claims.holds(CLAIM):  # Before anything is written: another process took it over at the same moment.
            claims.release(CLAIM)
            self._take(claims)

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
        write_text(self.finished, json.dumps({"step": step, "samples": samples}) + "\n")

    def require_no_history(self) -> None:
        """Called where no checkpoint is usable: may a run begin here? Raises CheckpointError if one was ever saved."""
        there = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        saved = [path.name for path in there if not is_leftover(path)]
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
