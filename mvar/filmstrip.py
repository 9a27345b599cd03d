"""`mvar filmstrip`: the same seeds over the checkpoints of a run or over the scales of one, as a strip and as a film.

    mvar filmstrip --over checkpoints --weights runs/d16 --tokenizer tokenizer.safetensors --classes 0-9 --out strip
    mvar filmstrip --over scales ...        what the codes of the coarsest scale decode to, of the two coarsest, ...
    mvar filmstrip --over samples --weights runs/d16 --out strip    the grids that the run drew itself: a film alone

--out PATH: PATH.png has a picture a row and a checkpoint or scale a column; PATH.webp, animated, shows one after the
other. A picture's seed is that of `mvar sample`, so the last column is what it draws.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mvar.cli import run_command
from mvar.errors import ConfigError
from mvar.images.arrays import Bytes, enlarge, grid, save_film, save_png
from mvar.log import log
from mvar.run.film import write_film
from mvar.run.folder import RunFolder
from mvar.run.names import steps_in
from mvar.sampling.arguments import add_machine, add_model, add_sampling_options, sampling_options
from mvar.sampling.classes import class_names, parse_classes
from mvar.sampling.drawing import draw_few
from mvar.sampling.loading import ModelPair, pick_device
from mvar.sampling.painter import CPU_BATCH
from mvar.sampling.pictures import counts_of, in_turn
from mvar.sampling.planning import Request

MOST_PICTURES = 64
SEEN_PX = 64
"""Side of a picture, at least about: smaller ones are enlarged."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar filmstrip", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what is shown").add_argument
    add("--over", choices=("checkpoints", "scales", "samples"), required=True, help="what changes from frame to frame")
    add_model(add, tokenizer_required=False)
    add("--steps", help="which checkpoints, such as 1000,5000,20000 (default: all that the run has)")
    add("--classes", default="all", help="as in mvar sample (default all)")
    add("--class-names", type=Path, help="file with a class name a line, or code store (default: the run's code store)")
    add("--per-class", default="1", help="pictures of each class (default 1)")
    add("--seed", type=int, default=0, help="other seed, other pictures (default 0)")
    add("--out", type=Path, required=True, help="PATH of PATH.png and PATH.webp")
    add_machine(add_sampling_options(parser))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot be, before anything is loaded."""
    if args.over != "samples" and args.tokenizer is None:
        raise ConfigError(f"--over {args.over}: needs --tokenizer, the file of the tokenizer that made the codes.")
    if args.steps is not None and (args.over != "checkpoints" or args.step is not None):
        raise ConfigError("--steps: the checkpoints of --over checkpoints. For another, --step says which one it is.")


def chosen_steps(args: argparse.Namespace) -> list[int]:
    """Raises ConfigError."""
    there = steps_in(args.weights / "checkpoints")
    if args.steps is None:
        if not there:
            raise ConfigError(f"--weights {args.weights}: no run folder with checkpoints in it. Give one.")
        return there if args.step is None else [args.step]
    parts = args.steps.split(",")
    if not all(part.isdecimal() and int(part) in there for part in parts):
        raise ConfigError(f"--steps {args.steps}: the run's checkpoints are {', '.join(map(str, there)) or 'none'}.")
    return [int(part) for part in parts]


def drawn(args: argparse.Namespace, step: int | None, *, growing: bool) -> Bytes:
    """The pictures of one checkpoint, uint8 (N, H, W, 3); growing: (N, S, H, W, 3). Raises MvarError."""
    options = sampling_options(args)
    source = ModelPair.load(args.weights, args.tokenizer, step=step, ema=args.ema)
    options.of_scales(len(source.config.patch_nums))
    names = class_names(args.weights, args.class_names, source.num_classes)
    classes = parse_classes(args.classes, source.num_classes, names)
    counts = counts_of(classes, args.per_class, None)
    request = Request(source, counts, options, args.seed, pick_device(args.device), precision=args.precision)
    if request.total > MOST_PICTURES:
        raise ConfigError(
            f"--classes, --per-class: {request.total} pictures, more than the {MOST_PICTURES} of a strip."
        )
    painter = request.painter(
        request.decided_precision(), min(CPU_BATCH, request.total), compiled=False, growing=growing
    )
    pictures = sorted(in_turn(counts))
    found = draw_few(pictures, painter)
    return np.stack([found[picture] for picture in pictures])


def frames_of(args: argparse.Namespace) -> Bytes:
    """uint8 (frames, N, H, W, 3). Raises MvarError."""
    if args.over == "scales":
        return drawn(args, args.step, growing=True).swapaxes(0, 1)
    steps = chosen_steps(args)
    log.info("filmstrip: checkpoints %s", ", ".join(map(str, steps)))
    return np.stack([drawn(args, step, growing=False) for step in steps])


def write(out: Path, frames: Bytes) -> None:
    """Raises WriteError."""
    count, num = frames.shape[:2]
    factor = max(1, SEEN_PX // frames.shape[2])
    strip, film = named(out, ".png"), named(out, ".webp")
    save_png(strip, enlarge(grid(frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:]), count), factor))
    save_film(film, [enlarge(grid(frame, across(num)), factor) for frame in frames])
    log.info("%s, %s: %d pictures, %d frames", strip, film, num, count)


def across(num: int) -> int:
    """Pictures of a row, for a sheet that is about square and has the fewest empty places."""
    least = math.ceil(math.sqrt(num))
    return min(range(least, 2 * least + 1), key=lambda columns: (-num % columns, columns))


def named(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    check_arguments(args)
    if args.over != "samples":
        write(args.out, frames_of(args))
    elif not write_film(RunFolder(args.weights), named(args.out, ".webp")):
        raise ConfigError(
            f"--weights {args.weights}: there are no two grids of a size in its samples/. Train with "
            "tracking.sample_every, or give --over checkpoints."
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
