"""No two classes of one name: whoever looks one up finds the right one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from tests.golden import REPOSITORY


def classes_of(root: Path) -> dict[str, list[str]]:
    """Name of each public class of the packages under `root` -> the files that define it."""
    found: dict[str, list[str]] = defaultdict(list)
    for package in ("mvar", "data_prep"):
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(path.relative_to(root).as_posix())
    return found


def test_no_two_classes_have_one_name() -> None:
    assert {name: files for name, files in classes_of(REPOSITORY).items() if len(files) > 1} == {}


def test_two_of_one_name_are_found(tmp_path: Path) -> None:
    for package in ("mvar", "data_prep"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "job.py").write_text("class Job: ...\n\nclass _Own: ...\n")
    assert classes_of(tmp_path) == {"Job": ["mvar/job.py", "data_prep/job.py"]}
