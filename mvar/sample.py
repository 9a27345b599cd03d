"""`mvar sample`: draw images from a trained model into OUT/<class>/<number>.png.

Each image is complete or absent, and is a function of the weights, the settings, --seed, its class and its number: kill
this command at any moment and run it again, or divide it into tasks, and the folder is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvar.cli import run_command
from mvar.config import Precision
from mvar.durations import duration
from mvar.errors import BackendError, CheckpointError, ConfigError, ImageError
from mvar.files.disk import remove_stale, write_text
from mvar.images.arrays import Bytes, grid, save_png, to_uint8
from mvar.log import log
from mvar.model.kernels import fused
from mvar.model.kernels.arithmetic import Arithmetic
from mvar.model.transformer import MVAR
from mvar.sampling.classes import class_names, parse_classes
from mvar.sampling.graph import GraphedDrawing
from mvar.sampling.sampler import DEFAULTS, SamplingOptions, check_geometry
from mvar.tokenizer.files import load_tokenizer
from mvar.tokenizer.vqvae import VQVAE

RECORD = "sample.json"
"""What a folder of samples was drawn with. Images drawn otherwise are not mixed in."""
CLASSES = "classes"
"""Its key for the names of the classes."""
PROGRESS_EVERY_S = 10.0
MANY = 2000
"""Images from which compiling, a minute or two, pays."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Everything that decides what an image looks like, besides its class and number."""

    weights: str
    """Digest of the weights, as `fingerprint` makes it."""
    tokenizer: str
    options: SamplingOptions
    seed: int
    precision: str

    def record(self) -> dict[str, Any]:
        """As it stands in sample.json."""
        tree = dataclasses.asdict(self)
        options: dict[str, Any] = tree.pop("options")
        return tree | options


@dataclass(frozen=True)
class Picture:
    """One image to draw."""

    label: int
    number: int

    def path(self, out: Path) -> Path:
        return out / str(self.label) / f"{self.number:05d}.png"

    def seed(self, base: int) -> int:
        """An image's own seed: 63 bits of a hash of the run's seed, its class and its number."""
        digest = hashlib.sha256(f"{base}:{self.label}:{self.number}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


class Painter:
    """A model, its tokenizer and the settings: pictures in, pixels out. `graphed`: through one CUDA graph."""

    def __init__(self, model: MVAR, tokenizer: VQVAE, settings: Settings, batch: int, *, graphed: bool = False) -> None:
        self.tokenizer, self.settings, self.batch = tokenizer, settings, batch
        self._device = model.pos_start.device
        self._draw = GraphedDrawing(
            model,
            tokenizer,
            batch,
            self._decode,
            settings.options,
            graphed=graphed,
        )

    def draw(self, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Bytes]]:
        """Yields uint8 (H, W, 3) in order. Every batch is full, the last one too, so that rounding is alike in all."""
        for start in range(0, len(pictures), self.batch):
            wanted = pictures[start : start + self.batch]
            filled = [*wanted, *[wanted[-1]] * (self.batch - len(wanted))]
            labels_B = torch.tensor([picture.label for picture in filled])
            images_BCHW = self._draw(labels_B, [picture.seed(self.settings.seed) for picture in filled])
            yield from zip(wanted, to_uint8(images_BCHW), strict=False)

    def _decode(self, f_hat_BChw: Tensor) -> Tensor:
        dtype = DTYPES[self.settings.precision]
        # No memory of casts: a graph would keep those of its capture.
        with torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            return self.tokenizer.decode_latent(f_hat_BChw)


def fingerprint(state: dict[str, Tensor]) -> str:
    """Tells weights apart: a digest over every name and the first values of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises ConfigError or BackendError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: unknown. Use auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu or auto.")
    return device


def pick_precision(name: str, device: torch.device) -> Precision:
    """The arithmetic of that name; "auto" is bf16 where the device has it."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return cast(Precision, name)


def claim(out: Path, settings: Settings, names: Sequence[str] | None) -> None:
    """Note the settings in the folder, or compare with what is noted. Raises ConfigError where they differ.

    `names` of the classes are noted too, for who reads the folder.
    """
    path = out / RECORD
    ours = settings.record()
    told = ours if names is None else ours | {CLASSES: list(names)}
    try:
        theirs = json.loads(path.read_text())
    except FileNotFoundError:
        write_text(path, json.dumps(told, indent=1) + "\n")
        return
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--out {path}: cannot be read ({error}). Remove the file, or choose another folder."
        ) from None
    differing = [key for key in ours if not isinstance(theirs, dict) or theirs.get(key) != ours[key]]
    if differing:
        raise ConfigError(
            f"--out {out}: holds images drawn with other {', '.join(differing)}. Choose another folder, or remove it."
        )


def is_written(path: Path) -> bool:
    """Whether a picture is there. A crash of the machine can leave an empty file of its name."""
    return path.is_file() and path.stat().st_size > 0


def draw_all(painter: Painter, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Bytes]]:
    """`Painter.draw` with a line of progress now and then."""
    began_s = said_s = time.monotonic()
    for done, drawn in enumerate(painter.draw(pictures), start=1):
        yield drawn
        now_s = time.monotonic()
        if now_s - said_s > PROGRESS_EVERY_S or done == len(pictures):
            rate = done / (now_s - began_s)
            left_s = (len(pictures) - done) / rate
            log.info("sample: %d/%d images   %.3g images/s   %s left", done, len(pictures), rate, duration(left_s))
            said_s = now_s


def write_grid(
    path: Path, pictures: Sequence[Picture], drawn: dict[Picture, Bytes], out: Path | None, columns: int
) -> None:
    """One row for each class. Images that were not drawn just now are read back; without all of them, no grid."""
    sheet = []
    for picture in pictures:
        if picture in drawn:
            sheet.append(drawn[picture])
            continue
        assert out is not None
        file = picture.path(out)
        if not is_written(file):
            log.info("grid %s: left to the task that ends last; %s does not exist yet", path, file)
            return
        try:
            with Image.open(file) as image:
                sheet.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError) as error:
            raise ImageError(f"image {file}: cannot be read ({error}). Remove it and run again.") from None
    save_png(path, grid(sheet, columns))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", type=Path, required=True, help="run folder, checkpoint folder, .safetensors or published .pth"
    )
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest that verifies)")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="file of the tokenizer that made the codes")
    parser.add_argument(
        "--classes", default="all", help="all, or numbers and names such as 0-9 or 1,5 or cat,=7 (default all)"
    )
    parser.add_argument(
        "--class-names", type=Path, help="file with a class name a line, or code store (default: the run's code store)"
    )
    parser.add_argument("--per-class", type=int, default=8, help="images of each class (default 8)")
    for flag, default, meaning in (
        ("--cfg", DEFAULTS.cfg, "guidance at the finest scale, 0: off"),
        ("--top-k", DEFAULTS.top_k, "likeliest codes kept; 0: all, 1: greedy"),
        ("--top-p", DEFAULTS.top_p, "probability kept; 0 or 1: all"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--smooth", action="store_true", help="feed mixtures of code vectors: smoother, worse figures")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other images (default 0)")
    parser.add_argument("--batch", type=int, default=16, help="images drawn together (default 16)")
    parser.add_argument(
        "--precision",
        choices=("auto", *DTYPES),
        default="auto",
        help="arithmetic; auto (default): bf16 on GPUs that have it, fp32 elsewhere",
    )
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help=f"auto: on GPUs from {MANY} images on"
    )
    parser.add_argument("--graphs", choices=("auto", "off"), default="auto", help="CUDA graphs; auto: on GPUs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    parser.add_argument("--out", type=Path, help="folder for OUT/<class>/<number>.png")
    parser.add_argument("--grid", type=Path, help="write all images into one PNG, a class a row")
    parser.add_argument("--no-images", action="store_true", help="write the grid alone")
    parser.add_argument("--tasks", type=int, default=1, help="into how many tasks the job is divided (default 1)")
    parser.add_argument("--task", type=int, default=0, help="number of this task, from 0 (default 0)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for what no model could satisfy, before anything is loaded."""
    if args.no_images and (args.grid is None or args.tasks != 1):
        raise ConfigError("--no-images: needs --grid, and --tasks 1, since images of other tasks are read from --out.")
    if not args.no_images and args.out is None:
        raise ConfigError("--out: required, unless --no-images and --grid ask for the grid alone.")
    if min(args.per_class, args.batch, args.tasks) < 1:
        raise ConfigError("--per-class, --batch and --tasks: expected whole numbers from 1.")
    if not 0 <= args.task < args.tasks:
        raise ConfigError(
            f"--task {args.task} --tasks {args.tasks}: expected a task number from 0 to {args.tasks - 1}."
        )
    if args.grid is not None and args.grid.suffix.lower() != ".png":
        raise ConfigError(f"--grid {args.grid}: must end in .png.")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    check_arguments(args)
    options = SamplingOptions(cfg=args.cfg, top_k=args.top_k, top_p=args.top_p, smooth=args.smooth)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.tokenizer)

    from mvar.checkpoint.partition import EMA, WEIGHT
    from mvar.checkpoint.weights import load_weights

    config, state = load_weights(args.weights, step=args.step, kind=EMA if args.ema else WEIGHT)
    if config.num_classes is None:
        raise ConfigError(f"--weights {args.weights}: its configuration has no number of classes.")
    with torch.device("meta"):
        model = MVAR.from_config(config, num_classes=config.num_classes)
    check_geometry(model, tokenizer.quantizer)
    names = class_names(args.weights, args.class_names, config.num_classes)
    classes = parse_classes(args.classes, config.num_classes, names)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"--weights {args.weights}: not the weights of the model it describes. {error}") from None
    precision = pick_precision(args.precision, device)
    arithmetic = Arithmetic.of(precision, "auto", device)
    arithmetic.apply()
    settings = Settings(
        weights=fingerprint(state),
        tokenizer=fingerprint(tokenizer.state_dict()),
        options=options,
        seed=args.seed,
        precision=precision,
    )
    model.store_matmuls_(DTYPES[precision]).to(device).eval()
    tokenizer.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    if names is not None:
        shown = ", ".join(f"{label} {names[label]}" for label in classes[:10])
        log.info("sample: classes %s%s", shown, ", ..." * (len(classes) > 10))
    pictures = [Picture(label, number) for label in classes for number in range(args.per_class)]
    mine = pictures[args.task :: args.tasks]
    few = args.compile == "auto" and (device.type == "cpu" or len(mine) < MANY)
    fused.switch(fused.choose("off" if few else args.compile, device, model.depth, model.width).way == "on")
    batch, graphed = max(1, min(args.batch, len(mine))), device.type == "cuda" and args.graphs == "auto"
    painter = Painter(model, tokenizer, settings, batch, graphed=graphed)
    drawn: dict[Picture, Bytes] = {}
    if args.no_images:
        drawn = dict(draw_all(painter, mine))
    else:
        claim(args.out, settings, names)
        for folder in {picture.path(args.out).parent for picture in mine}:
            remove_stale(folder)
        waiting = [picture for picture in mine if not is_written(picture.path(args.out))]
        log.info("sample: %d images are this task's, %d of them exist", len(mine), len(mine) - len(waiting))
        for picture, pixels in draw_all(painter, waiting):
            save_png(picture.path(args.out), pixels, sync=False)
    if args.grid is not None:
        write_grid(args.grid, pictures, drawn, None if args.no_images else args.out, args.per_class)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
