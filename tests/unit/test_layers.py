"""The table of rooms in docs/design.md is the tree's, and every import runs down it."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.golden import REPOSITORY

TABLE = "docs/design.md"
_ROW = re.compile(r"^\| `([\w/]+)/` \| (.*) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Tree:
    """A tree of Python files as its table of rooms orders them."""

    root: Path
    floors: dict[str, int]
    """Module -> number of its room, counted from the top of the table."""
    faults: tuple[str, ...]
    """Where table and tree differ."""

    @classmethod
    def read(cls, root: Path) -> Tree:
        """A room on one line of the table has all files of its folder (of `tests/` also those below), one on several
        lines those that a line names."""
        rows = _ROW.findall((root / TABLE).read_text(encoding="utf-8"))
        rooms = [room for room, _ in rows]
        floors: dict[str, int] = {}
        faults = [f"{TABLE}: `{room}/` is no folder" for room in rooms if not (root / room).is_dir()]
        for top in sorted({room.partition("/")[0] for room in rooms}):
            for path in sorted((root / top).rglob("*.py")):
                room, name = path.relative_to(root).parent.as_posix(), path.relative_to(root).with_suffix("").as_posix()
                room = "tests" if top == "tests" else room
                found = [i for i, (own, text) in enumerate(rows) if own == room and f"`{path.stem}`" in text]
                if rooms.count(room) == 1:
                    found = [rooms.index(room)]
                if len(found) == 1:
                    floors[name.replace("/", ".").removesuffix(".__init__")] = found[0]
                else:
                    faults.append(f"{name}.py: on {len(found)} lines of the table of rooms")
        return cls(root, floors, tuple(faults))

    def imports(self, module: str) -> Iterator[tuple[int, str]]:
        """Line and module of every import from the tree."""
        path = self.root / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for line, package, name in named_in(path.read_text(encoding="utf-8")):
            assert not package.startswith("."), f"{path}:{line}: imports are absolute here"
            other = f"{package}.{name}" if f"{package}.{name}" in self.floors else package
            if other in self.floors and other != module:
                yield line, other

    def problems(self) -> list[str]:
        """Everything that is wrong, one line each."""
        problems = list(self.faults)
        arrows: set[tuple[str, str]] = set()
        for module, floor in self.floors.items():
            for line, other in self.imports(module):
                arrows.add((module, other))
                if self.floors[other] < floor:
                    problems.append(f"{module}, line {line}: imports {other}, which is above it")
        # An arrow into a file that imports nothing, or out of one that nothing imports, is in no circle.
        size = 0
        while size != len(arrows):
            size, (sources, targets) = len(arrows), ({a for a, _ in arrows}, {b for _, b in arrows})
            arrows = {(a, b) for a, b in arrows if a in targets and b in sources}
        return [*problems, *([f"a circle: {', '.join(sorted({a for a, _ in arrows}))}"] if arrows else [])]


@cache
def named_in(text: str) -> tuple[tuple[int, str, str], ...]:
    """Line, module and name of every import of a file, those inside functions included."""
    found: list[tuple[int, str, str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, "." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return tuple(found)


def test_every_import_runs_down_the_table_of_rooms() -> None:
    assert Tree.read(REPOSITORY).problems() == []


def test_unit_tests_have_the_rooms_of_what_they_test() -> None:
    folders = {path.parent for path in (REPOSITORY / "tests/unit").rglob("test_*.py")}
    rooms = {folder.relative_to(REPOSITORY / "tests/unit").as_posix() for folder in folders}
    assert [room for room in rooms if not any((REPOSITORY / top / room).is_dir() for top in ("mvar", ""))] == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("mvar/files/disk.py", "from mvar.run.names import CLAIM", "imports mvar.run.names, which is above it"),
        ("mvar/files/disk.py", "from mvar.run import names", "imports mvar.run.names, which is above it"),
        ("mvar/files/disk.py", "def f():\n    import mvar.run.names", "imports mvar.run.names, which is above it"),
        ("mvar/scales.py", "from mvar import MVAR", "imports mvar, which is above it"),
        ("benchmarks/harness.py", "from tests import golden", "imports tests.golden, which is above it"),
        ("mvar/errors.py", "from mvar.cli import main", "a circle: mvar.cli, mvar.errors"),
        ("mvar/new.py", "", "mvar/new.py: on 0 lines of the table"),
        ("mvar/new/file.py", "", "mvar/new/file.py: on 0 lines of the table"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, file: str, text: str, problem: str) -> None:
    for place in ("mvar", "data_prep", "benchmarks", "tests"):
        shutil.copytree(REPOSITORY / place, tmp_path / place, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / TABLE).parent.mkdir()
    shutil.copy(REPOSITORY / TABLE, tmp_path / TABLE)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{text}\n")
    problems = Tree.read(tmp_path).problems()
    assert any(problem in line for line in problems), problems
