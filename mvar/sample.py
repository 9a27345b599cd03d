"""`mvar sample`: draw images from a trained model, as one task of an array job or the whole job.

The images of a job are cut into parts; part i belongs to task i mod tasks. A part is complete or absent, and its bytes
are a function of the job and its number: kill this command at any moment and run it again, or divide it into any number
of tasks, and the folder is the same. `mvar merge-samples` makes one .npz of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from mvar.checkpoint.fingerprint import fingerprint
from mvar.cli import run_command
from mvar.files.disk import write_text
from mvar.log import log
from mvar.sampling.arguments import arguments, check_arguments, sampling_options
from mvar.sampling.calibrate import calibrate, table
from mvar.sampling.classes import class_names, parse_classes
from mvar.sampling.drawing import draw_few, draw_share, made_by
from mvar.sampling.gallery import read_images, shown, write_gallery
from mvar.sampling.job import SampleJob, note_tasks
from mvar.sampling.loading import ModelPair, pick_device
from mvar.sampling.merge import merge, unfinished
from mvar.sampling.painter import CPU_BATCH
from mvar.sampling.pictures import counts_of, in_turn
from mvar.sampling.planning import Request
from mvar.sampling.precision import choose

CALIBRATED = 16
"""Images that precisions are compared on."""


def request_of(args: argparse.Namespace) -> Request:
    """What the arguments ask for. Raises MvarError."""
    options = sampling_options(args)
    device = pick_device(args.device)
    source = ModelPair.load(args.weights, args.tokenizer, step=args.step, ema=args.ema)
    options.of_scales(len(source.config.patch_nums))
    names = class_names(args.weights, args.class_names, source.num_classes)
    classes = parse_classes(args.classes, source.num_classes, names)
    if names is not None:
        told = ", ".join(f"{label} {names[label]}" for label in classes[:10])
        log.info("sample: classes %s%s", told, ", ..." * (len(classes) > 10))
    return Request(
        source=source,
        counts=counts_of(classes, args.per_class, args.num),
        options=options,
        seed=args.seed,
        device=device,
        kind=args.kind,
        precision=args.precision,
        compile=args.compile,
        graphs=args.graphs == "auto",
        batch=args.batch,
        part=args.part,
        classes=names,
        made=made_by(device)
        | {"weights": str(source.where), "step": source.step, "ema": args.ema, "tokenizer": str(args.tokenizer)},
    )


def show_distances(args: argparse.Namespace, request: Request) -> None:
    """What --calibrate prints."""
    source, options, device = request.source, request.options, request.device
    pictures = in_turn(request.counts)[: args.num or CALIBRATED]
    distances = calibrate(source, options, pictures, args.seed, device, args.batch or CPU_BATCH)
    print(table(distances, len(pictures), options))
    log.info("auto comes to %s", choose("auto", device, source.trained))
    if args.json is not None:
        figures = {f"{one.precision}_differing": one.differing for one in distances}
        context = {
            "images": len(pictures),
            "weights": fingerprint(source.state),
            "options": dataclasses.asdict(options),
            "seed": args.seed,
            "distances": [dataclasses.asdict(one) for one in distances],
        } | made_by(device)
        payload = {"name": "calibrate", "figures": figures, "goals": {}, "context": context}
        write_text(args.json, json.dumps(payload, indent=1) + "\n")


def draw_grid_alone(args: argparse.Namespace, request: Request) -> None:
    """--no-images: nothing else is written."""
    pictures = shown(request.counts, args.grid_classes, args.grid_per_class)
    batch = min(args.batch or CPU_BATCH, len(pictures))
    painter = request.painter(request.decided_precision(), batch, compiled=request.decided_compile())
    write_gallery(args.grid, draw_few(pictures, painter))


def draw_task(args: argparse.Namespace, request: Request) -> None:
    """The parts of this task; then, by the task that ends last, what is made of all."""
    job = request.settle(args.out)
    note_tasks(args.out, args.tasks)
    draw_share(
        args.out,
        job,
        args.task,
        args.tasks,
        lambda: request.painter(job.precision, job.batch, compiled=job.compiled),
    )
    if args.grid is not None or args.merge is not None:
        end_job(args, job)


def end_job(args: argparse.Namespace, job: SampleJob) -> None:
    if missing := unfinished(args.out, job, thorough=False):
        what = " and ".join(flag for flag in ("--grid", "--merge") if getattr(args, flag[2:]) is not None)
        log.info("%s: left to the task that ends last; %d parts are not drawn yet", what, len(missing))
        return
    if args.grid is not None:
        pictures = shown(job.counts, args.grid_classes, args.grid_per_class)
        write_gallery(args.grid, read_images(args.out, job, pictures))
    if args.merge is not None:
        log.info("%s: sha256 %s", args.merge, merge(args.out, args.merge))


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    check_arguments(args)
    request = request_of(args)
    if args.calibrate:
        show_distances(args, request)
    elif args.no_images:
        draw_grid_alone(args, request)
    else:
        draw_task(args, request)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
