"""Numeric oracles: files made by the official implementation, kept outside the repository.

`MVAR_GOLDEN` names their folder; by default it is `shared/golden` in the repository or beside it.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent


def places() -> list[Path]:
    """Where their folder may be, the first that exists counts."""
    named = os.environ.get("MVAR_GOLDEN")
    return [Path(named)] if named else [REPOSITORY / "shared/golden", REPOSITORY.parent / "shared/golden"]


def _folder() -> Path:
    for place in places():
        if place.is_dir():
            return place
    pytest.skip(f"golden files not found in {' or '.join(map(str, places()))}; set MVAR_GOLDEN")


def golden(part: str, *names: str) -> dict[str, Tensor]:
    """Tensors of one or more files of a part, merged. Skips the test where the folder is missing."""
    folder = _folder() / part
    return {key: value for name in names for key, value in load_file(folder / name).items()}


def golden_json(part: str, name: str) -> Any:
    return json.loads((_folder() / part / name).read_text())
