"""What takes long in a start tells of its headway, from whatever thread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mvar import headway
from mvar.data.staging import stage
from mvar.data.store import CodeStore
from mvar.files.disk import BLOCK_BYTES, sha256_of
from mvar.files.remote import fetch
from mvar.testing.code_stores import make_store

BLOCKS = 3


def steps_of(action: Callable[[], object]) -> int:
    """How often headway is told of."""
    told: list[None] = []
    with headway.heard_by(lambda: told.append(None)):
        action()
    return len(told)


def test_copies_and_digests_tell_of_every_block(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(BLOCKS * BLOCK_BYTES))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert steps_of(lambda: sha256_of(path)) == BLOCKS
    assert steps_of(lambda: fetch(str(path), tmp_path / "copy", sha256=digest)) == BLOCKS
    headway.made()  # Nobody listens any more.


def test_staging_and_reading_codes_tell_of_every_file(tmp_path: Path) -> None:
    source = make_store(tmp_path / "store")
    store = CodeStore.open(source)
    shards = sum(len(split.shards) for split in store.manifest.splits.values())
    assert steps_of(lambda: stage(source, tmp_path / "staged")) >= shards + 2
    split = store.split("train")
    assert steps_of(lambda: split.fill(np.empty(split.shape, np.uint16))) == len(store.manifest.splits["train"].shards)
