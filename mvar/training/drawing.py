"""Pictures of a model in training, drawn by all ranks: each takes its share, and a failure of one is known to all.

Legend: N pictures, B of a part, L tokens of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar.images.arrays import grid, save_png, to_uint8
from mvar.run.world import World
from mvar.sampling.sampler import generate_codes
from mvar.tokenizer.files import load_tokenizer
from mvar.training.engine import Engine
from mvar.training.job import TrainingJob


def draw_share(
    job: TrainingJob,
    engine: Engine,
    world: World,
    labels_N: NDArray[np.int64],
    take: Callable[[Tensor], None],
    require_leisure: Callable[[], None],
) -> str | None:
    """Draw this rank's share of pictures of these classes, picture n from seed n; their codes (B, L) go to `take`.

    Every rank draws equally many, so that collectives pair up: the last ones may be pictures that others draw too. All
    ranks' shares in order begin with all N. `require_leisure` is called between parts; what it raises on all ranks ends
    the drawing. Returns what went wrong on the first rank on which something did, for all ranks alike. Under ZeRO 3
    ranks need each other in every layer, so a rank that fails cannot go on to tell the others: what it raises ends the
    run.
    """
    share = math.ceil(len(labels_N) / world.size)
    mine = np.arange(world.rank * share, (world.rank + 1) * share) % len(labels_N)
    error: Exception | None = None
    with engine.drawing() as model:
        for chunk in np.array_split(mine, math.ceil(share / job.split.micro_batch)):
            require_leisure()
            if error is not None:
                continue
            try:
                labels_B = torch.from_numpy(labels_N[chunk])
                take(generate_codes(model, engine.objective.quantizer, labels_B, seeds=chunk.tolist()))
            except Exception as raised:
                if engine.stage == 3:
                    raise
                error = raised
    return first_problem(world, error)


def first_problem(world: World, error: Exception | None) -> str | None:
    """What went wrong on the first rank on which something did, for all ranks."""
    said = world.gather(None if error is None else f"{type(error).__name__}: {error}")
    return next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None), None)


class SampleGrid:
    """The grid of `tracking.sample_classes` by `tracking.sample_per_class`, always from the same seeds."""

    def __init__(self, job: TrainingJob, engine: Engine, world: World, require_leisure: Callable[[], None]) -> None:
        self._job, self._engine, self._world, self._require_leisure = job, engine, world, require_leisure

    def draw(self, path: Path) -> str | None:
        """Write the grid, or say what some rank's problem was; all ranks together, and all alike."""
        tracking, classes = self._job.config.tracking, self._job.model.num_classes
        assert classes is not None
        rows = np.linspace(0, classes - 1, min(tracking.sample_classes, classes)).round().astype(np.int64)
        labels_N = rows.repeat(tracking.sample_per_class)
        parts: list[Tensor] = []
        problem = draw_share(
            self._job, self._engine, self._world, labels_N, lambda codes_BL: parts.append(codes_BL.cpu()),
            self._require_leisure,
        )  # fmt: skip
        if problem is not None:
            return problem
        by_rank = self._world.gather_to_main(torch.cat(parts))
        error = None
        try:
            if by_rank is not None:
                self._write(torch.cat(by_rank)[: len(labels_N)], path)
        except Exception as raised:
            error = raised
        return first_problem(self._world, error)

    def _write(self, codes_NL: Tensor, path: Path) -> None:
        """On one rank."""
        tokenizer_path, device = self._job.config.data.tokenizer, self._world.device
        assert tokenizer_path is not None
        tokenizer = load_tokenizer(tokenizer_path).eval().to(device)
        with torch.no_grad():
            decoded = [to_uint8(tokenizer.decode(codes.to(device))) for codes in torch.split(codes_NL, 16)]
        save_png(path, grid(np.concatenate(decoded), columns=self._job.config.tracking.sample_per_class))
