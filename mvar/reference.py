"""`mvar reference`: statistics and features of real images, once, for all evaluations to come.

    mvar reference --images imagenet --store codes --features inception-2015-12-05.pt --out imagenet-256.npz

`mvar evaluate --reference imagenet-256.npz` compares samples with it. The file is complete or absent, and says which
images, which features and which resize it was made with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mvar.cli import run_command
from mvar.errors import ConfigError
from mvar.evaluation.extractors import open_extractor
from mvar.evaluation.pictures import SkipBad
from mvar.evaluation.real import RealImages, add_arguments
from mvar.evaluation.reference import KEPT, make_reference
from mvar.sampling.loading import pick_device


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help=".npz to write")
    add("--features", type=Path, help="Inception's file: TorchScript, or torch-fidelity's .pth (default: efflite0)")
    add("--count", type=int, metavar="N", help="images that the statistics are of, evenly chosen (default: all)")
    add(
        "--keep",
        type=int,
        default=KEPT,
        metavar="N",
        help=f"images whose features are kept for KID, precision and recall, and for the floor (default {KEPT:,})",
    )
    add("--batch", type=int, default=64, help="pictures in the network at once (default 64)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.batch < 1 or args.keep < 0 or (args.count is not None and args.count < 2):
        raise ConfigError("--batch: from 1; --keep: from 0; --count: from 2.")
    if args.out.suffix != ".npz":
        raise ConfigError(f"--out {args.out}: must end in .npz.")
    extractor = open_extractor(args.features, pick_device(args.device))
    real = RealImages.of(args, None)
    made = make_reference(
        real,
        extractor,
        args.split or "train",
        count=args.count,
        keep=args.keep,
        batch=args.batch,
        bad=SkipBad(args.skip_bad),
    )
    made.write(args.out)
    floor = made.context["floor_of"] or "none of other images"
    print(f"wrote {args.out}: {made.images:,} images, features of {extractor.name}; floor: {floor}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
