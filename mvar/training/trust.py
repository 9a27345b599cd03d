"""What a training asks of its machines: sound before it begins, of one mind at each checkpoint, repeatable, in step."""

from __future__ import annotations

import time
from collections.abc import Callable

from mvar.config import TrainConfig
from mvar.data.stream import Batch
from mvar.log import log
from mvar.machine import selfcheck
from mvar.run.tracking import Tracker
from mvar.run.world import World
from mvar.training.agreement import disagreement
from mvar.training.engine import Engine, StepResult
from mvar.training.pace import Pace, Spread
from mvar.training.suspects import Suspects
from mvar.training.twice import difference


def require_sound_machines(config: TrainConfig, world: World, suspects: Suspects) -> None:
    """In a job of Slurm, have every rank test its machine. Raises HardwareFaultError or RemoteError if one is bad."""
    if not any(world.gather(selfcheck.wanted())):
        return
    began_s = time.perf_counter()
    folders = [folder for folder in (config.data.stage, config.engine.offload_folder) if folder and folder.is_dir()]
    found = world.gather(selfcheck.try_rank(world.device, folders, first_here=world.place.local_rank == 0))
    against = selfcheck.verdicts(found)
    for verdict in against:
        suspects.strike(verdict.rank, verdict.what, verdict.evidence, out=verdict.out)
    bad = [verdict for verdict in against if verdict.out]
    if world.is_main and not bad:
        seconds = time.perf_counter() - began_s
        log.info("self-check of %d ranks in %.1f s: %s", world.size, seconds, "; ".join(t.text for t in found[0]))
    lines = "\n  ".join(f"{suspects.describe(verdict.rank)}: {verdict.evidence}" for verdict in bad)
    suspects.end(
        (verdict.rank for verdict in bad),
        f"the self-check before the training failed on:\n  {lines}\nRun without these machines."
        f" {selfcheck.VARIABLE}=off trains all the same.",
    )


class Trust:
    """Looks at the ranks of one training while it goes on. All methods are called by all ranks together."""

    def __init__(self, engine: Engine, suspects: Suspects) -> None:
        trust = engine.config.trust
        self._engine, self._suspects = engine, suspects
        self._pace = Pace(0 if engine.stage == 3 else trust.slow_factor, trust.slow_steps)

    def require_agreement(self, step: int, before: Callable[[], object]) -> None:
        """Called before the weights after `step` steps are saved. Raises HardwareFaultError or RemoteError, after
        `before`, where ranks hold other weights than each other."""
        found = disagreement(self._engine.partition, self._engine.weights, self._engine.world)
        if found is None:
            return
        if found.certain:
            for rank in found.ranks:
                self._suspects.strike(rank, "its weights differ", found.evidence, step=step)
        before()
        who = ", ".join(self._suspects.describe(rank) for rank in found.ranks)
        self._suspects.end(
            found.ranks,
            f"the weights after step {step} differ between ranks: {who}: {found.evidence}. They are not saved; the"
            " checkpoint before is untouched. Run again: a memory or a link of this machine changed bits.",
        )

    def keep_pace(self, step: int, result: StepResult) -> dict[str, object]:
        """What a step's record says of how long ranks took; a rank that stays behind is noted."""
        for rank, evidence in self._pace.behind(result.forward_s):
            self._suspects.strike(rank, "stays behind", evidence, step=step)
        spread = Spread.of(result.forward_s)
        return {"forward_s": spread.median_s, "slowest_s": spread.slowest_s, "slowest_rank": spread.slowest_rank}

    def compute_twice(self, step: int, batch: Batch, tracker: Tracker) -> None:
        """A micro-batch of the step before `step`, with the weights after it; a difference is noted."""
        began_s = time.perf_counter()
        found = self._engine.world.gather(difference(self._engine, step - 1, batch))
        differing = [rank for rank, text in enumerate(found) if text is not None]
        for rank in differing:
            self._suspects.strike(rank, "computes differently twice", str(found[rank]), step=step)
        tracker.write("verify", step, seconds=time.perf_counter() - began_s, differing=differing)
