"""What a fast mode of the encoder costs: codes in common with float32, and how pictures look after both.

Residual quantization amplifies small errors: bfloat16 changes a quarter of the codes, most of them on the last scales.

Legend: B images, L tokens, S scales.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.encoder import BatchEncoder, deterministic
from data_prep.job import TokenizeConfig
from mvar.errors import ConfigError, ImageError
from mvar.files.disk import write_file
from mvar.images.arrays import from_uint8
from mvar.images.pixels import DamagedImageError
from mvar.images.sources import Source
from mvar.images.views import Pixels
from mvar.randomness import permuted
from mvar.scales import ScalePyramid
from mvar.tokenizer.quality import psnr_db

CALIBRATION = "calibration.json"


class Calibration(pydantic.BaseModel):
    """Shares of equal codes, over all tokens and for each scale; PSNR of decoded codes against the pictures."""

    model_config = pydantic.ConfigDict(frozen=True)

    job_sha256: str
    images: int
    agreement: float
    agreement_S: tuple[float, ...]
    psnr_fp32_db: float
    psnr_fast_db: float

    def write(self, folder: Path) -> None:
        write_file(folder / CALIBRATION, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path, job_sha256: str) -> Calibration | None:
        """The calibration of this job, if one of its tasks has written it."""
        try:
            found = cls.model_validate(json.loads((folder / CALIBRATION).read_bytes()))
        except (OSError, ValueError):
            return None
        return found if found.job_sha256 == job_sha256 else None

    def table(self) -> str:
        out = io.StringIO()
        print(f"codes in common with fp32, {self.images} images: {self.agreement:.2%}; by scale:", file=out)
        print("  " + "  ".join(f"{share:.1%}" for share in self.agreement_S), file=out)
        print(f"reconstructions: fp32 {self.psnr_fp32_db:.2f} dB, fast {self.psnr_fast_db:.2f} dB", end="", file=out)
        return out.getvalue()


def calibrate(encoder: BatchEncoder, images_BHWC: Pixels, job_sha256: str = "") -> Calibration:
    """Encode some views in fp32 and in the encoder's own mode, decode both in fp32, compare."""
    fast_BL, exact_BL = encoder(images_BHWC), encoder.exact()(images_BHWC)
    pyramid = ScalePyramid(encoder.vqvae.patch_nums)
    return Calibration(
        job_sha256=job_sha256,
        images=len(images_BHWC),
        agreement=float((fast_BL == exact_BL).mean()),
        agreement_S=agreement_by_scale(fast_BL, exact_BL, pyramid),
        psnr_fp32_db=_psnr_db(encoder, exact_BL, images_BHWC),
        psnr_fast_db=_psnr_db(encoder, fast_BL, images_BHWC),
    )


def agreement_by_scale(
    left_BL: NDArray[np.uint16], right_BL: NDArray[np.uint16], pyramid: ScalePyramid
) -> tuple[float, ...]:
    """Share of equal codes on each scale."""
    segments = [pyramid.segment(scale) for scale in range(pyramid.num_scales)]
    return tuple(float((left_BL[:, own] == right_BL[:, own]).mean()) for own in segments)


def require_accepted(config: TokenizeConfig, calibration: Calibration) -> None:
    """Raises ConfigError unless the configuration accepts what the fast mode costs."""
    mode = f"{config.precision} compiled" if config.compile else config.precision
    if config.accept_agreement is None:
        raise ConfigError(
            f"{mode}: a fast mode has to be accepted.\n{calibration.table()}\n"
            f"Set accept_agreement={np.floor(calibration.agreement * 100) / 100:.2f} (or lower) if that is good "
            "enough, or precision=fp32 compile=false."
        )
    if calibration.agreement < config.accept_agreement:
        raise ConfigError(
            f"{mode}: not good enough for accept_agreement={config.accept_agreement}.\n{calibration.table()}\n"
            "Use precision=fp32 compile=false, or accept less."
        )


def calibration_views(config: TokenizeConfig, source: Source, size: int) -> Pixels:
    """View 0 of some training images, picked by the seed; damaged ones are passed over. Raises ImageError."""
    items, plan = source.splits["train"], config.train_plan(size)

    def views() -> Iterator[Pixels]:
        for place in permuted(config.seed, 1, np.arange(len(items)), len(items)):
            try:
                image = source.reader(items[place].path)
            except DamagedImageError:
                continue
            yield plan.render(image, config.seed, items[place].key)[:1]

    found = list(islice(views(), config.calibration_images))
    if not found:
        raise ImageError(f"source {config.source}: no training image can be decoded.")
    return np.concatenate(found)


def _psnr_db(encoder: BatchEncoder, codes_BL: NDArray[np.uint16], images_BHWC: Pixels) -> float:
    @torch.inference_mode()
    def squared_errors_B(own: slice) -> Tensor:
        codes = torch.from_numpy(codes_BL[own].astype(np.int64)).to(encoder.device)
        errors_BCHW = encoder.vqvae.decode(codes).cpu() - from_uint8(images_BHWC[own])
        return errors_BCHW.square().mean(dim=(1, 2, 3))

    with deterministic(tf32=False):
        return psnr_db(float(encoder.in_pieces(squared_errors_B, len(codes_BL)).mean()))
