"""What is shipped beside the code: recipes, DeepSpeed templates, Slurm scripts. The one place that knows where it lies.

In a checkout, and in the code that a run keeps, these folders lie beside the packages, where users look for them;
`setup.py` puts them into the package when a wheel is built.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("ds_configs", "recipes", "slurm")
IN_WHEEL = "_shipped"
CODE = Path(__file__).resolve().parents[1]
"""The folder that the packages are imported from: a checkout, what a run keeps, or site-packages."""
INSTALLED = (CODE / "mvar" / IN_WHEEL).is_dir()
"""Whether this is an installed wheel."""
ROOT = CODE / "mvar" / IN_WHEEL if INSTALLED else CODE
"""The folder that has FOLDERS in it."""


def find(folder: str, path: Path) -> Path | None:
    """The file a user means by `path`: the one there, else the shipped one, with or without its folder; None if none.

    >>> find("recipes", Path("d16.yaml"))  # or recipes/d16.yaml
    """
    candidates = (path, ROOT / path, ROOT / folder / path)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def names(folder: str, pattern: str) -> list[str]:
    """Names of the shipped files that match."""
    return sorted(path.name for path in (ROOT / folder).glob(pattern))
