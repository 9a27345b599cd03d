"""Pictures of a model in training: a grid with a class a row, always from the same seeds.

Legend: N pictures of the grid, B of a part, L tokens of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvar.images.arrays import grid, save_png, to_uint8
from mvar.run.world import World
from mvar.sampling.sampler import generate_codes
from mvar.tokenizer.files import load_tokenizer
from mvar.training.engine import Engine
from mvar.training.job import TrainingJob


class SampleGrid:
    """The grid of `tracking.sample_classes` by `tracking.sample_per_class`; every rank draws its part of the codes.

    `require_leisure` is called between parts; what it raises on all ranks ends the drawing.
    """

    def __init__(self, job: TrainingJob, engine: Engine, world: World, require_leisure: Callable[[], None]) -> None:
        self._job, self._engine, self._world, self._require_leisure = job, engine, world, require_leisure

    def draw(self, path: Path) -> str | None:
        """Write the grid, or say what some rank's problem was; all ranks together, and all alike."""
        codes_NL, problem = self._codes()
        if codes_NL is None:
            return problem
        error = None
        try:
            if self._world.is_main:
                self._decode(codes_NL, path)
        except Exception as raised:
            error = raised
        return self._first_problem(error)

    def _codes(self) -> tuple[Tensor | None, str | None]:
        """Codes of the whole grid, or what some rank's problem was.

        Under ZeRO 3 ranks need each other in every layer, so a rank that fails cannot go on to tell the others: what it
        raises ends the run.
        """
        tracking, classes = self._job.config.tracking, self._job.model.num_classes
        assert classes is not None
        rows = np.linspace(0, classes - 1, min(tracking.sample_classes, classes)).round().astype(np.int64)
        labels = rows.repeat(tracking.sample_per_class)
        share = math.ceil(len(labels) / self._world.size)
        # Equally many for every rank, so that collectives pair up; what is too much is thrown away.
        mine = np.arange(self._world.rank * share, (self._world.rank + 1) * share) % len(labels)
        parts: list[Tensor] = []
        error: Exception | None = None
        with self._engine.drawing() as model:
            for chunk in np.array_split(mine, math.ceil(share / self._job.split.micro_batch)):
                self._require_leisure()
                if error is not None:
                    continue
                try:
                    labels_B = torch.from_numpy(labels[chunk])
                    codes_BL = generate_codes(model, self._engine.objective.quantizer, labels_B, seeds=chunk.tolist())
                    parts.append(codes_BL.cpu())
                except Exception as raised:
                    if self._engine.stage == 3:
                        raise
                    error = raised
        problem = self._first_problem(error)
        if problem is not None:
            return None, problem
        return torch.cat(self._world.gather(torch.cat(parts)))[: len(labels)], None

    def _first_problem(self, error: Exception | None) -> str | None:
        """What went wrong on the first rank on which something did, for all ranks."""
        said = self._world.gather(None if error is None else f"{type(error).__name__}: {error}")
        return next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None), None)

    def _decode(self, codes_NL: Tensor, path: Path) -> None:
        """On one rank."""
        tokenizer_path, device = self._job.config.data.tokenizer, self._world.device
        assert tokenizer_path is not None
        tokenizer = load_tokenizer(tokenizer_path).eval().to(device)
        with torch.no_grad():
            decoded = [to_uint8(tokenizer.decode(codes.to(device))) for codes in torch.split(codes_NL, 16)]
        save_png(path, grid(np.concatenate(decoded), columns=self._job.config.tracking.sample_per_class))
