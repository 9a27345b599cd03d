"""Files of one JSON object a line that killed processes may have torn: appended to, and read past what is torn."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JsonRecord = dict[str, Any]
"""One line."""


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line; one that a kill tore before it is closed first, so that both stay apart. Raises OSError."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = size > 0 and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")


def read(path: Path) -> list[JsonRecord]:
    """All whole records, oldest first; none without the file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
