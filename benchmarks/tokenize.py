"""Tokenizing against a straightforward loop: decode a batch, encode it, quantize it, one after the other, fp32, NCHW.

fp32_vs_loop         images/s of `mvar tokenize` (all of it, shards written) / images/s of the loop
bf16_vs_loop         the same with the encoder's convolutions in bfloat16
encoder_busy         share of the time in which the encoder did not wait for images, fp32
encoder_busy_bf16    the same, bfloat16
code_agreement_bf16  share of codes that bfloat16 has in common with fp32

The loop is what one writes first, with the same tokenizer module, all cores on each operation. It runs in a process of
its own, so that nothing of how `mvar tokenize` sets up its process (memory, threads) reaches it. They take turns.

The tokenizer has the published geometry and random weights (seeded); its codebook holds outputs of its own encoder.
The images are made up: JPEGs of 500 x 375 pixels. Smaller runs: --images, --batch, --channels, --rounds.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import DTYPES, Report, parser, precisions, seconds_of, spread
from data_prep.calibrate import Calibration
from data_prep.job import TokenizeConfig, TokenizeJob
from data_prep.tokenize import tokenize
from mvar.images.arrays import from_uint8
from mvar.images.sources import ImageFolder
from mvar.images.views import ViewPlan
from mvar.settings import load
from mvar.tokenizer.files import load_tokenizer, save_tokenizer
from mvar.tokenizer.vqvae import VQVAE

VOCAB = 4096
GOALS = {"fp32": ">= 1.3", "bf16": ">= 5"}
BUSY = {"fp32": "encoder_busy", "bf16": "encoder_busy_bf16"}


def make_images(folder: Path, count: int) -> ImageFolder:
    """Soft shapes with some noise, in two class folders."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += rng.integers(-12, 13, pixels.shape, dtype=np.int16)
        path = folder / f"class{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return ImageFolder(folder)


def make_tokenizer(path: Path, channels: int, images: ImageFolder) -> None:
    """Published geometry at `channels` (160), random weights; words are the encoder's outputs at several sizes."""
    torch.manual_seed(0)
    vqvae = VQVAE(channels=channels, vocab_size=VOCAB).eval()
    plan = ViewPlan(vqvae.image_size)
    with torch.inference_mode():
        views = [plan.render(images.read_rgb(item.path), 0, item.key) for item in images.items[:2]]
        features_BChw = vqvae.features(from_uint8(np.concatenate(views)))
    rows = features_BChw.permute(0, 2, 3, 1).reshape(-1, vqvae.latent_channels)
    words = rows[torch.randint(len(rows), (VOCAB,))] * torch.logspace(-1.5, 0.5, VOCAB)[:, None]
    vqvae.quantizer.embedding.weight.data.copy_(words)
    save_tokenizer(path, vqvae)


def loop_seconds(images: ImageFolder, tokenizer: Path, count: int, batch: int, threads: int | None) -> float:
    """The straightforward loop over `count` images."""
    if threads is not None:
        torch.set_num_threads(threads)
    vqvae = load_tokenizer(tokenizer)
    plan = ViewPlan(vqvae.image_size)

    def run() -> None:
        for begin in range(0, count, batch):
            items = images.items[begin : begin + batch]
            views = [plan.render(images.read_rgb(item.path), 0, item.key) for item in items]
            with torch.inference_mode():
                vqvae.encode(from_uint8(np.concatenate(views)).contiguous())

    return seconds_of(run)


def measure(count: int, batch: int, channels: int, rounds: int, threads: int | None, wanted: Sequence[str]) -> Report:
    report = Report("tokenize")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(1, mp_context=spawn) as elsewhere:
        root = Path(scratch)
        images = make_images(root / "images", count)
        tokenizer = root / "tokenizer.safetensors"
        make_tokenizer(tokenizer, channels, images)
        busy: dict[str, list[float]] = {"fp32": [], "bf16": []}

        def loop() -> float:
            return count / elsewhere.submit(loop_seconds, images, tokenizer, count, batch, threads).result()

        def ours(precision: str, number: int) -> float:
            store = root / f"{precision}-{number}"
            keys = [f"source={images.root}", f"tokenizer={tokenizer}", f"store={store}"]
            keys += [f"precision={precision}", "accept_agreement=0", f"calibration_images={min(count, 16)}"]
            keys += [] if threads is None else [f"threads={threads}"]
            config = load(TokenizeConfig, None, [*keys, f"batch={batch}", "device=cpu"])
            with contextlib.redirect_stdout(io.StringIO()):
                outcome = tokenize(config)
            busy[precision].append(outcome.busy_share)
            return outcome.images / outcome.seconds

        rates: dict[str, list[float]] = {name: [] for name in ("loop", *wanted)}
        for number in range(rounds + 1):  # They take turns; the first round warms up.
            for name, own in rates.items():
                own.append(loop() if name == "loop" else ours(name, number))
        rates = {name: own[1:] for name, own in rates.items()}
        if "bf16" in wanted:
            calibration = Calibration.read(root / "bf16-0", TokenizeJob.read(root / "bf16-0").sha256)
            assert calibration is not None, "tokenize has just written it"
            report.add("code_agreement_bf16", calibration.agreement)
    report.context["size"] = {"images": count, "batch": batch, "channels": channels}
    for name in wanted:
        ratios = [mine / other for mine, other in zip(rates[name], rates["loop"], strict=True)]
        report.add(f"{name}_vs_loop", statistics.median(ratios), GOALS[name], spread(ratios))
        report.add(BUSY[name], statistics.median(busy[name][1:]), ">= 0.95", spread(busy[name][1:]))
    for name, own in rates.items():
        report.add(f"{name}_imgs_per_s", statistics.median(own), None, spread(own))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=24, help="images tokenized in a round")
    arguments.add_argument("--batch", type=int, default=4, help="images encoded at once, by all alike")
    arguments.add_argument("--channels", type=int, default=160, help="width of the tokenizer; 160: as published")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds that are counted")
    arguments.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    arguments.add_argument("--precision", choices=[*DTYPES, "both"], default="both", help="of ours; the loop is fp32")
    args = arguments.parse_args(argv)
    chosen = precisions(args.precision)
    measure(args.images, args.batch, args.channels, args.rounds, args.threads, chosen).finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
