"""`mvar evaluate`: how good samples are, next to real images, and how every figure was made.

    mvar evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --features inception-2015-12-05.pt
    mvar evaluate --samples samples --store codes --images imagenet --reference statistics.npz --features inception.pt
    mvar evaluate --samples samples --images digits --classifier classifier.safetensors --size 32

Prints FID, sFID, Inception Score, KID, precision and recall (with Inception's features; otherwise FD-efflite0, KID,
precision and recall), each with its error and with what real images score. --classifier is for small pictures: a
classifier trained on the real ones judges the samples. docs/evaluate.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mvar.cli import run_command
from mvar.errors import ConfigError, MvarError
from mvar.evaluation import EVALUATIONS, judging, told
from mvar.evaluation.classifier import fit, load_classifier, save_classifier
from mvar.evaluation.extractors import Extractor, open_extractor
from mvar.evaluation.fidelity import NEIGHBOURS
from mvar.evaluation.figures import PARTS, measure
from mvar.evaluation.judging import LabelledImages
from mvar.evaluation.pictures import CentreView, PictureSet, SkipBad, samples_of
from mvar.evaluation.real import RealImages, add_arguments
from mvar.evaluation.reference import Reference, make_reference, read_reference
from mvar.evaluation.run_record import add_evaluation
from mvar.files.disk import write_text
from mvar.log import log
from mvar.sampling.job import CLASSES, RECORD
from mvar.sampling.loading import pick_device

SIZE_JUDGED = 32
HELD_OUT = 0.1


def record_beside(samples: Path) -> dict[str, Any] | None:
    """What samples were drawn with, as far as it was noted beside them."""
    beside = [samples.with_name(f"{samples.name}.json"), samples.with_suffix(".json"), samples.parent / RECORD]
    for place in [samples / RECORD] if samples.is_dir() else beside:
        try:
            tree = json.loads(place.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(tree, dict):
            return tree
    return None


def differing_names(samples: Path, drawn: dict[str, Any] | None, classes: Sequence[str]) -> list[str]:
    """A line if classes of one number were called otherwise where the samples were drawn, as far as that is known."""
    names = told.found_in(drawn or {}, CLASSES)
    if not isinstance(names, list):
        return []
    pairs = enumerate(zip(names, classes, strict=False))
    differing = [(label, ours, theirs) for label, (ours, theirs) in pairs if ours not in (theirs, str(label))]
    if not differing:
        return []
    label, ours, theirs = differing[0]
    return [
        f"--samples {samples}: {len(differing)} classes were called otherwise where they were drawn: class number "
        f"{label} was {ours!r}, and is {theirs!r} in the images. Figures compare classes of one number."
    ]


def require_enough(pictures: PictureSet) -> None:
    """Raises MvarError where precision and recall could not be computed at all."""
    if len(pictures) <= NEIGHBOURS:
        raise MvarError(
            f"{pictures.where}: {len(pictures)} images; precision and recall need more than {NEIGHBOURS}, and figures"
            " worth reading need thousands. Draw more (--per-class)."
        )


# --- as papers do it -------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write; returns what is written as JSON. Raises MvarError."""
    device = pick_device(args.device)
    bad = SkipBad(args.skip_bad)
    pictures = samples_of(args.samples, bad)
    require_enough(pictures)
    drawn = record_beside(args.samples)
    step = step_of(args, drawn)
    extractor = open_extractor(args.features, device)
    reference = the_reference(args, extractor, pictures.size)
    where = str(args.reference or reference.context["made_of"])
    require_several_classes(pictures, reference)
    samples, figures = measure(
        pictures, extractor, reference, f"reference {where}", device,
        batch=args.batch, parts=args.parts, floor=args.floor,
    )  # fmt: skip
    identity = extractor.identity
    warnings = told.caveats(samples, reference, identity, drawn)
    if identity.inception and samples.spatial_P is None:
        warnings.append("sFID is left out: the TorchScript file gives no spatial features; torch-fidelity's .pth does.")
    elif samples.spatial_P is not None and reference.spatial is None:
        warnings.append("sFID is left out: the reference has no statistics of spatial features (mu_s, sigma_s).")
    places = {
        "samples_path": str(args.samples),
        "reference_path": None if args.reference is None else str(args.reference),
        "size_px": list(pictures.size),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "left_out": bad.left_out,
        "warnings": warnings,
    }
    context = told.context_of(samples, reference, identity, drawn, places, args.parts)
    print(told.screen(figures, context, warnings, identity))
    keyed = told.keys(figures, identity)
    payload = {"name": "evaluate", "figures": keyed, "goals": {}, "context": context}
    if step is not None:
        kept = {name: told.found_in(drawn or {}, name) for name in ("weights", "cfg")}
        kept |= {"samples_sha256": samples.sha256}
        add_evaluation(args.run, step, len(pictures), keyed, identity, reference, kept)
    return payload


def the_reference(args: argparse.Namespace, extractor: Extractor, size: tuple[int, int]) -> Reference:
    """Read, or made of the real images and kept where --reference says."""
    if args.reference is not None and args.reference.exists():
        if args.store is not None or args.images is not None:
            log.info("reference %s stands: --images and --store are not read", args.reference)
        return read_reference(args.reference, extractor, batch=args.batch)
    if args.images is None:
        missing = "" if args.reference is None else f" ({args.reference} does not exist)"
        raise ConfigError(
            f"--reference: give an .npz{missing}, or the real images that one is made of: --images, and --store if "
            "they were tokenized."
        )
    if size[0] != size[1]:
        raise ConfigError(f"--samples: pictures of {size[0]} x {size[1]} px; real images are cut to squares.")
    real = RealImages.of(args, size[0])
    if real.size != size[0]:
        raise ConfigError(
            f"--samples has pictures of {size[0]} px, the real images are cut to {real.size} px. A resize changes "
            "figures: compare samples of a model with the images of its own size."
        )
    split, bad = args.split or "train", SkipBad(args.skip_bad)
    made = make_reference(real, extractor, split, count=args.reference_images, batch=args.batch, bad=bad)
    if args.reference is None:
        log.info("the reference is not kept; --reference FILE.npz would keep it for the next evaluation")
    else:
        made.write(args.reference)
        log.info("wrote %s", args.reference)
        made = read_reference(args.reference, extractor, batch=args.batch)
    return made


def require_several_classes(pictures: PictureSet, reference: Reference) -> None:
    """Raises MvarError where samples of one class would be compared with images of several."""
    labels_N = pictures.labels_N
    if labels_N is not None and (reference.classes or 0) > 1 and int(labels_N.min()) == int(labels_N.max()):
        raise MvarError(
            f"{pictures.where}: all of class {int(labels_N[0])}, and the reference has {reference.classes} classes. "
            "Draw all classes (--classes all), or make a reference of that class alone."
        )


def step_of(args: argparse.Namespace, drawn: dict[str, Any] | None) -> int | None:
    """The checkpoint whose samples these are, where --run wants it noted. Raises ConfigError."""
    if args.run is None:
        return None
    if not args.run.is_dir():
        raise ConfigError(f"--run {args.run}: no such folder. Give the run that the samples were drawn from.")
    step = args.step if args.step is not None else told.found_in(drawn or {}, "step")
    if not isinstance(step, int):
        raise ConfigError("--run: say which checkpoint the samples are of (--step N); their record does not.")
    return step


# --- the demo's classifier -------------------------------------------------------------------------------------------


def judge(args: argparse.Namespace) -> dict[str, Any]:
    """Train or read a classifier and let it judge; returns what is written as JSON. Raises MvarError."""
    real = RealImages.of(args, SIZE_JUDGED, val_fraction=HELD_OUT)
    bad = SkipBad(args.skip_bad)
    pictures = samples_of(args.samples, bad, cut=CentreView(real.size, 1.0))
    require_enough(pictures)
    samples = LabelledImages.read(pictures)
    classes = real.source.classes
    if int(samples.labels_N.max()) >= len(classes):
        raise MvarError(
            f"--samples {args.samples} has class {int(samples.labels_N.max())}, but {args.images} has"
            f" {len(classes)} classes. Compare with the images that the model was trained on."
        )
    for line in differing_names(args.samples, record_beside(args.samples), classes):
        log.warning("%s", line)
    train, val = (LabelledImages.read(real.pictures(split, None, bad)) for split in ("train", "val"))
    file = Path(args.classifier) if args.classifier else None
    if file is not None and file.exists():
        classifier = load_classifier(file, len(classes)).to(pick_device(args.device))
    else:
        log.info("training a classifier on %d images, %d epochs", len(train.labels_N), args.epochs)
        device = pick_device(args.device)
        classifier = fit(train.images_NHWC, train.labels_N, len(classes), epochs=args.epochs, device=device)
        if file is not None:
            save_classifier(file, classifier)
    figures = judging.compare(classifier, samples, train, val)
    print(judging.table(figures))
    context = {"size_px": real.size, "samples": str(args.samples), "images": str(args.images), **real.describe()}
    return {"name": "evaluate", "figures": figures, "goals": {}, "context": context}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--samples",
        type=Path,
        required=True,
        help="folder of `mvar sample --out`, tars, or an .npz of pictures (arr_0)",
    )
    add("--reference", type=Path, help=".npz of ADM or of `mvar reference`; made of --images if it does not exist")
    add("--features", type=Path, help="Inception's file: TorchScript, or torch-fidelity's .pth (default: efflite0)")
    add("--reference-images", type=int, metavar="N", help="real images that a new reference is made of (default: all)")
    add("--parts", type=int, default=PARTS, help=f"parts of the samples that errors come from (default {PARTS})")
    add("--no-floor", dest="floor", action="store_false", help="leave out what real images score")
    add("--batch", type=int, default=64, help="pictures in the network at once (default 64)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    add("--json", type=Path, help="write the figures, and how they were made, here")
    add("--run", type=Path, help=f"run folder: add the figures to its {EVALUATIONS}, for `mvar report`")
    add("--step", type=int, help="with --run: checkpoint that the samples were drawn from")
    add_arguments(parser)
    small = parser.add_argument_group("small pictures")
    small.add_argument(
        "--classifier", nargs="?", const="", metavar="FILE", help="judge by a classifier: read from FILE, or trained"
    )
    small.add_argument("--epochs", type=int, default=8, help="passes over the training images (default 8)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    for name in ("batch", "parts", "epochs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}: expected a whole number from 1.")
    if args.reference is not None and args.reference.suffix != ".npz":
        raise ConfigError(f"--reference {args.reference}: must end in .npz.")
    payload = evaluate(args) if args.classifier is None else judge(args)
    if args.json is not None:
        write_text(args.json, json.dumps(payload, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
