"""`mvar train-tokenizer`: train a multi-scale VQ-VAE on a folder of images.

In the `out` folder: tokenizer.safetensors (when finished), state.safetensors (to resume from), metrics.jsonl,
config.yaml, reconstructions.png (held-out originals above what the tokenizer makes of them).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.sources import ImageFolder
from mvar.cli import run_command
from mvar.config import describe, dump, load
from mvar.errors import BackendError, CheckpointError
from mvar.images import enlarge, grid, save_png, to_uint8
from mvar.tokenizer.files import save_tokenizer, write_atomically
from mvar.tokenizer.losses import LossTerm, absolute_error, codebook_error, commitment_error, squared_error
from mvar.tokenizer.pictures import Pictures, Pixels, centre_views
from mvar.tokenizer.settings import LossConfig, TokenizerTrainConfig
from mvar.tokenizer.trainer import Quality, Trainer

GRID_COLUMNS = 8


def loss_terms(config: LossConfig) -> list[LossTerm]:
    """The terms of the loss, in the order they are reported. A perceptual or adversarial term would join this list."""
    terms = [
        LossTerm("l1", config.l1, absolute_error),
        LossTerm("l2", config.l2, squared_error),
        LossTerm("codebook", config.codebook, codebook_error),
        LossTerm("commitment", config.commitment, commitment_error),
    ]
    return [term for term in terms if term.weight]


def train(config: TokenizerTrainConfig) -> Path:
    """Train, or go on with a training, to the end. Returns the tokenizer's file. Raises MvarError."""
    source = ImageFolder(config.images, val_fraction=config.val_fraction)
    device = _device(config)
    cores = config.threads or len(os.sched_getaffinity(0))
    if device.type == "cpu":
        torch.set_num_threads(1)  # The trainer splits batches over threads of its own.
    size = config.geometry.image_size
    held_out = source.splits["val"] or source.splits["train"]
    chosen = np.linspace(0, len(held_out) - 1, min(config.validate_images, len(held_out))).round().astype(int)
    held_out_pixels = centre_views(source, [held_out[i] for i in chosen], size, config.resize, cores)
    pictures = Pictures(source, size, config.resize, config.batch, config.seed, ram_gib=config.ram_gib, workers=cores)
    identity = config.identity() | {"images": source.fingerprint.sha256}

    result, state = config.out / "tokenizer.safetensors", config.out / "state.safetensors"
    trainer = Trainer(config, loss_terms(config.loss), device, cores)
    if state.exists():
        trainer.restore(state, identity)
        if trainer.step_number == config.steps and result.exists():
            print(f"already finished: {result}")
            return result
        print(f"resuming after step {trainer.step_number}")
    elif result.exists():
        raise CheckpointError(
            f"{result} exists, but not the state of its training. Give another out=... folder, or remove the file."
        )
    log = MetricsLog(config.out / "metrics.jsonl", trainer.step_number, config.steps)
    write_atomically(config.out / "config.yaml", dump(config).encode())
    _announce(config, source, len(chosen), trainer, pictures.steps_per_epoch)
    status = StatusLine(trainer.step_number, config.steps, config.batch)
    for pixels in pictures.batches(trainer.step_number, config.steps):
        measured = trainer.step(pixels)
        step = trainer.step_number
        status.add(measured)
        if step % config.log_every == 0 or step == config.steps:
            log.write({"kind": "train", "step": step, **measured})
            status.show(step)
        if config.validate_every and step % config.validate_every == 0 and step < config.steps:
            _report(trainer.quality(held_out_pixels), step, log)
        if step % config.save_every == 0 or step == config.steps:
            trainer.save(state, identity)
    _report(trainer.quality(held_out_pixels), trainer.step_number, log)
    draw_reconstructions(trainer, held_out_pixels, config.grid_images, config.out / "reconstructions.png")
    save_tokenizer(result, trainer.result)
    print(f"wrote {result}", flush=True)
    return result


def _announce(
    config: TokenizerTrainConfig, source: ImageFolder, measured: int, trainer: Trainer, steps_per_epoch: float
) -> None:
    where = "held out" if source.splits["val"] else "of them measured (none are held out)"
    tokens, words = trainer.vqvae.quantizer.pyramid.total, config.geometry.vocab_size
    parameters_millions = sum(parameter.numel() for parameter in trainer.parameters.values()) / 1e6
    print(
        f"{len(source.splits['train'])} images of {len(source.classes)} classes, {measured} {where}; "
        f"{config.geometry.image_size} px -> {tokens} tokens of {words} words; {parameters_millions:.2f}M parameters; "
        f"{config.steps} steps of {config.batch} ({config.steps / steps_per_epoch:.1f} epochs)",
        flush=True,
    )


def draw_reconstructions(trainer: Trainer, pixels_NHWC: Pixels, count: int, path: Path) -> None:
    """A PNG with rows of originals, each above the row of what the tokenizer makes of them."""
    chosen = np.unique(np.linspace(0, len(pixels_NHWC) - 1, min(count, len(pixels_NHWC))).round().astype(int))
    chosen = chosen[: max(1, len(chosen) // GRID_COLUMNS) * GRID_COLUMNS]
    originals = pixels_NHWC[chosen]
    rebuilt = to_uint8(trainer.rebuild(originals)[0])
    columns = min(GRID_COLUMNS, len(chosen))
    rows = [
        picture
        for start in range(0, len(chosen), columns)
        for pictures in (originals, rebuilt)
        for picture in pictures[start : start + columns]
    ]
    sheet = grid(rows, columns)
    save_png(path, enlarge(sheet, 2) if originals.shape[1] <= 64 else sheet)


class MetricsLog:
    """metrics.jsonl: one record a line. Records of what a resumed training will do again are dropped."""

    def __init__(self, path: Path, resumed_step: int, steps: int) -> None:
        self.path = path
        kept = []
        for line in _whole_lines(path) if resumed_step else []:
            record = json.loads(line)
            # The last validation comes after the last saved state.
            if record["step"] <= resumed_step and (record["kind"], record["step"]) != ("val", steps):
                kept.append(line)
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class StatusLine:
    """One line for the terminal: where the training is, how good, how fast, how long it will take."""

    def __init__(self, first_step: int, steps: int, batch: int) -> None:
        self.first, self.steps, self.batch = first_step, steps, batch
        self.begin = time.monotonic()
        self.revived = 0
        self.last: dict[str, float] = {}

    def add(self, measured: dict[str, float]) -> None:
        self.last = measured
        self.revived += int(measured["revived"])

    def show(self, step: int) -> None:
        seconds_a_step = (time.monotonic() - self.begin) / max(1, step - self.first)
        print(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {self.last['loss']:.4f}"
            f"  psnr {self.last['psnr_db']:5.2f} dB  grad {self.last['grad_norm']:6.3f}  lr {self.last['lr']:.1e}"
            f"  revived {self.revived:4}  {self.batch / seconds_a_step:6.1f} imgs/s"
            f"  ETA {seconds_a_step * (self.steps - step):.0f} s",
            flush=True,
        )
        self.revived = 0


def _report(quality: Quality, step: int, log: MetricsLog) -> None:
    log.write({"kind": "val", "step": step, **asdict(quality)})
    print(
        f"step {step}: held-out psnr {quality.psnr_db:.2f} dB, l1 {quality.l1:.4f}, words used"
        f" {quality.used_share:.0%}; by scale {[int(n) for n in quality.used_S]}, perplexity"
        f" {[round(p, 1) for p in quality.perplexity_S]}",
        flush=True,
    )


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file that a killed process may have left with half a line at its end."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return lines


def _device(config: TokenizerTrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("device: got cuda, but torch sees no GPU here. Set device=cpu, or device=auto.")
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar train-tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys (set in the file, or as key=value):\n" + describe(TokenizerTrainConfig),
    )
    parser.add_argument("--config", type=Path, help="YAML file, such as recipes/tokenizer_32.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that win over the file")
    args = parser.parse_args(argv)
    train(load(TokenizerTrainConfig, args.config, args.settings))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
