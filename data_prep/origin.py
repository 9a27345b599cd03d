"""What a finished store was made of, opened again: its images and its tokenizer, to hold the codes against them.

Legend: N samples, V views, L tokens, S scales, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.calibrate import agreement_by_scale
from data_prep.encoder import BatchEncoder
from data_prep.job import TokenizeConfig, TokenizeJob, open_source, plan_job, quantizer_bytes
from mvar.data.store import CodeStore, Split
from mvar.errors import StoreError
from mvar.images.sources import Item, Source
from mvar.images.views import Pixels
from mvar.run.tasks import differences
from mvar.scales import ScalePyramid

LEAST_AGREEMENT = 0.5
"""Of re-encoded codes. Another machine may change some, more so in a fast mode; other pictures change nearly all."""


@dataclass
class Origin:
    """The source and the encoder of a store, checked to be those that it was made with."""

    store: CodeStore
    config: TokenizeConfig
    source: Source
    encoder: BatchEncoder

    @classmethod
    def open(cls, store: CodeStore, config: TokenizeConfig) -> Origin:
        """Raises StoreError that names what differs from the job that made the store."""
        encoder = BatchEncoder.load(config)
        source = open_source(config)
        job = plan_job(config, source, encoder.vqvae, quantizer_bytes(encoder.vqvae))
        if job.sha256 != store.manifest.job_sha256:
            made_by = TokenizeJob.read(store.folder)
            differing = differences(
                made_by.model_dump(mode="json"), job.model_dump(mode="json"), "the store", "this command"
            )
            raise StoreError(
                f"code store {store.folder} was not made by this configuration. Differing: {'; '.join(differing)}. "
                "Give the source, tokenizer and keys that it was tokenized with."
            )
        return cls(store, config, source, encoder)

    def views(self, split: Split, indices_N: NDArray[np.int64]) -> Pixels:
        """All views of some samples, as they were encoded: uint8 (N, V, H, W, 3). Raises ImageError, StoreError."""
        items = {item.key: item for item in self.source.splits[split.name]}
        size = self.encoder.vqvae.image_size
        plan = self.config.train_plan(size) if split.name == "train" else self.config.val_plan(size)

        def render(item: Item) -> Pixels:
            return plan.render(self.source.reader(item.path), self.config.seed, item.key)

        return np.stack([render(items[split.key(int(index))]) for index in indices_N])

    def agreement(self, split: Split, indices_N: NDArray[np.int64]) -> tuple[float, ...]:
        """Share of each scale's codes that encoding some samples again gives again. Raises StoreError below a half."""
        views_NVHWC = self.views(split, indices_N)
        again_BL = self.encoder(views_NVHWC.reshape(-1, *views_NVHWC.shape[2:]))
        samples_B, views_B = np.repeat(indices_N, split.views), np.tile(np.arange(split.views), len(indices_N))
        stored_BL = split.codes(samples_B, views_B)
        if (stored_BL == again_BL).mean() < LEAST_AGREEMENT:
            raise StoreError(
                f"code store {self.store.folder}, split {split.name!r}: encoding {len(indices_N)} images again gives "
                f"{(stored_BL == again_BL).mean():.0%} of the stored codes. These are not the codes of these images: "
                "tokenize again into another store=..."
            )
        return agreement_by_scale(stored_BL, again_BL, ScalePyramid(self.store.manifest.patch_nums))
