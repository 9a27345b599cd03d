"""Where measurements go: metrics.jsonl always; the console, Weights & Biases and TensorBoard behind the same calls.

metrics.jsonl has one JSON object a line. All have `kind`, `step` (optimizer steps done) and `samples` (images seen).

    train       loss, loss_per_scale, accuracy, accuracy_per_scale, grad_norm, lr, weight_decay, skipped, imgs_per_s,
                step_s, wait_s (of it, waiting for data), memory_gib; forward_s (of a step's forward passes, the median
                rank's), slowest_s, slowest_rank; bad_samples, loss_scale and mfu where they apply
    val         images, loss, loss_per_scale, accuracy, accuracy_per_scale
    sample      file (relative to the run folder)
    evaluation  images, seconds, and figures of drawn pictures: fid | fd_efflite0, kid, precision, recall, ..., *_error
    checkpoint  seconds (from its beginning until it existed), stall_s (of it, training stood still)
    spike       reason, worst_samples: a loss or gradient far above the usual; the update was made
    verify      seconds, differing (ranks whose two computations of one micro-batch differ)
    not_saved   error: a checkpoint that failed, where the run goes on without it
    resume      world, zero_stage, global_batch, last_step: training went on from this step, or began (step 0)

Losses are nats per token, accuracies shares of tokens, both means over the global batch; null where not finite. Numbers
are written in full, so equal lines mean bit-equal losses. Every step has one `train` record: a resumed run first cuts
what lies beyond the step it goes on from.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from mvar.config import TrackingConfig
from mvar.files.disk import cannot_write, write_text
from mvar.files.json_lines import JsonRecord
from mvar.log import log


class Sink(Protocol):
    """One place for measurements. `record` is complete and finite (None where a value was not)."""

    def write(self, record: JsonRecord) -> None: ...

    def close(self) -> None: ...


Lines = Callable[[JsonRecord], str | None]
"""The line that a record is worth on a terminal, None if it is none."""


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class JsonLines:
    """metrics.jsonl. Each record goes to the system at once, so that only a crash of the machine can lose it.

    On a full disk records wait in memory and are written once there is room; no line is ever torn or doubled.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.kinds = {record["kind"] for record in cut_after(path, resumed_step) if record["step"] == resumed_step}
        """What was recorded of the step that the run goes on from."""
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    def write(self, record: JsonRecord) -> None:
        self._waiting.append(json.dumps(record).encode() + b"\n")
        try:
            self._flush()
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s: %s; records wait.", self._file.name, error)

    def _flush(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        data = memoryview(b"".join(self._waiting))
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(end)
            raise
        self._waiting.clear()

    def sync(self) -> None:
        """To disk: a checkpoint must not be newer than its records. Raises WriteError."""
        try:
            self._flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(Path(self._file.name), error) from None

    def close(self) -> None:
        try:
            self._flush()
        except OSError:  # Of steps since the last checkpoint: they will be done again.
            log.warning("%d last records are lost: no room.", len(self._waiting))
        self._file.close()


def cut_after(path: Path, step: int) -> list[JsonRecord]:
    """Drop records beyond `step`, and lines torn by a kill; gives the others. Complete or unchanged."""
    if not path.is_file():
        return []
    kept, records = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and (record := json.loads(line))["step"] <= step:
                kept.append(line)
                records.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))
    return records


class Console:
    """What the terminal shows of a record: the lines that `lines` makes of it."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def write(self, record: JsonRecord) -> None:
        text = self._lines(record)
        if text is not None:
            log.info("%s", text)

    def close(self) -> None:
        pass


def place(record: JsonRecord, last_step: int) -> str:
    """How a line about a record begins: which step of how many."""
    return f"step {record['step']:>{len(str(last_step))}}/{last_step}"


class TensorBoard:
    """Events under RUN/tensorboard; what lies beyond the resumed step is hidden from the curves."""

    def __init__(self, folder: Path, every: int, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resumed_step + 1)
        self._folder, self._every = folder.parent, every

    def write(self, record: JsonRecord) -> None:
        if _wanted(record, self._every):
            for name, value in flat(record).items():
                self._writer.add_scalar(name, value, record["step"])
        if record["kind"] == "sample":
            self._writer.add_image(
                "samples", _picture(self._folder / record["file"]), record["step"], dataformats="HWC"
            )

    def close(self) -> None:
        self._writer.close()


STITCHES_OFFLINE = (0, 31)
"""The first wandb whose offline segments know that they go on with a run: of older ones each upload replaces the one
before."""
STEP = "step"
"""The axis of optimizer steps."""
OLD_MODES = {"dryrun": "offline", "run": "online"}


def wandb_mode(asked: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """How wandb is to work: as `asked` (the key of the configuration), else as WANDB_MODE says; None: nobody says."""
    said = environ.get("WANDB_MODE", "").strip().lower()
    said = OLD_MODES.get(said, said)
    if asked is not None and said and said != asked:
        log.warning("wandb: tracking.wandb=%s is taken, and not WANDB_MODE=%s. Unset one of them.", asked, said)
    return asked or said or None


class WeightsAndBiases:
    """One run on wandb over all restarts: its id is kept in the run folder.

    wandb's own step only ever rises: what comes with a lower one, as after a rollback, is dropped. So it counts the
    calls, and ours is an axis of its own, against which everything is drawn.
    """

    def __init__(self, folder: Path, config: TrackingConfig, settings: Mapping[str, Any], mode: str) -> None:
        import wandb

        kept = folder / "wandb-id"
        if not kept.is_file():
            write_text(kept, uuid.uuid4().hex[:12])
        elif mode == "offline" and tuple(map(int, re.findall(r"\d+", wandb.__version__)[:2])) < STITCHES_OFFLINE:
            log.warning(
                "wandb %s: the offline segments of a run that was resumed replace each other when they are synced."
                " Install wandb %s or newer.",
                *(wandb.__version__, ".".join(map(str, STITCHES_OFFLINE))),
            )
        self._wandb, self._folder, self._every = wandb, folder, config.log_every
        self._run = wandb.init(
            project=config.wandb_project,
            name=folder.name,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]  # wandb says itself what it does not know
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, record: JsonRecord) -> None:
        if _wanted(record, self._every):
            self._run.log(flat(record) | {STEP: record["step"]})
        if record["kind"] == "sample":
            picture = self._wandb.Image(str(self._folder / record["file"]))
            self._run.log({"samples": picture, STEP: record["step"]})

    def close(self) -> None:
        self._run.finish()


def _picture(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _wanted(record: JsonRecord, every: int) -> bool:
    return bool(record["kind"] == "val" or (record["kind"] == "train" and record["step"] % every == 0))


def flat(record: JsonRecord) -> dict[str, float]:
    """Numbers of a record as `kind/name` and `kind/name/scale`, for tools that know nothing of lists."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if name.endswith("_per_scale"):
            for scale, item in enumerate(value, start=1):
                if item is not None:
                    numbers[f"{record['kind']}/{name}/{scale:02}"] = float(item)
        elif isinstance(value, int | float) and name != "step":
            numbers[f"{record['kind']}/{name}"] = float(value)
    return numbers


class Guarded:
    """A sink that may fail without stopping the run: its first error is shown, then it stays silent."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        self._try(lambda: setattr(self, "_sink", make()))

    def write(self, record: JsonRecord) -> None:
        if (sink := self._sink) is not None:
            self._try(lambda: sink.write(record))

    def close(self) -> None:
        if (sink := self._sink) is not None:
            self._try(sink.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._sink = None
            log.warning("%s failed and is off from here: %s", self._name, error)


class Tracker:
    """Hands each record to every sink. On ranks other than 0 it is silent."""

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        *,
        is_main: bool,
        resumed_step: int,
        samples_at: Callable[[int], int],
        settings: Mapping[str, Any],
        lines: Lines,
    ) -> None:
        """`settings`: what Weights & Biases is told of the run; `lines`: what the terminal shows of each record."""
        self._samples_at = samples_at
        self._sinks: list[Sink] = []
        self._lines: JsonLines | None = None
        if not is_main:
            return
        self._lines = JsonLines(folder / "metrics.jsonl", resumed_step)
        self._sinks = [self._lines, Console(lines)]
        mode = wandb_mode(config.wandb) or "offline"
        if mode != "disabled":
            self._sinks.append(Guarded("wandb", lambda: WeightsAndBiases(folder, config, settings, mode)))
        if config.tensorboard:
            make = lambda: TensorBoard(folder / "tensorboard", config.log_every, resumed_step)  # noqa: E731
            self._sinks.append(Guarded("TensorBoard", make))

    def write(self, kind: str, step: int, **values: Any) -> None:
        record = {"kind": kind, "step": step, "samples": self._samples_at(step)} | values
        record = {name: finite(value) for name, value in record.items()}
        for sink in self._sinks:
            sink.write(record)

    @property
    def resumed(self) -> set[str]:
        """Kinds of records that there were of the step that the run goes on from. On rank 0."""
        return self._lines.kinds if self._lines is not None else set()

    def sync(self) -> None:
        if self._lines is not None:
            self._lines.sync()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


def memory_gib(device: torch.device) -> float:
    """Most device memory allocated so far; on a CPU what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


class Stopwatch:
    """Seconds from when it was made until it is stopped, and how many of them were spent waiting."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._end: float | None = None
        self.waited_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - since

    def stop(self) -> None:
        self._end = time.perf_counter()

    @property
    def end(self) -> float:
        """On `time.perf_counter`; now, if it is not stopped."""
        return time.perf_counter() if self._end is None else self._end

    def seconds(self) -> float:
        return self.end - self._begin
