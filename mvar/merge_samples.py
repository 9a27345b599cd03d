"""`mvar merge-samples`: all images of a job of `mvar sample` as one .npz, which other evaluations read.

`arr_0` is uint8 (N, H, W, 3), `arr_1` int64 (N,) the classes, in the order of the job. The same job gives the same
bytes, from any number of tasks and of any kind of folder. Nothing is written while an image is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mvar.cli import run_command
from mvar.sampling.merge import merge


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar merge-samples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, help="folder that `mvar sample` drew into (its --out)")
    parser.add_argument(
        "--out", type=Path, required=True, help="the .npz; FILE.npz.json beside it says how it was made"
    )
    parser.add_argument("--tasks", type=int, help="tasks of the array job, to name those to run again")
    args = parser.parse_args(argv)
    print(f"{merge(args.samples, args.out, args.tasks)}  {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
