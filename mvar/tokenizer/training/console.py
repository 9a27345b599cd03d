"""What a tokenizer's training shows on the terminal."""

from __future__ import annotations

import time
from typing import Any

from mvar.log import log

Record = dict[str, Any]


class Console:
    """A line for each `train` record: where the training is, how good, how fast, how long it will take.

    Takes the records that metrics.jsonl gets (a sink of mvar.run.tracking).
    """

    def __init__(self, first_step: int, steps: int) -> None:
        self._first, self._steps = first_step, steps
        self._begin = time.monotonic()

    def write(self, record: Record) -> None:
        show = {"train": self._train, "val": _val, "sample": _sample}.get(record["kind"])
        if show is not None:
            log.info(show(record))

    def _train(self, record: Record) -> str:
        step = record["step"]
        left_s = (time.monotonic() - self._begin) / max(1, step - self._first) * (self._steps - step)
        text = (
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {_number(record['loss'])}"
            f"  psnr {record['psnr_db']:5.2f} dB  grad {record['grad_norm']:6.3f}  lr {record['lr']:.1e}"
        )
        if "perceptual" in record:
            text += f"  perceptual {_number(record['perceptual'])}"
        if "critic" in record:
            text += f"  adversarial {_number(record['adversarial'])} x {record['adversarial_weight']:.3g}"
            text += f"  critic {_number(record['critic'])}"
        return text + (
            f"  revived {record['revived']:4}  {record['imgs_per_s']:6.1f} imgs/s  wait {record['wait_share']:4.0%}"
            f"  ETA {left_s:.0f} s"
        )

    def close(self) -> None:
        pass


def _val(record: Record) -> str:
    ssim = "" if record["ssim"] is None else f", ssim {record['ssim']:.3f}"
    return (
        f"step {record['step']}: held-out psnr {record['psnr_db']:.2f} dB{ssim}, l1 {record['l1']:.4f}, words used"
        f" {record['used_share']:.0%}; by scale {record['used_per_scale']}, perplexity"
        f" {_rounded(record['perplexity_per_scale'])}, psnr of the first scales alone"
        f" {_rounded(record['psnr_db_per_scale'])}"
    )


def _sample(record: Record) -> str:
    return f"step {record['step']}: pictures: {record['file']}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 1) for value in values]
