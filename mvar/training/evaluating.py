"""Figures of a model in training: all ranks draw pictures and look at them, rank 0 compares them with real ones.

Legend: N pictures, B of a part, L tokens of a picture, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mvar.errors import ConfigError
from mvar.evaluation.extractors import Extracted, open_extractor
from mvar.evaluation.features import Features
from mvar.evaluation.fidelity import mixed
from mvar.evaluation.figures import all_figures
from mvar.evaluation.moments import Moments
from mvar.evaluation.reference import Reference, read_reference
from mvar.evaluation.run_record import add_evaluation
from mvar.evaluation.told import keys
from mvar.images.arrays import to_uint8
from mvar.run.world import World
from mvar.sampling.options import SamplingOptions
from mvar.tokenizer.files import load_tokenizer
from mvar.training.drawing import draw_share, first_problem
from mvar.training.engine import Engine
from mvar.training.job import TrainingJob

BATCH = 64
"""Pictures of a reference batch in the extractor at once."""
PARTS = 5


class SampleFigures:
    """Distances of `tracking.evaluate_images` pictures, always of the same seeds, to `tracking.evaluate_reference`.

    Building it reads the extractor on all ranks and the reference on rank 0. Raises MvarError where they do not fit.
    """

    def __init__(self, job: TrainingJob, engine: Engine, world: World, require_leisure: Callable[[], None]) -> None:
        self._job, self._engine, self._world, self._require_leisure = job, engine, world, require_leisure
        tracking = job.config.tracking
        assert job.config.data.tokenizer is not None and tracking.evaluate_reference is not None
        self._extractor = world.together(lambda: open_extractor(tracking.evaluate_features, world.device))
        self._tokenizer = load_tokenizer(job.config.data.tokenizer).eval()
        self._reference = world.together(self._read_reference)

    def _read_reference(self) -> Reference | None:
        if not self._world.is_main:
            return None
        tracking = self._job.config.tracking
        path = tracking.evaluate_reference
        assert path is not None
        if not path.is_file():
            raise ConfigError(f"tracking.evaluate_reference {path}: no such file. Make it: mvar reference.")
        reference = read_reference(path, self._extractor, batch=BATCH)
        side = self._tokenizer.image_size
        reference.require_like(self._extractor, (side, side), f"tracking.evaluate_reference {path}")
        return reference

    def measure(self, step: int) -> tuple[dict[str, float], str | None]:
        """Figures by their names (on rank 0), or what some rank's problem was; all ranks together.

        The figures are added to the run's evaluations.
        """
        tracking, classes = self._job.config.tracking, self._job.model.num_classes
        assert classes is not None
        labels_N = np.arange(tracking.evaluate_images) % classes
        found: list[Extracted] = []
        self._tokenizer.to(self._world.device)
        problem = draw_share(
            self._job, self._engine, self._world, labels_N, lambda codes_BL: found.append(self._look(codes_BL)),
            self._require_leisure,
        )  # fmt: skip
        self._tokenizer.cpu()
        if problem is not None:
            return {}, problem
        features_NF = self._gathered([one.features_BF for one in found], len(labels_N))
        probabilities = [one.probabilities_BK for one in found if one.probabilities_BK is not None]
        probabilities_NK = self._gathered(probabilities, len(labels_N)) if probabilities else None
        figures: dict[str, float] = {}
        error = None
        try:
            if self._reference is not None and features_NF is not None:
                figures = self._compare(step, self._reference, features_NF, probabilities_NK)
        except Exception as raised:
            error = raised
        return figures, first_problem(self._world, error)

    def _look(self, codes_BL: Tensor) -> Extracted:
        with torch.no_grad():
            images_BHWC = torch.from_numpy(to_uint8(self._tokenizer.decode(codes_BL)))
        found = self._extractor(images_BHWC, classes=True)
        probabilities = None if found.probabilities_BK is None else found.probabilities_BK.cpu()
        return Extracted(found.features_BF.float().cpu(), probabilities)

    def _gathered(self, parts: list[Tensor], count: int) -> Tensor | None:
        """On rank 0: rows of all ranks in the order of pictures, then mixed so that parts are not classes."""
        by_rank = self._world.gather_to_main(torch.cat(parts))
        return None if by_rank is None else torch.cat(by_rank)[:count][mixed(count)]

    def _compare(
        self, step: int, reference: Reference, features_NF: Tensor, probabilities_NK: Tensor | None
    ) -> dict[str, float]:
        """On rank 0."""
        samples = Features(features_NF, Moments.of(features_NF), None, probabilities_NK, None, "")
        where = f"samples of step {step}"
        reference.require_width(features_NF.shape[1], None, where)
        device = self._world.device
        figures = keys(
            all_figures(samples, reference, device, where, parts=PARTS, floor=False), self._extractor.identity
        )
        drawn = {"cfg": SamplingOptions().cfg, "arithmetic": self._job.config.engine.precision, "while_training": True}
        run = self._job.config.run
        add_evaluation(run, step, len(features_NF), figures, self._extractor.identity, reference, drawn)
        return figures
