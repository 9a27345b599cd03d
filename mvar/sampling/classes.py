"""Classes by number or by name: what a user may write, and where the names of a model's classes come from."""

from __future__ import annotations

import csv
import difflib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from mvar.checkpoint.record import RECORD, CheckpointRecord
from mvar.data.manifest import MANIFEST, Manifest
from mvar.errors import ConfigError, MvarError
from mvar.hub.layout import PREPROCESSING, Preprocessing
from mvar.images.sources import text_lines
from mvar.paths import is_url
from mvar.run.names import folder_of, steps_in

_NUMBERS = re.compile(r"(\d+)(?:-(\d+))?")


def parse_classes(text: str, num_classes: int, names: Sequence[str] | None = None) -> list[int]:
    """ "all", or numbers, ranges such as "0-3", and names, separated by commas: each class once, in the order given.

    A name that holds a comma stands in double quotes; "=7" is the class called 7, whatever its number. `names`: of all
    classes, if they are known. Raises ConfigError, also where a number is the name of another class.
    """
    if text == "all":
        return list(range(num_classes))
    chosen: dict[int, None] = {}
    for part in _parts(text):
        chosen.update(dict.fromkeys(_labels(part.strip(), text, num_classes, names)))
    return list(chosen)


def class_names(weights: Path, given: Path | None, num_classes: int) -> tuple[str, ...] | None:
    """Names of a model's classes: from `given` (a file with one a line, or a code store), else from a hub folder, or
    from the code store that a run folder or checkpoint was trained on, as long as it lies where it lay. None where
    nothing tells them.

    Raises ConfigError, StoreError, ImageError: `given` cannot be read or has another number of names.
    """
    if given is None:
        found = _known_names(weights)
        return found if found is not None and len(found) == num_classes else None
    names = Manifest.read(given).classes if given.is_dir() else tuple(line.strip() for line in text_lines(given))
    if len(names) != num_classes:
        raise ConfigError(f"--class-names {given}: {len(names)} names, but the model has {num_classes} classes.")
    return names


def _parts(text: str) -> list[str]:
    try:
        return next(csv.reader([text], skipinitialspace=True), None) or [""]
    except csv.Error as error:
        raise ConfigError(f"--classes {text!r}: cannot be read ({error}). Expected one line of classes.") from None


def _labels(part: str, text: str, num_classes: int, names: Sequence[str] | None) -> Sequence[int]:
    numbers = _NUMBERS.fullmatch(part)
    if numbers is None:
        return [_named(part.removeprefix("="), text, names)]
    low, high = int(numbers[1]), int(numbers[2] or numbers[1])
    labels = range(low, high + 1)
    if names is not None and part in names and list(labels) != [names.index(part)]:
        other = f"{low}-{low} for number {low}" if numbers[2] is None else "single numbers for the range"
        raise ConfigError(
            f"--classes {text}: {part} is also the name of class number {names.index(part)}. Write ={part} for the "
            f"name, {other}."
        )
    if low > high or high >= num_classes:
        raise ConfigError(f"--classes {text}: {part!r} is not within 0-{num_classes - 1}, the model's classes.")
    return labels


def _named(name: str, text: str, names: Sequence[str] | None) -> int:
    if names is None:
        raise ConfigError(
            f"--classes {text}: cannot read {name!r}. Expected all, or numbers such as 0-9 or 1,5. For names give "
            "--class-names FILE, with a name a line, or the folder of the code store."
        )
    return label_called(name, names, f"--classes {text}")


def label_called(name: str, names: Sequence[str], asked: str) -> int:
    """The number of the class of that name. Raises ConfigError, beginning with what was `asked`."""
    found = [label for label, other in enumerate(names) if other == name]
    if len(found) == 1:
        return found[0]
    if found:
        numbers = ", ".join(map(str, found))
        raise ConfigError(f"{asked}: classes {numbers} are all called {name!r}. Give numbers.")
    near = ", ".join(difflib.get_close_matches(name, names)) or ", ".join(names[:5])
    raise ConfigError(f"{asked}: no class is called {name!r}. Names like it: {near}.")


def _known_names(path: Path) -> tuple[str, ...] | None:
    if (path / PREPROCESSING).is_file():
        return Preprocessing.read(path / PREPROCESSING).classes
    manifest = manifest_of_run(path)
    return None if manifest is None else manifest.classes


def manifest_of_run(path: Path) -> Manifest | None:
    """Of the code store that a run folder or checkpoint was trained on, as long as it lies where it lay."""
    steps = steps_in(path / "checkpoints")
    folder = path if (path / RECORD).is_file() else folder_of(path / "checkpoints", steps[-1]) if steps else None
    try:
        if folder is None:
            return None
        record = CheckpointRecord.read(folder)
        store = str(record.config["data"]["store"])
        data = b"" if is_url(store) else (Path(store) / MANIFEST).read_bytes()
        same = hashlib.sha256(data).hexdigest() == record.store
        return Manifest.parse(data, store) if same else None
    except (OSError, KeyError, TypeError, MvarError):
        return None
