"""From what a command asks for to the job that is drawn: what it leaves open is decided here, by the first task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mvar.checkpoint.fingerprint import fingerprint
from mvar.config import Switch
from mvar.log import tell
from mvar.machine.allocator import keep_freed_memory
from mvar.model.kernels import fused
from mvar.sampling.job import SampleJob
from mvar.sampling.loading import ModelPair
from mvar.sampling.options import SamplingOptions
from mvar.sampling.packing import Kind
from mvar.sampling.painter import CPU_BATCH, Painter, batch_of_gpu
from mvar.sampling.pictures import Counts
from mvar.sampling.precision import SamplePrecision, arithmetic, choose

MANY = 2000
"""Images from which compiling, a minute or two, pays."""
LEAST_PART = 64
"""Images of a part at least, in whole batches: small ones share out evenly and lose little in a kill."""


@dataclass(frozen=True)
class Request:
    """What is asked for; None and "auto" leave it open."""

    source: ModelPair
    counts: Counts
    options: SamplingOptions
    seed: int
    device: torch.device
    kind: Kind = "folders"
    precision: str = "auto"
    compile: Switch = "auto"
    graphs: bool = True
    batch: int | None = None
    part: int | None = None
    classes: tuple[str, ...] | None = None
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def settle(self, out: Path) -> SampleJob:
        """Make this the job of `out`, or find that it is. What is open is as the folder's job has it, if there is one.

        Raises ConfigError: the folder has another job; BackendError.
        """
        digests = fingerprint(self.source.state), fingerprint(self.source.tokenizer.state_dict())
        self._plan(SampleJob.read(out), *digests).write_first(out)
        job = self._plan(SampleJob.read(out), *digests)  # Another task may have been first.
        job.check(out)
        return job

    def _plan(self, pinned: SampleJob | None, weights: str, tokenizer: str) -> SampleJob:
        precision = self.decided_precision() if pinned is None or self.precision != "auto" else pinned.precision
        compiled = self.decided_compile() if pinned is None or self.compile != "auto" else pinned.compiled
        batch = self.batch or (pinned.batch if pinned is not None else self.fitting_batch(precision))
        batch = min(batch, self.total)
        return SampleJob(
            weights=weights,
            tokenizer=tokenizer,
            options=json.loads(json.dumps(dataclasses.asdict(self.options))),
            seed=self.seed,
            precision=precision,
            device=self.device.type,
            compiled=compiled,
            batch=batch,
            part=self.part or (pinned.part if pinned is not None else -(-LEAST_PART // batch) * batch),
            kind=self.kind,
            size_px=self.source.tokenizer.image_size,
            counts=self.counts,
            classes=self.classes,
            made=dict(self.made),
        )

    def decided_precision(self) -> SamplePrecision:
        """Raises BackendError."""
        chosen = choose(self.precision, self.device, self.source.trained)
        if self.precision == "auto" or chosen.slow:
            tell([chosen])
        return cast(SamplePrecision, chosen.way)

    def decided_compile(self) -> bool:
        """Raises BackendError."""
        few = self.compile == "auto" and (self.device.type == "cpu" or self.total < MANY)
        config = self.source.config
        asked: Switch = "off" if few else self.compile
        return fused.choose(asked, self.device, config.depth, config.resolved_width).way == "on"

    def painter(self, precision: SamplePrecision, batch: int, *, compiled: bool, growing: bool = False) -> Painter:
        """Everything on its device, ready to draw; `growing`: every scale, see Painter."""
        if self.device.type == "cpu":
            keep_freed_memory()
        arithmetic(precision, self.device).apply()
        fused.switch(compiled)
        model = self.source.model(precision, self.device)
        tokenizer = self.source.tokenizer.to(self.device)
        tokenizer = tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        graphed = self.device.type == "cuda" and self.graphs
        return Painter(model, tokenizer, self.options, precision, self.seed, batch, graphed=graphed, growing=growing)

    def fitting_batch(self, precision: SamplePrecision) -> int:
        """Images at once where nothing is asked for."""
        if self.device.type == "cpu":
            return CPU_BATCH
        arithmetic(precision, self.device).apply()
        model, tokenizer = self.source.model(precision, self.device), self.source.tokenizer.to(self.device)
        return batch_of_gpu(
            lambda count: Painter(model, tokenizer, self.options, precision, self.seed, count), self.device
        )
