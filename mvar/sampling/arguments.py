"""What `mvar sample` can be told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from mvar.errors import ConfigError
from mvar.sampling.options import DEFAULTS, Guidance, SamplingOptions
from mvar.sampling.packing import Kind
from mvar.sampling.painter import CPU_BATCH
from mvar.sampling.pictures import BALANCED, PER_CLASS
from mvar.sampling.planning import LEAST_PART, MANY
from mvar.sampling.precision import PRECISIONS

ROWS, COLUMNS = 20, 8
"""Of a grid."""


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar sample", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what is drawn").add_argument
    add_model(add)
    add("--classes", default="all", help="all, or numbers and names such as 0-9 or 1,5 or cat,=7 (default all)")
    add("--class-names", type=Path, help="file with a class name a line, or code store (default: the run's code store)")
    add("--num", type=int, help="images in all")
    add(
        "--per-class",
        help=f"images of each class: a number, one for each (100,20,20), or {BALANCED}: --num shared out (default "
        f"{BALANCED} with --num, else {PER_CLASS})",
    )
    add("--seed", type=int, default=0, help="other seed, other images (default 0)")

    add = add_sampling_options(parser)
    add(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="arithmetic; auto (default): what the weights were trained in, on GPUs; fp32 on CPUs",
    )
    add("--calibrate", action="store_true", help="draw nothing: print how far each precision is from fp32")

    add = parser.add_argument_group("where to").add_argument
    add("--out", type=Path, help="folder of the job")
    add(
        "--kind",
        choices=get_args(Kind),
        default="folders",
        help="class folders of PNGs (default), tars of PNGs, or npz",
    )
    add("--merge", type=Path, metavar="FILE.npz", help="the task that ends last merges all parts into this")
    add("--grid", type=Path, help="the task that ends last draws a PNG with a class a row")
    add("--grid-classes", type=int, default=ROWS, help=f"rows of the grid, at most (default {ROWS})")
    add("--grid-per-class", type=int, default=COLUMNS, help=f"images of a row, at most (default {COLUMNS})")
    add("--no-images", action="store_true", help="draw the images of the grid alone")
    add("--json", type=Path, help="with --calibrate: write the figures here")

    add = parser.add_argument_group("machine").add_argument
    add("--tasks", type=int, default=1, help="into how many tasks the job is divided (default 1)")
    add("--task", type=int, default=0, help="number of this task, from 0 (default 0)")
    add("--batch", type=int, help="images drawn together (default: what the GPU's memory holds; on a CPU "
        f"{CPU_BATCH} on each core)")  # fmt: skip
    add("--part", type=int, help=f"images of a part (default: a batch, or as many as hold {LEAST_PART} images)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help=f"auto: on GPUs from {MANY} images on")
    add("--graphs", choices=("auto", "off"), default="auto", help="CUDA graphs; auto: on GPUs")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    return parser


def add_model(add: Callable[..., Any], *, tokenizer_required: bool = True) -> None:
    """The options that name a model and its tokenizer; `add`: of the group they go into."""
    add("--weights", type=Path, required=True, help="run folder, checkpoint folder, .safetensors or published .pth")
    add("--step", type=int, help="which checkpoint of a run (default: the newest that verifies)")
    add("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    add("--tokenizer", type=Path, required=tokenizer_required, help="file of the tokenizer that made the codes")


def add_machine(add: Callable[..., Any]) -> None:
    """Arithmetic and device."""
    add(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="arithmetic; auto (default): what the weights were trained in, on GPUs; fp32 on CPUs",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")


def add_sampling_options(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """What `sampling_options` reads; gives the `add_argument` of its group."""
    add = parser.add_argument_group("how (a table is a value for each scale, such as 0,0.5,1)").add_argument
    add("--cfg", default=str(DEFAULTS.cfg), help=f"guidance, 0: off; or a table (default {DEFAULTS.cfg})")
    add(
        "--guidance",
        choices=get_args(Guidance),
        default=DEFAULTS.guidance,
        help="how --cfg goes over the scales: rising from 0, as published (default), or the same at all",
    )
    add("--cfg-scales", metavar="A-B", help="guidance at these scales only, counted from 0")
    add(
        "--top-k",
        default=str(DEFAULTS.top_k),
        help=f"likeliest codes kept; 0: all, 1: greedy (default {DEFAULTS.top_k})",
    )
    add("--top-p", default=str(DEFAULTS.top_p), help=f"probability kept; 0 or 1: all (default {DEFAULTS.top_p})")
    add(
        "--temperature",
        default=str(DEFAULTS.temperature),
        help=f"logits are divided by it (default {DEFAULTS.temperature})",
    )
    add("--smooth", action="store_true", help="feed mixtures of code vectors: smoother, worse figures")
    return add


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for what no model could satisfy, before anything is loaded."""
    if args.no_images and (args.grid is None or args.tasks != 1):
        raise ConfigError("--no-images: needs --grid, and --tasks 1, since images of other tasks are read from --out.")
    if args.out is None and not args.no_images and not args.calibrate:
        raise ConfigError("--out: required, unless --no-images and --grid ask for the grid alone.")
    sizes = (args.tasks, args.grid_classes, args.grid_per_class, args.batch, args.part)
    if any(size is not None and size < 1 for size in sizes):
        raise ConfigError("--batch, --part, --tasks and --grid-...: expected whole numbers from 1.")
    if not 0 <= args.task < args.tasks:
        raise ConfigError(
            f"--task {args.task} --tasks {args.tasks}: expected a task number from 0 to {args.tasks - 1}."
        )
    for flag, path, suffix in (("--grid", args.grid, ".png"), ("--merge", args.merge, ".npz")):
        if path is not None and path.suffix.lower() != suffix:
            raise ConfigError(f"{flag} {path}: must end in {suffix}.")


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """Raises ConfigError."""
    return SamplingOptions(
        cfg=_table("--cfg", args.cfg, float),
        top_k=_table("--top-k", args.top_k, int),
        top_p=_table("--top-p", args.top_p, float),
        smooth=args.smooth,
        temperature=_table("--temperature", args.temperature, float),
        guidance=args.guidance,
        interval=None if args.cfg_scales is None else _interval(args.cfg_scales),
    )


def _table(flag: str, text: str, number: type[int] | type[float]) -> Any:
    try:
        values = tuple(number(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected a number, or one for each scale, separated by commas.") from None
    return values if len(values) > 1 else values[0]


def _interval(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ConfigError(f"--cfg-scales {text}: expected first and last scale, counted from 0, such as 3-9.")
    return int(first), int(last or first)
