"""The listing of a source, kept in the store: made once, by one task, while the others wait; then only checked.

    listing.json.gz    two lines of JSON: what was listed and the evidence that it stands; then its contents

Evidence is the time of the last change of every folder that was looked into (and size and time of every list and tar),
so checking costs a thousandth of listing. A file that is replaced in its place changes none of these: its size is
compared when it is read.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar.errors import WriteError
from mvar.files.disk import make_folder, writing
from mvar.images.sources import Contents, Entry, Item
from mvar.images.walk import evidence_of
from mvar.log import log
from mvar.run.claims import Claims

LISTING = "listing.json.gz"
FORMAT = 1
"""Another number where the same source would be listed otherwise."""
POLL_S = 0.5
"""How often a task that waits for another one's listing looks for it."""
TICK_NS = 2_000_000_000
"""Changes within so long of each other may have the same time: the coarsest clock of a file system."""


@dataclass(frozen=True)
class KeptListing:
    """The listing in a store's folder. `asked`: what was listed and how, as plain data; another is another listing."""

    folder: Path
    asked: dict[str, Any]

    def read(self) -> Contents | None:
        """The listing, if there is one, of the same source, which has not changed since."""
        path = self.folder / LISTING
        try:
            made_ns = path.stat().st_mtime_ns
            with gzip.open(path, "rt", encoding="ascii") as file:
                head = json.loads(file.readline())
                if (head["format"], head["asked"]) != (FORMAT, self.asked) or not _stands(head["evidence"], made_ns):
                    return None
                return _contents(head, json.loads(file.readline()))
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None  # None yet, or damaged: listing again costs time and nothing else.

    def once(self, look: Callable[[], Contents], *, keep: Callable[[Contents], bool]) -> Contents:
        """The kept listing, or what `look` finds, which is kept if `keep` says so. Raises what `look` raises.

        Of tasks that start together one looks, and the others wait for it: while it is alive.
        """
        make_folder(self.folder)
        waited = False
        with Claims(self.folder) as claims:
            while (contents := self.read()) is None:
                if not _take(claims):
                    if not waited:
                        log.info("another task lists the images; waiting for it")
                    waited = True
                    time.sleep(POLL_S)
                    continue
                begin_ns = time.time_ns()
                contents = look()
                if keep(contents):
                    self._write(contents, begin_ns)
                break
        return contents

    def _write(self, contents: Contents, begin_ns: int) -> None:
        """Write it so that it is complete or absent. The file's time is that of the beginning of the listing."""
        columns = {
            split: [list(column) for column in zip(*(entry.item for entry in entries), strict=True)]
            for split, entries in contents.entries.items()
        }
        body = {"where": contents.where, "classes": contents.classes, "notes": contents.notes, "entries": columns}
        head = {"format": FORMAT, "asked": self.asked, "kind": contents.kind, "evidence": contents.evidence}
        text = f"{json.dumps(head)}\n{json.dumps(body)}\n"
        with writing(self.folder / LISTING) as file:
            file.write(gzip.compress(text.encode("ascii"), compresslevel=1, mtime=0))
            file.flush()
            os.utime(file.fileno(), ns=(begin_ns, begin_ns))


def forget(folder: Path) -> None:
    """Remove the listing, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        (folder / LISTING).unlink(missing_ok=True)
        folder.rmdir()


def _take(claims: Claims) -> bool:
    """Whether to list: nobody else does. Where no claim can be written, everybody lists; the listings are the same."""
    try:
        return claims.take(LISTING)
    except WriteError:
        return True


def _stands(evidence: dict[str, list[int]], made_ns: int) -> bool:
    """Whether nothing changed since: every time is what it was, and so old that a change would have given another."""
    for path, (size, changed_ns) in evidence.items():
        if not 0 < changed_ns < made_ns - TICK_NS:
            return False
        try:
            if evidence_of(path) != (size, changed_ns):
                return False
        except OSError:
            return False
    return True


def _contents(head: dict[str, Any], body: dict[str, Any]) -> Contents:
    entries = {
        split: [Entry(Item(*row), row[3]) for row in zip(*columns, strict=True)]
        for split, columns in body["entries"].items()
    }
    evidence = {path: (size, changed_ns) for path, (size, changed_ns) in head["evidence"].items()}
    return Contents(head["kind"], body["where"], tuple(body["classes"]), entries, tuple(body["notes"]), evidence)
