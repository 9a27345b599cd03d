"""`mvar status`: how a training run is doing, on one screen. Reads files, and asks Slurm's queue where there is one.

goodput is the useful share of the time that the run's processes had their machines: the seconds of the steps that stand
in metrics.jsonl (work that was done twice counts once; validating, saving and starting do not count), times ranks, over
the seconds of all starts, times ranks. A start lasts from the job's allocation to the end of its process; one that was
killed until its last measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import re
import shutil
import subprocess
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvar.cli import run_command
from mvar.durations import duration
from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, ConfigError, MvarError
from mvar.paths import expanded
from mvar.run import strikes
from mvar.run.claims import claim_path, living_holder
from mvar.run.history import History, Start, Trouble
from mvar.run.names import CLAIM, folder_of, newest_step
from mvar.run.strikes import Strike

RECENT = 50
"""Steps over which loss and speed are averaged."""
QUEUE_WITHIN_S = 10.0
TROUBLES_SHOWN, SAMPLES_SHOWN = 5, 8
TROUBLE_NAMES = {"spike": "spikes", "skipped": "steps skipped", "went_back": "times gone back"}
JOB_NAME = "mvar-train-{run}"
_BLOCK_BYTES = 1 << 18
_STEP_SECONDS = re.compile(rb'"step_s": ([0-9.eE+-]+)')
_RESUMED = b'"kind": "resume"'


@dataclass(frozen=True)
class RankTimes:
    """How long ranks computed in a step's forward passes, means over the last RECENT steps."""

    median_s: float
    """Of the median rank."""
    slowest_s: float
    slowest_rank: int
    """Who was the slowest most often, and in how many of these steps."""
    times: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """What metrics.jsonl says."""

    step: int
    samples: int
    loss: float | None
    """Of the last step, nats per token; None where it was not finite."""
    mean_loss: float | None
    """Of the last RECENT steps."""
    imgs_per_s: float
    step_s: float
    """Mean of the last RECENT steps."""
    last_step: int | None
    """Where the run is to end; None: written by an mvar that did not say."""
    ranks: RankTimes | None


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest checkpoint."""

    step: int
    age_s: float
    damaged: int
    """How many checkpoints lie beside, set aside as damaged."""


@dataclass(frozen=True)
class QueueJob:
    """One line of squeue."""

    job: str
    name: str
    state: str
    elapsed: str
    limit: str
    where: str
    """Nodes, or why it waits."""


@dataclass(frozen=True)
class Period:
    """One start of the run and the time it took."""

    start: Start
    begin: float
    """When it had its machines, Unix seconds."""
    end: float
    running: bool

    @property
    def why(self) -> str:
        if self.start.code is not None:
            reason = textwrap.shorten(self.start.reason, 80, placeholder=" ...")
            return f"{reason} (exit code {self.start.code})"
        return "running" if self.running else "killed"


@dataclass(frozen=True)
class Status:
    run: str
    state: str
    """training, finished, stopped, failed, killed, not begun, or not training (nothing says why)."""
    holder: str | None
    """Whose process trains, if one does."""
    measured: Measured | None
    eta_s: float | None
    saved: NewestCheckpoint | None
    jobs: list[QueueJob]
    queue_problem: str | None
    """Why the queue is not known."""
    periods: list[Period]
    goodput: float | None
    allocated_rank_s: float
    troubles: list[Trouble]
    """Bad steps, also those that a rollback undid; oldest first."""
    strikes: list[Strike]
    """What the ranks found against machines."""


def status_of(run: Path, now: float | None = None) -> Status:
    """Everything known about a run folder. Raises MvarError if it is none."""
    now = time.time() if now is None else now
    metrics, starts = run / "metrics.jsonl", History(run).starts()
    if not starts and not metrics.is_file() and not (run / "config.yaml").is_file():
        what = (
            "is no run folder (no config.yaml, history.jsonl or metrics.jsonl in it)" if run.is_dir() else "not found"
        )
        raise MvarError(f"{run}: {what}. Give the folder that was run=... of `mvar train`.")
    holder = living_holder(run, CLAIM, now)
    measured = read_measured(metrics)
    periods = periods_of(starts, _last_sign(run), now if holder else None)
    jobs, problem = queue_of(run, {start.job.split("_")[0] for start in starts if start.job})
    rank_s = sum((period.end - period.begin) * period.start.world for period in periods)
    left = None if measured is None or measured.last_step is None else measured.last_step - measured.step
    return Status(
        run=str(run),
        state=_state(run, starts, holder),
        holder=holder,
        measured=measured,
        eta_s=None if left is None or measured is None else max(0, left) * measured.step_s,
        saved=newest_checkpoint(run / "checkpoints", now),
        jobs=jobs,
        queue_problem=problem,
        periods=periods,
        goodput=min(1.0, useful_rank_seconds(metrics) / rank_s) if rank_s else None,
        allocated_rank_s=rank_s,
        troubles=History(run).troubles(),
        strikes=strikes.read(run),
    )


def _state(run: Path, starts: Sequence[Start], holder: str | None) -> str:
    if holder:
        return "training"
    if (run / "FINISHED").exists():
        return "finished"
    if not starts:
        return "not training" if (run / "metrics.jsonl").is_file() else "not begun"
    return {None: "killed", EXIT_FINISHED: "finished", EXIT_STOPPED: "stopped"}.get(starts[-1].code, "failed")


def _last_sign(run: Path) -> float:
    """When the run's folder was last written to by a training, Unix seconds."""
    times = [0.0]
    for path in (run / "metrics.jsonl", claim_path(run, CLAIM)):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def periods_of(starts: Sequence[Start], last_sign: float, now: float | None) -> list[Period]:
    """When each start had its machines. `last_sign`: of the last one's life; `now`: given if that is running."""
    found: list[Period] = []
    for number, start in enumerate(starts):
        after = starts[number + 1] if number + 1 < len(starts) else None
        running = after is None and start.end_time is None and now is not None
        end = start.end_time
        if end is None and after is not None:
            end = min(after.last_sign if after.last_sign is not None else after.time, after.time)
        elif end is None:
            end = now if now is not None else last_sign
        begin = min(start.time if start.allocated is None else start.allocated, start.time)
        if found:  # Two starts in one job share its allocation.
            begin = min(max(begin, found[-1].end), start.time)
        found.append(Period(start, begin, max(end, start.time), running))
    return found


def read_measured(path: Path) -> Measured | None:
    """The end of metrics.jsonl, read backwards as far as needed; None if no step was measured yet."""
    records: list[dict[str, Any]] = []
    for line in _lines_backwards(path):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record.get("kind") == "train":
                records.append(record)
        if len(records) == RECENT:
            break
    if not records:
        return None
    step_s = sum(record["step_s"] for record in records)
    losses = [record["loss"] for record in records if record["loss"] is not None]
    resumed = _last_resumed(path)
    return Measured(
        step=records[0]["step"],
        samples=records[0]["samples"],
        loss=records[0]["loss"],
        mean_loss=sum(losses) / len(losses) if losses else None,
        imgs_per_s=sum(record["imgs_per_s"] * record["step_s"] for record in records) / max(step_s, 1e-9),
        step_s=step_s / len(records),
        last_step=resumed.get("last_step"),
        ranks=rank_times([record for record in records if "slowest_rank" in record]),
    )


def rank_times(records: Sequence[Mapping[str, Any]]) -> RankTimes | None:
    """Of `train` records; None where an older mvar wrote them."""
    if not records:
        return None
    (slowest, times), *_ = Counter(record["slowest_rank"] for record in records).most_common(1)
    means = [sum(record[name] for record in records) / len(records) for name in ("forward_s", "slowest_s")]
    return RankTimes(means[0], means[1], slowest, times, len(records))


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Complete lines of a file, last first."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        position, rest = file.seek(0, 2), b""
        while position:
            size = min(_BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            lines = (file.read(size) + rest).split(b"\n")
            rest = lines.pop(0)
            yield from (line for line in reversed(lines) if line)
        if rest:
            yield rest


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    if not path.is_file() or not path.stat().st_size:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _last_resumed(path: Path) -> dict[str, Any]:
    with _mapped(path) as data:
        return _record_at(data, data.rfind(_RESUMED))


def _record_at(data: mmap.mmap | bytes, place: int) -> dict[str, Any]:
    """The record whose line holds `place`; empty if there is none, or it is torn."""
    if place >= 0:
        begin, end = data.rfind(b"\n", 0, place) + 1, data.find(b"\n", place)
        with contextlib.suppress(ValueError):
            record: dict[str, Any] = json.loads(data[begin : end if end >= 0 else len(data)])
            return record
    return {}


def useful_rank_seconds(path: Path) -> float:
    """Seconds of all steps that stand in metrics.jsonl, times ranks. One pass, without parsing every line."""
    total = 0.0
    with _mapped(path) as data:
        end = data.rfind(b"\n") + 1
        begin, world = 0, 1
        while begin < end:
            resumed = data.find(_RESUMED, begin, end)
            stop = resumed if resumed >= 0 else end
            total += world * sum(float(match[1]) for match in _STEP_SECONDS.finditer(data, begin, stop))
            world = _record_at(data, resumed).get("world", world)
            begin = stop + len(_RESUMED)
    return total


def newest_checkpoint(checkpoints: Path, now: float) -> NewestCheckpoint | None:
    step = newest_step(checkpoints)
    if step is None:
        return None
    written = (folder_of(checkpoints, step) / "checkpoint.json").stat().st_mtime
    damaged = sum(".damaged" in entry.name for entry in checkpoints.iterdir())
    return NewestCheckpoint(step, max(0.0, now - written), damaged)


def queue_of(run: Path, known: set[str]) -> tuple[list[QueueJob], str | None]:
    """This run's jobs in Slurm's queue, and why it is not known.

    They are those that are named after the run, or have `run=` it in their command, or an id in `known`.
    """
    if shutil.which("squeue") is None:
        return [], "no Slurm on this machine"
    names = ["squeue", "--noheader", "--me", "--format=%i|%j|%T|%M|%l|%R|%A|%F|%Z|%o"]
    try:
        done = subprocess.run(names, capture_output=True, text=True, timeout=QUEUE_WITHIN_S)
    except subprocess.TimeoutExpired:
        return [], f"squeue gave no answer in {QUEUE_WITHIN_S:g} s"
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or ["squeue failed"])[-1]
    jobs = []
    for line in done.stdout.splitlines():
        *shown, job, array, folder, command = (field.strip() for field in line.split("|", 9))
        named = shown[1] == JOB_NAME.format(run=run.resolve().name)
        if named or known & {job, array} or run.resolve() in _runs_in(command, Path(folder)):
            jobs.append(QueueJob(*shown))
    return jobs, None


def _runs_in(command: str, folder: Path) -> list[Path]:
    found = []
    for word in command.split():
        if word.startswith("run="):
            with contextlib.suppress(ConfigError):  # Somebody else's, who has other variables.
                found.append((folder / expanded(word.removeprefix("run="))).resolve())
    return found


# --- on the screen ---------------------------------------------------------------------------------------------------


def show(status: Status, most: int = 8) -> str:
    """The screen. `most`: newest starts shown."""
    lines = [("run", f"{status.run}: {status.state}" + (f" ({status.holder})" if status.holder else ""))]
    if (measured := status.measured) is None:
        lines.append(("step", "none yet"))
    else:
        last = measured.last_step
        whole = f" of {last:,} ({100 * measured.step / max(last, 1):.1f} %)" if last is not None else ""
        lines.append(("step", f"{measured.step:,}{whole}, {measured.samples:,} images seen"))
        lines.append(
            ("loss", f"{_number(measured.loss)}, mean of the last {RECENT} steps {_number(measured.mean_loss)}")
        )
        left = "" if status.eta_s is None else f", {duration(status.eta_s)} of training left"
        lines.append(("speed", f"{measured.imgs_per_s:,.1f} img/s, {measured.step_s:.3g} s a step{left}"))
        if (ranks := measured.ranks) is not None:
            slowest = f"rank {ranks.slowest_rank} in {ranks.times} of {ranks.steps} steps"
            text = f"forward passes {ranks.median_s:.3g} s on the median rank, {ranks.slowest_s:.3g} s on the slowest"
            lines.append(("ranks", f"{text} ({slowest})"))
    if (saved := status.saved) is None:
        lines.append(("checkpoint", "none yet"))
    else:
        damaged = f"; {saved.damaged} damaged set aside" if saved.damaged else ""
        lines.append(("checkpoint", f"step {saved.step:,}, {duration(saved.age_s)} ago{damaged}"))
    lines.append(("queue", status.queue_problem or ("" if status.jobs else "no job of this run")))
    lines += [("", f"{j.job} {j.name} {j.state} {j.elapsed} of {j.limit} {j.where}") for j in status.jobs]
    if status.goodput is not None:
        hours = status.allocated_rank_s / 3600
        lines.append(("goodput", f"{100 * status.goodput:.1f} % of {hours:,.2f} rank-hours"))
    lines += _trouble_lines(status.troubles)
    hidden = max(0, len(status.periods) - most)
    lines.append(("starts", f"{len(status.periods)}" + (f", the last {most}:" if hidden else "")))
    lines += [("", _start_line(period)) for period in status.periods[hidden:]]
    if status.strikes:
        lines.append(("machines", f"{len(status.strikes)} strikes, the newest:"))
        lines += [("", textwrap.shorten(str(strike), 160, placeholder=" ...")) for strike in status.strikes[-most:]]
    return "\n".join(f"{name:11} {text}".rstrip() for name, text in lines if name != "queue" or text)


def _trouble_lines(troubles: Sequence[Trouble]) -> Iterator[tuple[str, str]]:
    if not troubles:
        return
    count = Counter(trouble.event for trouble in troubles)
    yield "trouble", ", ".join(f"{count[event]} {what}" for event, what in TROUBLE_NAMES.items() if count[event])
    for trouble in troubles[-TROUBLES_SHOWN:]:
        named = " ".join(str(sample) for sample in trouble.samples[:SAMPLES_SHOWN])
        more = ", ..." if len(trouble.samples) > SAMPLES_SHOWN else ""
        samples = f"; samples {named}{more}" if named else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(trouble.time))
        where = "to step" if trouble.event == "went_back" else "step"
        event = trouble.event.replace("_", " ")
        yield "", f"{when} {event} {where} {trouble.step:,}: {trouble.reason}{samples}"


def _start_line(period: Period) -> str:
    start = period.start
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time))
    job = f" job {start.job}" if start.job else ""
    step = "-" if start.begin_step is None else f"{start.begin_step:,}"
    where = start.nodes or start.host
    lasted = duration(period.end - period.begin)
    return f"{when}{job} on {where}, {start.world} ranks, from step {step}, {lasted}: {period.why}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def to_json(status: Status) -> Mapping[str, Any]:
    tree = asdict(status)
    for period, kept in zip(tree["periods"], status.periods, strict=True):
        period["why"] = kept.why
    return tree


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    args = parser.parse_args(argv)
    status = status_of(args.run)
    print(json.dumps(to_json(status), indent=1) if args.json else show(status))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
