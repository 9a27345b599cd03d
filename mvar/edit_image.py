"""`mvar edit`: redraw a part of a picture, with or without a class; what is around a picture; its finer scales; or the
way from one class to another.

    mvar edit --image in.png --mask mask.png --class 207 ...     what is white in the mask is drawn anew
    mvar edit --image in.png --box 64,64,128,128 ...             so is what lies in the box
    mvar edit --image in.png --place 64,64,128,128 ...           the picture goes there, and all around it is drawn
    mvar edit --image in.png --vary 6 ...                        scales from 6 on are drawn anew: new detail
    mvar edit --morph 207,250 --steps 8 ...                      frames from one class to the other, same seeds

--out becomes a folder: 00000.png, ..., sheet.png (the picture, what the tokenizer makes of it, what was drawn),
edit.json (what the pictures follow from), and of a morph morph.webp.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mvar.checkpoint.fingerprint import fingerprint
from mvar.cli import run_command
from mvar.errors import ConfigError
from mvar.files.disk import write_text, writing_folder
from mvar.images.arrays import Bytes, enlarge, grid, save_film, save_png
from mvar.log import log
from mvar.sampling.arguments import add_machine, add_model, add_sampling_options, sampling_options
from mvar.sampling.canvas import Area, Canvas
from mvar.sampling.classes import class_names, parse_classes
from mvar.sampling.drawing import draw_few, made_by
from mvar.sampling.editing import Editing, EditOptions, Keep
from mvar.sampling.forcing import Across, Forcing
from mvar.sampling.loading import ModelPair, pick_device
from mvar.sampling.morphing import draw_path
from mvar.sampling.painter import Painter
from mvar.sampling.pictures import Picture
from mvar.sampling.planning import Request
from mvar.threads import on_one_core

RECORD = "edit.json"
GPU_BATCH = 8
"""Pictures drawn together on a GPU, always: so a picture's rounding does not depend on how many are asked for. On a CPU
it is one."""
SEEN_PX = 96
"""Side of a picture that people look at, at least: smaller ones are enlarged on the sheet."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar edit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what is redrawn").add_argument
    add_model(add)
    add("--image", type=Path, help="picture of any format and size")
    add("--mask", type=Path, help="picture of the image's size: white is redrawn")
    add("--box", metavar="X,Y,W,H", help="area of the image that is redrawn, in its pixels")
    add(
        "--place", metavar="X,Y,W,H", help="where the image goes on a canvas of the tokenizer's size; the rest is drawn"
    )
    add("--vary", type=int, metavar="K", help="keep the scales before K, counted from 0, and redraw the others")
    add("--class", dest="label", help="number or name (default: no class)")
    add("--morph", metavar="A,B", help="two classes: draw the way from one to the other")
    add("--steps", type=int, default=8, help="frames of --morph (default 8)")
    add("--class-names", type=Path, help="file with a class name a line, or code store (default: the run's code store)")
    add("--num", type=int, default=1, help="pictures (default 1)")
    add("--seed", type=int, default=0, help="other seed, other pictures (default 0)")
    add("--out", type=Path, required=True, help="folder of what is drawn")

    defaults = EditOptions()
    add = parser.add_argument_group("what is kept (docs/edit.md)").add_argument
    add(
        "--forcing",
        choices=get_args(Forcing),
        default=defaults.forcing,
        help="known tokens: quantized anew against what was drawn around them (default), or the picture's own codes",
    )
    add(
        "--across",
        choices=get_args(Across),
        default=defaults.across,
        help="tokens across the mask's edge: drawn (default), or given, made of what is known",
    )
    add(
        "--keep",
        choices=get_args(Keep),
        default=defaults.keep,
        help="what is put back of the known part: the tokenizer's reconstruction (default), the picture's own pixels, "
        "or nothing: all is as the codes decode",
    )
    add("--edge", type=int, metavar="PX", help="pixels in which one goes over into the other (default: half a cell)")
    add_machine(add_sampling_options(parser))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for what no model could satisfy, before anything is loaded."""
    if args.image is None and (args.mask, args.box, args.place, args.vary) != (None,) * 4:
        raise ConfigError("--mask, --box, --place, --vary: of which picture? Give --image.")
    if args.image is None and args.morph is None:
        raise ConfigError("nothing to edit: give --image, or --morph for the way from one class to another.")
    if args.image is not None and (args.mask, args.box, args.place, args.vary) == (None,) * 4:
        raise ConfigError("--image: what of it is to be redrawn? Give --mask, --box, --place or --vary.")
    if args.mask is not None and args.box is not None:
        raise ConfigError("--mask, --box: two ways to say the same. Leave one out.")
    if args.morph is not None and args.label is not None:
        raise ConfigError("--morph, --class: a morph names its classes itself. Leave --class out.")
    if args.num < 1 or args.steps < 2:
        raise ConfigError(f"--num {args.num} --steps {args.steps}: expected at least one picture, and two frames.")
    require_ours(args.out)


def require_ours(out: Path) -> None:
    """Raise ConfigError unless the folder is new, empty, or of an edit: it is replaced as a whole."""
    if out.exists() and not (out.is_dir() and ((out / RECORD).is_file() or not any(out.iterdir()))):
        raise ConfigError(f"--out {out}: exists, and holds no edit. Give a new folder: it is replaced as a whole.")


def classes_of(args: argparse.Namespace, source: ModelPair) -> tuple[int, int | None]:
    """The class that is drawn, and the one at the end of a morph. Raises ConfigError."""
    if args.morph is None and args.label is None:
        return source.num_classes, None
    names = class_names(args.weights, args.class_names, source.num_classes)
    found = parse_classes(args.morph or args.label, source.num_classes, names)
    if args.morph is None:
        if len(found) != 1:
            raise ConfigError(f"--class {args.label}: expected one class.")
        return found[0], None
    if len(found) != 2:
        raise ConfigError(f"--morph {args.morph}: expected two different classes, such as 207,250.")
    return found[0], found[1]


def opened(args: argparse.Namespace, source: ModelPair) -> Canvas | None:
    """Raises ConfigError, ImageError."""
    if args.image is None:
        return None
    box = None if args.box is None else Area.parse("--box", args.box)
    place = None if args.place is None else Area.parse("--place", args.place)
    canvas = Canvas.of(args.image, source.tokenizer.image_size, mask=args.mask, box=box, place=place)
    if args.vary is not None and (args.mask, args.box, args.place) == (None,) * 3:
        return dataclasses.replace(canvas, redrawn_HW=np.ones_like(canvas.redrawn_HW))
    return canvas


def draw(args: argparse.Namespace, how: EditOptions, source: ModelPair) -> tuple[Bytes, Editing | None, dict[str, Any]]:
    """What is drawn, uint8 (frames, num, H, W, 3), what was edited, and the record. Raises MvarError."""
    options, device = sampling_options(args), pick_device(args.device)
    options.of_scales(len(source.config.patch_nums))
    label, second = classes_of(args, source)
    canvas = opened(args, source)
    request = Request(source, {label: args.num}, options, args.seed, device, precision=args.precision)
    precision = request.decided_precision()
    # Before anything moves to the device or into another layout.
    prints = {"weights": fingerprint(source.state), "tokenizer": fingerprint(source.tokenizer.state_dict())}
    painter = request.painter(precision, 1 if device.type == "cpu" else GPU_BATCH, compiled=False)
    editing = None
    if canvas is not None:
        editing = on_one_core(lambda: Editing(source.tokenizer, canvas.picture_HWC, canvas.redrawn_HW, how))
    pictures = [Picture(label, number) for number in range(args.num)]
    frames = frames_of(painter, pictures, second, args.steps, editing)
    record = prints | {
        "options": dataclasses.asdict(options),
        "edit": None if canvas is None else dataclasses.asdict(how),
        "class": label,
        "morph_to": second,
        "seed": args.seed,
        "seeds": [picture.seed(args.seed) for picture in pictures],
        "picture": None if canvas is None else digest(canvas.picture_HWC),
        "redrawn": None if canvas is None else digest(np.packbits(canvas.redrawn_HW)),
        "precision": precision,
        "made": made_by(device) | {"weights": str(source.where), "step": source.step, "ema": args.ema},
    }
    return frames, editing, record


def frames_of(
    painter: Painter, pictures: Sequence[Picture], second: int | None, steps: int, editing: Editing | None
) -> Bytes:
    forced: Callable[[], Any] | None = None if editing is None else editing.forced
    if second is not None:
        frames = draw_path(painter, pictures, second, steps, forced)
    else:
        drawn = draw_few(pictures, painter.variant(forced=forced))
        frames = np.stack([drawn[picture] for picture in pictures])[None]
    return frames if editing is None else np.stack([editing.finish(frame) for frame in frames])


def digest(array: Bytes) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def write(out: Path, frames: Bytes, editing: Editing | None, record: dict[str, Any]) -> None:
    """The folder, complete or as it was. Raises WriteError."""
    steps, num = frames.shape[:2]
    factor = max(1, SEEN_PX // frames.shape[2])
    rows = [[*shown(editing), *frames[:, number]] for number in range(num)]
    if steps == 1:
        rows = [[*shown(editing), *frames[0]]]
    with writing_folder(out) as folder:
        for number in range(num):
            for step in range(steps):
                name = f"{number:05d}.png" if steps == 1 else f"{number:05d}-{step:02d}.png"
                save_png(folder / name, frames[step, number])
        save_png(folder / "sheet.png", enlarge(grid([one for row in rows for one in row], len(rows[0])), factor))
        if steps > 1:
            there = [enlarge(grid(frame, num), factor) for frame in frames]
            save_film(folder / "morph.webp", [*there, *there[-2:0:-1]], frame_s=0.15, last_s=0.15)
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    log.info("%s: %d pictures, and sheet.png", out, steps * num)


def shown(editing: Editing | None) -> list[Bytes]:
    """What the sheet begins with: the picture and the tokenizer's reconstruction, with what is redrawn paled."""
    if editing is None:
        return []
    return [editing.marked(editing.picture_HWC), editing.marked(editing.reconstruction_HWC)]


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    check_arguments(args)
    how = EditOptions(args.forcing, args.across, args.keep, args.edge, args.vary)
    source = ModelPair.load(args.weights, args.tokenizer, step=args.step, ema=args.ema)
    write(args.out, *draw(args, how, source))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
