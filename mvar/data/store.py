"""The code store: a folder of webdataset tars that hold tokenized images, an index that makes every sample addressable.

    manifest.json            what the store is and what it is made of; written last: its presence means complete
    index.npz                for each split: shard number, byte offset of the codes, label of every sample
    quantizer.safetensors    the part of the tokenizer that training needs
    train-000000.tar ...     <key>.codes.npy (uint16, views x L) and <key>.cls (class index) of each sample
    val-000000.tar ...

Legend: N samples asked for, V views, L tokens of all scales.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray

from mvar import headway
from mvar.config import ReaderKind
from mvar.data import staging
from mvar.data.manifest import INDEX, QUANTIZER, Manifest, SplitInfo, check_file
from mvar.errors import StoreError
from mvar.paths import is_url
from mvar.tokenizer.files import load_quantizer
from mvar.tokenizer.quantizer import Quantizer

CODES_SUFFIX = ".codes.npy"
LABEL_SUFFIX = ".cls"
TAR_BLOCK = 512
READERS = 16
"""Samples that are waited for at once, where the disk is slow to answer."""
SLOW_S = 3e-4
"""A sample that took longer was not in memory: it is a microsecond's work."""

I64 = NDArray[np.int64]
U16 = NDArray[np.uint16]


class CodeStore:
    """A finished store, checked and ready to read. Use `CodeStore.open`."""

    def __init__(self, folder: Path, manifest: Manifest, splits: dict[str, Split]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._splits = splits

    @classmethod
    def open(
        cls, path: str | Path, *, reader: ReaderKind = "mmap", stage: Path | None = None, verify: bool = False
    ) -> CodeStore:
        """Read manifest and index, and check them and the shards' sizes; with `verify` also every shard's digest.

        `reader`: "mmap" reads codes from the shards as they are asked for (pages are shared by all processes of a
        machine); "ram" loads them all first; "staged" copies the store under the folder `stage` first, once for all
        processes of a node, and maps that. A URL has to be staged. Raises StoreError.
        """
        if reader == "staged":
            if stage is None:
                raise StoreError(
                    f"code store {path}: reader staged needs a folder on the node's own disk (data.stage)."
                )
            path = staging.stage(path, stage)
        elif is_url(str(path)):
            raise StoreError(
                f"code store {path}: a URL has to be copied first. Set data.reader=staged, data.stage=DIR."
            )
        folder = Path(path)
        manifest = Manifest.read(folder)
        check_file(folder, manifest.index)
        for split in manifest.splits.values():
            for shard in split.shards:
                check_file(folder, shard, digest=verify)
        tables = read_index(folder / INDEX)
        splits = {}
        for name, info in manifest.splits.items():
            table = tables.get(name)
            if table is None:
                raise StoreError(f"{folder / INDEX}: holds no split {name!r}. Write it again: mvar finalize {folder}")
            _check_table(folder, name, info, table, manifest)
            splits[name] = Split(folder, name, info, table, manifest.tokens)
            if reader == "ram":
                splits[name].hold(splits[name].loaded())
        return cls(folder, manifest, splits)

    def split(self, name: str) -> Split:
        """The samples of `train` or `val`; `val` may be empty."""
        if name not in self._splits:
            raise StoreError(f"code store {self.folder}: no split {name!r}, it has {', '.join(self._splits)}.")
        return self._splits[name]

    def quantizer(self) -> Quantizer:
        """The tokenizer's quantizer, from the file inside the store, after a check of its digest."""
        check_file(self.folder, self.manifest.quantizer)
        return load_quantizer(self.folder / QUANTIZER)

    def require_geometry(self, patch_nums: Sequence[int], vocab_size: int, latent_channels: int) -> None:
        """Raises StoreError unless a model (or tokenizer) of this geometry can use the codes."""
        have = self.manifest
        differing = [
            f"{name}: the store has {theirs}, the model {ours}"
            for name, theirs, ours in (
                ("patch_nums", list(have.patch_nums), list(patch_nums)),
                ("vocab_size", have.vocab_size, vocab_size),
                ("latent_channels", have.latent_channels, latent_channels),
            )
            if theirs != ours
        ]
        if differing:
            raise StoreError(
                f"code store {self.folder} was made for another geometry: {'; '.join(differing)}. "
                "Set the model's keys to the store's values, or tokenize with the tokenizer that the model is for."
            )


class IndexTable(pydantic.BaseModel):
    """Where the samples of a split lie, in the store's order."""

    model_config = pydantic.ConfigDict(frozen=True, arbitrary_types_allowed=True)

    shard_N: NDArray[np.int32]
    offset_N: I64
    label_N: NDArray[np.int32]


class Split:
    """The samples of one split, addressable by number.

    `labels_N`: int64 (samples,). `views`: views of each sample.
    """

    def __init__(self, folder: Path, name: str, info: SplitInfo, table: IndexTable, tokens: int) -> None:
        self.name = name
        self.views = len(info.views)
        self.tokens = tokens
        self.labels_N: I64 = table.label_N.astype(np.int64)
        self._folder = folder
        self._shards = info.shards
        self._first_sample = np.cumsum([0, *(shard.samples for shard in info.shards)])
        self._shard_N = table.shard_N
        self._offset_N = table.offset_N
        self._mapped: dict[int, U16] = {}
        self._addresses: dict[int, int] = {}
        """Where the mapped shards begin."""
        self._resident: U16 | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    def codes(self, indices_N: I64, views_N: I64) -> U16:
        """Codes of sample `indices_N[n]` in view `views_N[n]`: uint16 (N, L). Raises StoreError on a damaged shard."""
        indices_N, views_N = np.asarray(indices_N, dtype=np.int64), np.asarray(views_N, dtype=np.int64)
        self._check_range(indices_N, views_N)
        if self._resident is not None:
            return self._resident[indices_N, views_N]
        starts_N = self._offset_N[indices_N] + 2 * views_N * self.tokens
        gathered: U16 = np.empty((len(indices_N), self.tokens), dtype=np.uint16)
        self._gather(gathered, self._shard_N[indices_N].tolist(), starts_N.tolist())
        return gathered

    def _gather(self, into: U16, shards: list[int], starts: list[int]) -> None:
        """Row n of `into` from byte `starts[n]` of `shards[n]`.

        One after the other as long as they are in memory. Once one had to be waited for, as on a network disk that
        nobody has read from yet, several threads wait for the rest at once.
        """
        address, row_bytes = into.ctypes.data, 2 * self.tokens

        def copy(number: int) -> None:
            base = self._addresses.get(shards[number]) or self._open(shards[number])
            _copy(address + number * row_bytes, base + starts[number], row_bytes)

        before = time.perf_counter()
        for number in range(len(shards)):
            copy(number)
            now = time.perf_counter()
            if now - before > SLOW_S:
                # Whatever fails in a thread is raised here.
                list(self._readers.map(copy, range(number + 1, len(shards))))
                return
            before = now

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS, thread_name_prefix="mvar-read")

    def key(self, index: int) -> str:
        """The sample's key, read from its place in the shard."""
        shard = self._folder / self._shards[int(self._shard_N[index])].name
        with shard.open("rb") as file:
            file.seek(int(self._offset_N[index]) - len(codes_header(self.views, self.tokens)) - TAR_BLOCK)
            return file.read(100).split(b"\0")[0].decode().removesuffix(CODES_SUFFIX)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of all codes: (samples, views, L)."""
        return len(self), self.views, self.tokens

    def loaded(self) -> U16:
        """All codes, in memory of this process."""
        codes: U16 = np.empty(self.shape, dtype=np.uint16)
        self.fill(codes)
        return codes

    def fill(self, resident: U16) -> None:
        """Read all codes into `resident`, an array of `shape`. Raises StoreError."""
        for number, info in enumerate(self._shards):
            check_file(self._folder, info, digest=False)
            if not info.samples:
                continue
            words = self._checked(number, np.fromfile(self._folder / info.name, dtype=np.uint8))
            windows = np.lib.stride_tricks.sliding_window_view(words, self.tokens)
            own = slice(*self._first_sample[number : number + 2])
            for view in range(self.views):
                resident[own, view] = windows[self._offset_N[own] // 2 + view * self.tokens]
            headway.made()

    def hold(self, resident: U16) -> None:
        """From now on take codes from `resident`, which holds all of them; no file is touched any more."""
        assert resident.shape == self.shape
        self._resident = resident
        self._mapped.clear()
        self._addresses.clear()

    def _check_range(self, indices_N: I64, views_N: I64) -> None:
        if indices_N.size and not (indices_N.min() >= 0 and indices_N.max() < len(self)):
            raise IndexError(f"sample numbers must lie in [0, {len(self)})")
        if views_N.size and not (views_N.min() >= 0 and views_N.max() < self.views):
            raise IndexError(f"view numbers must lie in [0, {self.views})")

    def _open(self, number: int) -> int:
        """Map a shard; gives its address. Several threads may do so at once: the first one's mapping is kept."""
        info = self._shards[number]
        check_file(self._folder, info, digest=False)
        words = self._mapped.setdefault(number, self._checked(number, _map(self._folder / info.name, info.bytes)))
        return self._addresses.setdefault(number, words.ctypes.data)

    def _checked(self, number: int, data: NDArray[np.uint8]) -> U16:
        """Its 16-bit words. Raises StoreError unless the shard's first and last sample begin where the index says."""
        header = np.frombuffer(codes_header(self.views, self.tokens), dtype=np.uint8)
        for place in (self._first_sample[number], self._first_sample[number + 1] - 1):
            offset = self._offset_N[place]
            if not np.array_equal(data[offset - len(header) : offset], header):
                raise StoreError(
                    f"shard {self._folder / self._shards[number].name}: no codes of {self.views} x {self.tokens} where "
                    f"the index says (byte {offset}). The shard is damaged or is another one. "
                    f"Run mvar verify {self._folder}, then tokenize again."
                )
        return data[: len(data) // 2 * 2].view("<u2")


def _copy(to: int, source: int, count: int) -> None:
    """Bytes from address to address. Other threads run meanwhile: the pages may have to come from a disk first."""
    ctypes.memmove(to, source, count)


def _map(path: Path, size: int) -> NDArray[np.uint8]:
    """The file's bytes, read as they are touched, without reading ahead.

    Unlike numpy's mmap this holds no file descriptor: a store may have more shards than a process may open.
    """
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    with contextlib.suppress(AttributeError):
        # Samples are read in random order: without this every one drags in megabytes around it.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(size), mmap.MADV_RANDOM)
    return mapped.numpy()


def codes_header(views: int, tokens: int) -> bytes:
    """The bytes that stand before the codes in a `.codes.npy`: numpy's format 1.0."""
    buffer = io.BytesIO()
    description = {"descr": "<u2", "fortran_order": False, "shape": (views, tokens)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def write_index(file: IO[bytes], tables: dict[str, IndexTable]) -> None:
    """Write index.npz (uncompressed, reproducible bytes)."""
    arrays: dict[str, Any] = {}
    for split, table in tables.items():
        arrays |= {f"{split}_shard": table.shard_N, f"{split}_offset": table.offset_N, f"{split}_label": table.label_N}
    np.savez(file, **arrays)


def read_index(path: Path) -> dict[str, IndexTable]:
    """The tables of index.npz by split. Raises StoreError on a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = {name.rpartition("_")[0] for name in arrays.files}
            return {
                name: IndexTable(
                    shard_N=arrays[f"{name}_shard"], offset_N=arrays[f"{name}_offset"], label_N=arrays[f"{name}_label"]
                )
                for name in names
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path}: cannot be read ({error}). Write it again: mvar finalize {path.parent}") from None


def _check_table(folder: Path, name: str, info: SplitInfo, table: IndexTable, manifest: Manifest) -> None:
    """The index agrees with the manifest, so that reading by it stays inside the shards."""
    counts = [shard.samples for shard in info.shards]
    sizes = np.array([shard.bytes for shard in info.shards], dtype=np.int64)
    lengths = {len(table.shard_N), len(table.offset_N), len(table.label_N), info.samples, sum(counts)}
    header, payload = len(codes_header(len(info.views), manifest.tokens)), 2 * len(info.views) * manifest.tokens
    good = len(lengths) == 1 and np.array_equal(table.shard_N, np.repeat(np.arange(len(counts)), counts))
    if good and info.samples:
        inside = (table.offset_N >= header + TAR_BLOCK) & (table.offset_N + payload <= sizes[table.shard_N])
        labels = (table.label_N >= 0) & (table.label_N < len(manifest.classes))
        good = bool(inside.all() and labels.all() and not (table.offset_N % 2).any())
    if not good:
        raise StoreError(
            f"{folder / INDEX}: does not match the manifest's split {name!r}. Write both again: mvar finalize {folder}"
        )
