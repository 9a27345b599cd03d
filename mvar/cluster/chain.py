"""Before and after each start of a training chain's Slurm job: look, have it decided, write it down, act.

    python -m mvar.cluster.chain begin --config FILE run=RUN [key=value ...]     may this job train? (exit codes: BEGIN)
    python -m mvar.cluster.chain end RUN --code N                                what after it? (exit code: the job's)

A chain is a job array `1-N%1` whose tasks resume one run. What becomes of a start follows from the exit code of
`mvar train`, from Slurm, and from RUN/logs/chain.jsonl, where every start and its end is written down:

    finished    nothing is left to do: the rest of the chain is cancelled
    next        saved on purpose: the next task of the array goes on
    requeue     preempted, or a fault: the same task starts again, without nodes that failed repeatedly, or that their
                own ranks proved to be bad
    stop        a user's error, STOP, or a crash loop: the rest is cancelled, with a message

slurm/train.sbatch calls both. What follows is decided in `decisions`; `Slurm` holds the few calls that act. Needs no
torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mvar.cli import run_command
from mvar.cluster import snapshot
from mvar.cluster.decisions import (
    NO_FAULTS,
    Attempt,
    Blame,
    Limits,
    SlurmJob,
    blame,
    decide,
    expand,
    strikes,
)
from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, ConfigError, MvarError, WriteError
from mvar.files import json_lines
from mvar.files.disk import place
from mvar.log import log
from mvar.paths import expanded
from mvar.run import strikes as strike_file
from mvar.run.history import History
from mvar.run.names import newest_step

BEGIN = {"train": 0, "user error": 2, "leave": 90}
"""Exit codes of `begin`. leave: there is nothing to do for this job."""
ANSWER_WITHIN_S = 30


def newest_saved(run: Path) -> int:
    """Steps of the newest checkpoint, 0 without one. Verifying it is the training's."""
    return newest_step(run / "checkpoints") or 0


class Logs:
    """RUN/logs: what the jobs of a run said, the record of their starts, and the nodes to avoid.

    train.log           everything that the scripts and rank 0 say, of all jobs
    rank-00003.log      what rank 3 said, of all jobs (mvar.log)
    JOB/rank-000.log    stdout and stderr of one rank, appended to when the job starts again
    JOB/srun-R.log      what srun said of its R-th restart
    latest              link to the newest JOB
    chain.jsonl         every start and its end
    excluded-nodes      a node a line, with the evidence; remove a line to use the node again
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "logs"
        self.record = self.folder / "chain.jsonl"
        self.excluded = self.folder / "excluded-nodes"

    def open(self, job: SlurmJob) -> None:
        (self.folder / job.name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(WriteError):  # It is a convenience.
            place(self.folder / "latest", lambda link: link.symlink_to(job.name))

    def srun(self, job: str, restarts: int) -> str:
        path = self.folder / job / f"srun-{restarts}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def begin(self, job: SlurmJob, step: int) -> None:
        self._write("begin", job.name, job.restarts, chain=job.chain, nodes=job.nodes, step=step)

    def end(self, job: str, restarts: int, saved: int, code: int | None, action: str, blamed: Blame, why: str) -> None:
        outcome = {"saved": saved, "code": code, "action": action, "reason": why}
        self._write("end", job, restarts, **outcome, blamed=blamed.nodes, evidence=blamed.evidence)

    def _write(self, event: str, job: str, restarts: int, **values: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"event": event, "time": time.time(), "job": job, "restarts": restarts}
        json_lines.append(self.record, entry | values)

    def attempts(self) -> list[Attempt]:
        """All starts, oldest first. Lines torn by a kill are passed over."""
        found: list[Attempt] = []
        for entry in json_lines.read(self.record):
            with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
                if entry["event"] == "begin":
                    names = ("job", "chain", "restarts", "time", "step")
                    found.append(Attempt(nodes=tuple(entry["nodes"]), **{name: entry[name] for name in names}))
                elif entry["event"] == "end":
                    ended = {name: entry[name] for name in ("saved", "code", "action")}
                    which = [a.job == entry["job"] and a.restarts == entry["restarts"] for a in found]
                    place = len(which) - 1 - which[::-1].index(True)
                    found[place] = Attempt(**(vars(found[place]) | ended | {"blamed": tuple(entry["blamed"])}))
        return found

    def avoided(self) -> list[str]:
        """Nodes that are not to be used."""
        if not self.excluded.is_file():
            return []
        return [line.split()[0] for line in self.excluded.read_text(encoding="utf-8").splitlines() if line.strip()]

    def avoid(self, node: str, evidence: str) -> None:
        with self.excluded.open("a", encoding="utf-8") as file:
            file.write(f"{node}  {evidence}\n")


class Slurm:
    """What the chain asks of Slurm. Every call is bounded in time; none raises: a chain outlives a silent Slurm."""

    def call(self, *words: str) -> str | None:
        """What the command prints; None if it failed."""
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_WITHIN_S)
        except (OSError, subprocess.SubprocessError) as error:
            say(f"{words[0]}: {error}")
            return None
        if done.returncode:
            say(f"{' '.join(words)}: {done.stderr.strip()}")
            return None
        return done.stdout

    def is_preempted(self, job: SlurmJob) -> bool:
        shown = self.call("scontrol", "-o", "show", "job", job.name) or ""
        return re.search(r"\bPreemptTime=\d", shown) is not None

    def restarted_since(self, nodes: Sequence[str], since: float) -> Blame:
        """Of the nodes, those that Slurm lost or that came up after `since` (Unix seconds)."""
        shown = self.call("scontrol", "-o", "show", "node", ",".join(nodes)) if nodes else None
        found = {}
        for line in (shown or "").splitlines():
            fields = dict(re.findall(r"\b(NodeName|State|SlurmdStartTime)=(\S+)", line))
            state, up = fields.get("State", ""), fields.get("SlurmdStartTime", "")
            if "DOWN" in state or "NOT_RESPONDING" in state or state.endswith("*"):
                found[fields["NodeName"]] = f"{fields['NodeName']}: {state}"
            elif up[:1].isdigit() and datetime.fromisoformat(up).timestamp() > since:
                found[fields["NodeName"]] = f"{fields['NodeName']}: came up again at {up}"
        return Blame(tuple(found), tuple(found.values()))

    def cancel_waiting(self, job: SlurmJob) -> None:
        if job.is_array:
            self.call("scancel", "--state=PENDING", job.chain)

    def requeue(self, job: SlurmJob, avoided: Sequence[str]) -> bool:
        """Start the job again, and neither it nor the rest of its chain on the nodes to avoid. It is killed soon."""
        if self.call("scontrol", "requeue", job.name) is None:
            return False
        if avoided:  # Only now: Slurm changes this of waiting jobs alone.
            self.call("scontrol", "update", f"JobId={job.name}", f"ExcNodeList={','.join(avoided)}")
            self.avoid_later(job, avoided)
        return True

    def avoid_later(self, job: SlurmJob, avoided: Sequence[str]) -> None:
        """The waiting tasks of the chain, too. Slurm answers with an error for each that does not wait."""
        if job.is_array and avoided:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                words = ["scontrol", "update", f"JobId={job.chain}", f"ExcNodeList={','.join(avoided)}"]
                subprocess.run(words, capture_output=True, timeout=ANSWER_WITHIN_S)


def say(text: str) -> None:
    log.info("chain: %s", text)


def seen_by_training(run: Path, job: str, restarts: int, nodes: Sequence[str]) -> tuple[Blame, dict[str, str]]:
    """What a start's own ranks found against its nodes (mvar.run.strikes): whom it counts against, and of those the
    nodes that are to be left out at once, with the proof."""
    own = [s for s in strike_file.read(run) if (s.job, s.restarts) == (job, restarts) and s.node in nodes]
    proven = {strike.node: str(strike) for strike in own if strike.out}
    if len(proven) == len(nodes) > 1:
        proven = {}  # All of them at once: no node's fault.
    return Blame(tuple(sorted({strike.node for strike in own})), tuple(map(str, own))), proven


def heed_others(logs: Logs, run: Path, attempts: Sequence[Attempt], limits: Limits) -> None:
    """Leave out nodes by what others than this run's chains found since the last start, as `mvar verify-step` does."""
    since, starts = max((a.time for a in attempts), default=0.0), {(a.job, a.restarts) for a in attempts}
    found = [one for one in strike_file.read(run) if one.time > since and (one.job, one.restarts) not in starts]
    exclude_proven(logs, {one.node: str(one) for one in found if one.out})
    evidence = Blame(tuple({one.node for one in found}), tuple(map(str, found)))
    exclude_repeaters(logs, run, attempts, limits, evidence)


def exclude_proven(logs: Logs, proven: Mapping[str, str]) -> None:
    """Write nodes that are proven bad on the list."""
    for node, proof in proven.items():
        if node not in logs.avoided():
            logs.avoid(node, proof)
            say(f"node {node} is excluded from this run: {proof}")


def exclude_repeaters(logs: Logs, run: Path, attempts: Sequence[Attempt], limits: Limits, evidence: Blame) -> None:
    """Write nodes that were to blame too often on the list, with the evidence."""
    avoided = logs.avoided()
    for node, count in strikes(attempts, strike_file.read(run)).items():
        if count >= limits.strikes and node in evidence.nodes and node not in avoided:
            starts = ", ".join(f"{a.job} (restart {a.restarts})" for a in attempts if node in a.blamed) or "other jobs"
            last = next((line for line in reversed(evidence.evidence) if node in line), "")
            text = f"failed {count} times: in {starts}; last: {last}"
            logs.avoid(node, text)
            say(f"node {node} is excluded from this run. It {text}")


def close_lost(logs: Logs, slurm: Slurm, run: Path, limits: Limits) -> list[Attempt]:
    """Write down the end of the last start if it was killed before it could: the time to look what became of it."""
    attempts = logs.attempts()
    if attempts and not attempts[-1].ended:
        last = attempts[-1]
        said = blame(logs.srun(last.job, last.restarts), last.nodes, None)
        seen = slurm.restarted_since(last.nodes, last.time)
        known, proven = seen_by_training(run, last.job, last.restarts, last.nodes)
        blamed = said + seen + known
        logs.end(last.job, last.restarts, newest_saved(run), None, "lost", blamed, "killed")
        say(
            f"the start before ({last.job}, restart {last.restarts}) was killed. {' | '.join(blamed.evidence)}".rstrip()
        )
        attempts = logs.attempts()
        exclude_proven(logs, proven)
        exclude_repeaters(logs, run, attempts, limits, blamed)
    return attempts


def begin(job: SlurmJob, slurm: Slurm, limits: Limits, run: Path, words: Sequence[str]) -> int:
    """Before training: decide whether this job trains, and prepare its logs and the run's snapshot."""
    logs = Logs(run)
    attempts = close_lost(logs, slurm, run, limits)
    own = [attempt for attempt in attempts if attempt.chain == job.chain]
    if own and own[-1].action in ("finished", "stop") and own[-1].job != job.name:
        say(f"job {own[-1].job} ended this chain ({own[-1].action}); nothing is left to do.")
        slurm.cancel_waiting(job)
        return BEGIN["leave"]
    if own and own[-1].action == "lost" and own[-1].job == job.name:
        decision = decide(None, job, own, limits, preempted=False, reason="")
        if decision.action == "stop":
            say(decision.message)
            step = newest_saved(run)
            logs.begin(job, step)
            logs.end(job.name, job.restarts, step, None, "stop", Blame(), "no progress")
            slurm.cancel_waiting(job)
            return BEGIN["leave"]
    heed_others(logs, run, attempts, limits)
    avoided = logs.avoided()
    if met := sorted({*avoided} & {*job.nodes}):
        say(f"got {', '.join(met)}, which this run avoids (see {logs.excluded}).")
        if job.restarts < limits.restarts and slurm.requeue(job, avoided):
            return BEGIN["leave"]
        say("cannot be requeued: training here all the same.")
    slurm.avoid_later(job, avoided)
    if own:  # Once for a chain, not at each of its starts.
        words = [word for word in words if word != "--resnapshot"]
    if code := run_command(snapshot.main, [str(run), *words]):
        slurm.cancel_waiting(job)
        return code
    logs.open(job)
    step = newest_saved(run)
    logs.begin(job, step)
    say(f"job {job.name}, restart {job.restarts}, on {', '.join(job.nodes)}; newest checkpoint: step {step}.")
    return BEGIN["train"]


def own_words(run: Path, job: SlurmJob, code: int) -> tuple[int, str]:
    """Exit code and reason of a start. What the training wrote at its end counts for more than what srun says: once the
    first rank ends with 75, srun kills those that are still on their way out, and reports that."""
    starts = History(run).starts()
    if not starts or (starts[-1].job, starts[-1].restarts) != (job.name, job.restarts):
        return code, ""
    said = starts[-1]
    return said.code if said.code in (EXIT_FINISHED, EXIT_STOPPED) else code, said.reason


def end(job: SlurmJob, slurm: Slurm, limits: Limits, run: Path, code: int) -> int:
    """After training: write down what happened, decide, act. Returns the job's exit code."""
    logs = Logs(run)
    code, reason = own_words(run, job, code)
    known, proven = seen_by_training(run, job.name, job.restarts, job.nodes)
    evidence = blame(logs.srun(job.name, job.restarts), job.nodes, code) + known
    step = newest_saved(run)
    outcome = {"saved": step, "code": code, "blamed": evidence.nodes}
    attempts = [Attempt(**(vars(a) | outcome)) if job.is_start(a) else a for a in logs.attempts()]
    own = [attempt for attempt in attempts if attempt.chain == job.chain]
    decision = decide(code, job, own, limits, preempted=slurm.is_preempted(job), reason=reason)
    logs.end(job.name, job.restarts, step, code, decision.action, evidence, reason)
    if code not in NO_FAULTS:
        say(f"logs: {logs.folder / job.name}. {' | '.join(evidence.evidence)}".rstrip())
    exclude_proven(logs, proven)
    exclude_repeaters(logs, run, attempts, limits, evidence)
    say(decision.message)
    if decision.action in ("finished", "stop"):
        slurm.cancel_waiting(job)
    elif decision.action == "next":
        slurm.avoid_later(job, logs.avoided())
    elif decision.action == "requeue" and not slurm.requeue(job, logs.avoided()):
        say("cannot be requeued: left to the next task of the array.")
    return decision.code


def parse_begin(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The run folder, and what `mvar.cluster.snapshot` is to be given. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="slurm/train.sbatch", add_help=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resnapshot", action="store_true")
    parser.add_argument("--change-batch", action="store_true")  # Goes to the training only.
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("overrides", nargs="*")
    try:
        args, unknown = parser.parse_known_intermixed_args(list(words))
    except argparse.ArgumentError as error:
        raise ConfigError(f"arguments of the training job: {error}.") from None
    if unknown:
        raise ConfigError(f"arguments of the training job: {unknown[0]} is not one of mvar train's that a chain takes.")
    if args.from_scratch:
        raise ConfigError("--from-scratch: a chain would do it at each start. Give run=... a new folder instead.")
    runs = [word.removeprefix("run=") for word in args.overrides if word.startswith("run=")]
    if not runs:
        raise ConfigError("the training job needs run=FOLDER among its arguments.")
    given = [word for word in args.overrides if not word.startswith("run=")]
    config = ["--config", str(args.config)] if args.config else []
    return Path(expanded(runs[-1])), [*config, *(["--resnapshot"] if args.resnapshot else []), *given]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    what, rest = words[:1], words[1:]
    if what in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    slurm, limits = Slurm(), Limits.of(os.environ)
    job = SlurmJob.of(os.environ, expand(os.environ.get("SLURM_JOB_NODELIST", "")))
    if what == ["begin"]:
        try:
            run, given = parse_begin(rest)
            return begin(job, slurm, limits, run, given)
        except MvarError:
            slurm.cancel_waiting(job)
            raise
    if what == ["end"]:
        parser = argparse.ArgumentParser(prog="python -m mvar.cluster.chain end")
        parser.add_argument("run", type=Path)
        parser.add_argument("--code", type=int, required=True, help="exit code of srun")
        args = parser.parse_args(rest)
        return end(job, slurm, limits, args.run, args.code)
    raise ConfigError(f"expected begin or end, got {' '.join(what) or 'nothing'}.")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
