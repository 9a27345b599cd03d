"""What a tokenizer's training shows on the terminal."""

from __future__ import annotations

import time

from mvar.durations import duration
from mvar.files.json_lines import JsonRecord
from mvar.run.tracking import place


class TokenizerLines:
    """A line for each `train` record: where the training is, how good, how fast, how long it will take."""

    def __init__(self, first_step: int, steps: int) -> None:
        self._first, self._steps = first_step, steps
        self._begin = time.monotonic()

    def __call__(self, record: JsonRecord) -> str | None:
        show = {"train": self._train, "val": _val, "sample": _sample}.get(record["kind"])
        return None if show is None else f"{place(record, self._steps)}  {show(record)}"

    def _train(self, record: JsonRecord) -> str:
        step = record["step"]
        left_s = (time.monotonic() - self._begin) / max(1, step - self._first) * (self._steps - step)
        text = (
            f"loss {_number(record['loss'])}  psnr {record['psnr_db']:5.2f} dB  grad {record['grad_norm']:6.3f}"
            f"  lr {record['lr']:.1e}"
        )
        if "perceptual" in record:
            text += f"  perceptual {_number(record['perceptual'])}"
        if "discriminator_loss" in record:
            text += f"  generator {_number(record['generator_loss'])} x {record['adversarial_weight']:.3g}"
            text += f"  discriminator {_number(record['discriminator_loss'])}"
        return text + (
            f"  revived {record['revived']:4}  {record['imgs_per_s']:6.1f} imgs/s  wait {record['wait_share']:4.0%}"
            f"  eta {duration(left_s)}"
        )


def _val(record: JsonRecord) -> str:
    ssim = "" if record["ssim"] is None else f", ssim {record['ssim']:.3f}"
    return (
        f"held-out psnr {record['psnr_db']:.2f} dB{ssim}, l1 {record['l1']:.4f}, words used"
        f" {record['used_share']:.0%}; by scale {record['used_per_scale']}, perplexity"
        f" {_rounded(record['perplexity_per_scale'])}, psnr of the first scales alone"
        f" {_rounded(record['psnr_db_per_scale'])}"
    )


def _sample(record: JsonRecord) -> str:
    return f"pictures: {record['file']}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 1) for value in values]
