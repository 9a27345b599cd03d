"""manifest.json: what a code store is and what it is made of, and how its files have to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from mvar.errors import StoreError
from mvar.files.disk import problem_of_file
from mvar.scales import ScalePyramid

FORMAT = "mvar-code-store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npz"
QUANTIZER = "quantizer.safetensors"
JOB = "job.json"


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, protected_namespaces=())


class FileInfo(_Frozen):
    """A file of the store, as it has to be. Its name is a plain one: copies are written, and commands run, with it."""

    name: Annotated[str, pydantic.Field(pattern=r"^\w[\w.-]*$")]
    bytes: int
    sha256: str


class ShardInfo(FileInfo):
    samples: int


class Quarantined(_Frozen):
    """An image that is left out of its shard, because it is damaged."""

    key: str
    reason: str


class SplitInfo(_Frozen):
    samples: int
    views: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    quarantine: tuple[Quarantined, ...] = ()


class TokenizerInfo(_Frozen):
    """The tokenizer that made the codes: digest of its file, and what `VQVAE(**geometry)` needs."""

    sha256: str
    geometry: dict[str, Any]


class SourceInfo(_Frozen):
    """What was tokenized: kind of source, and the fingerprint of its listing."""

    kind: str
    images: int
    bytes: int
    sha256: str


class Manifest(_Frozen):
    """Everything a reader has to know. Unknown keys are ignored, so that a later minor addition does no harm."""

    format: Literal["mvar-code-store"] = "mvar-code-store"
    format_version: int = FORMAT_VERSION
    patch_nums: tuple[int, ...]
    vocab_size: int
    latent_channels: int
    classes: tuple[str, ...]
    tokenizer: TokenizerInfo
    source: SourceInfo
    transform: dict[str, Any]
    encoding: dict[str, Any]
    statistics: dict[str, Any]
    job_sha256: str
    index: FileInfo
    quantizer: FileInfo
    splits: dict[str, SplitInfo]

    @property
    def tokens(self) -> int:
        """L: tokens of one view."""
        return ScalePyramid(self.patch_nums).total

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the store in `folder`. Raises StoreError: missing, damaged, of another version."""
        try:
            data = (folder / MANIFEST).read_bytes()
        except OSError as error:
            raise StoreError(_explain_missing(folder, error)) from None
        return cls.parse(data, str(folder))

    @classmethod
    def parse(cls, data: bytes, folder: str) -> Manifest:
        """A manifest from its file's bytes; `folder` is named in the StoreError."""
        path = f"{folder}/{MANIFEST}"
        try:
            tree = json.loads(data)
        except ValueError as error:
            raise StoreError(f"{path}: not valid JSON ({error}). Write it again: mvar finalize {folder}") from None
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise StoreError(f"{path}: not the manifest of a code store. Point to a folder made by `mvar tokenize`.")
        if tree.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{path}: format version {tree.get('format_version')!r}, this program reads {FORMAT_VERSION}. "
                "Use the version of mvar that wrote the store, or tokenize again."
            )
        try:
            return cls.model_validate(tree)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise StoreError(
                f"{path}: damaged at {where} ({problem['msg']}). Write it again: mvar finalize {folder}"
            ) from None

    def to_json(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


def check_file(folder: Path, info: FileInfo, *, digest: bool = True) -> None:
    """Raises StoreError unless the file exists, has its size and (with `digest`) its sha256."""
    problem = problem_of_file(folder / info.name, info.bytes, info.sha256 if digest else None)
    if problem is not None:
        raise StoreError(
            f"{folder / info.name}: {problem}. Run the tokenize command again (it re-makes what is damaged), then mvar"
            f" finalize {folder}."
        )


def _explain_missing(folder: Path, error: OSError) -> str:
    if not folder.is_dir():
        return f"code store {folder}: no such folder. Give the folder that `mvar tokenize` wrote as store=..."
    if (folder / JOB).exists():
        return (
            f"code store {folder}: {MANIFEST} is missing, so the store is not complete. "
            f"When all tokenize tasks have ended, run: mvar finalize {folder}"
        )
    return (
        f"code store {folder}: {MANIFEST} cannot be read ({error.strerror}) and nothing was tokenized here. "
        "Run mvar tokenize with store=... set to this folder, then mvar finalize."
    )
