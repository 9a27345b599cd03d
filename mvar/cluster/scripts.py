"""`mvar slurm-scripts DIR`: the Slurm scripts of an installed mvar, in DIR/slurm. A checkout has them already.

    mvar slurm-scripts . && cp slurm/site.env.example slurm/site.env
    sbatch slurm/train.sbatch --config d16.yaml run=runs/d16 data.store=/data/codes

Jobs take the Python that is active where they are submitted, or the one that site.env names.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from mvar import shipped
from mvar.errors import MvarError


def copy_scripts(folder: Path) -> Path:
    """Copy the scripts to `folder`/slurm, which must not be there yet. Returns it. Raises MvarError."""
    target = folder / "slurm"
    if target.exists():
        raise MvarError(
            f"{target}: is there already, and may hold a site's changes. Move it away, or give another DIR."
        )
    try:
        shutil.copytree(shipped.ROOT / "slurm", target, ignore=shutil.ignore_patterns("site.env", "__pycache__"))
    except OSError as error:
        raise MvarError(f"{target}: cannot be written ({error}). Give a writable folder.") from None
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar slurm-scripts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder you will submit from")
    print(copy_scripts(parser.parse_args(argv).folder))
    return 0
