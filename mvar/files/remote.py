"""Files behind a URL, or on another disk: copied once, through webdataset's `gopen`, complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from mvar import headway
from mvar.errors import StoreError
from mvar.files.disk import BLOCK_BYTES, writing


def fetch(url: str, path: Path, *, sha256: str | None = None) -> None:
    """Copy `url` (or a local path) to `path`; with `sha256` only what has this digest arrives.

    Raises StoreError, WriteError.

    A URL is trusted input: `pipe:` runs a shell command.
    """
    digest = hashlib.sha256()
    with writing(path) as file:
        for block in _blocks(url):
            digest.update(block)
            file.write(block)
            headway.made()
        if sha256 is not None and digest.hexdigest() != sha256:
            raise StoreError(
                f"{url}: arrived damaged, sha256 {digest.hexdigest()[:12]}... instead of {sha256[:12]}... "
                "Run the same command again; if that does not help, mend the original."
            )


def read(url: str) -> bytes:
    """The bytes of a small file behind a URL or at a local path. Raises StoreError."""
    return b"".join(_blocks(url))


def _blocks(url: str) -> Iterator[bytes]:
    from webdataset.gopen import gopen  # Imports torch.

    try:
        with contextlib.closing(gopen(url, "rb")) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except (OSError, ValueError) as error:
        raise StoreError(f"{url}: cannot be fetched ({error}). Check the address and that it can be reached.") from None
