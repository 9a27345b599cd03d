"""Sets of pictures of one size, read in a stream: class folders, lists and tars of files, or an .npz of pixels.

Legend: N pictures of a set, B of a block, H, W pixels.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from mvar.cgroups import cores
from mvar.errors import ImageError
from mvar.images.archives import MemberReader
from mvar.images.archives import look_into as look_into_tars
from mvar.images.arrays import Bytes
from mvar.images.layouts import detect
from mvar.images.pixels import AS_PUBLISHED, DamagedImageError, FileReader
from mvar.images.sources import ImageFolder, Item, Listing, Reader
from mvar.images.views import centre_view
from mvar.log import log

IMAGES, LABELS = "arr_0", "arr_1"
"""Members of an .npz as the ADM evaluation suite wants it: uint8 (N, H, W, 3), and class numbers (N,)."""
NUMBERS = tuple(map(str, range(1 << 16)))
"""Names of classes that are numbers, of which samples may be of a few."""
I64 = NDArray[np.int64]


class PictureSet(Protocol):
    """A finite, ordered set of RGB pictures of one size."""

    @property
    def where(self) -> str:
        """What it is, for people."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    @property
    def labels_N(self) -> I64 | None:
        """Class of each, where that is known."""

    def __len__(self) -> int: ...

    def blocks(self, batch: int) -> Iterator[Bytes]:
        """All pictures in order, uint8 (B, H, W, 3) in [0, 255]. Raises ImageError."""


def digest_of(blocks: Iterator[Bytes], digest: hashlib._Hash) -> Iterator[Bytes]:
    """The blocks themselves, while their pixels are digested."""
    for block_BHWC in blocks:
        digest.update(np.ascontiguousarray(block_BHWC).data)
        yield block_BHWC


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass
class SkipBad:
    """Damaged pictures that may be left out: how many, and which were."""

    limit: int = 0
    left_out: list[str] = field(default_factory=list)

    def add(self, key: str, damage: DamagedImageError) -> None:
        """Raises the damage, or an ImageError that lists all, where that is one too many."""
        if self.limit == 0:
            raise damage
        self.left_out.append(key)
        if len(self.left_out) > self.limit:
            raise ImageError(
                f"{len(self.left_out)} pictures are damaged, --skip-bad {self.limit} allows fewer: "
                f"{', '.join(self.left_out[:20])}. Mend them, or allow more. The last one: {damage}"
            )
        log.warning("left out %s: %s", key, damage.reason)


class ListedPictures:
    """Pictures of listed files, decoded and cut to size by all cores ahead of who asks for them."""

    def __init__(
        self,
        where: str,
        items: Sequence[Item],
        reader: Reader,
        cut: Callable[[Item, Reader], Bytes],
        size: tuple[int, int],
        bad: SkipBad,
    ) -> None:
        self.where, self.size, self.bad = where, size, bad
        self._items, self._reader, self._cut = items, reader, cut
        self.labels_N: I64 | None = np.array([item.label for item in items], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._items)

    def blocks(self, batch: int) -> Iterator[Bytes]:
        """As `PictureSet`; damaged ones are left out, and their labels too, as far as `bad` allows."""
        block: list[Bytes] = []
        kept: list[int] = []
        for number, found in enumerate(self._decoded(2 * batch)):
            if isinstance(found, DamagedImageError):
                self.bad.add(self._items[number].key, found)
                continue
            kept.append(number)
            block.append(found)
            if len(block) == batch:
                yield np.stack(block)
                block = []
        if block:
            yield np.stack(block)
        if len(kept) < len(self._items):
            self._items = [self._items[number] for number in kept]
            self.labels_N = np.array([item.label for item in self._items], dtype=np.int64)

    def _decoded(self, ahead: int) -> Iterator[Bytes | DamagedImageError]:
        """Pillow lets go of Python's lock while it decodes and resizes, so threads keep all cores busy."""
        pool = ThreadPoolExecutor(cores(), thread_name_prefix="mvar-decode")
        items = iter(self._items)
        try:
            waiting: deque[Future[Bytes | DamagedImageError]] = deque(
                pool.submit(self._one, item) for item in islice(items, ahead)
            )
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(self._one, item) for item in islice(items, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, item: Item) -> Bytes | DamagedImageError:
        try:
            return self._cut(item, self._reader)
        except DamagedImageError as error:
            return error


@dataclass(frozen=True)
class CentreView:
    """The centre of a picture, as a validation view is cut."""

    size: int
    resize: float

    def __call__(self, item: Item, reader: Reader) -> Bytes:
        return centre_view(reader(item.path, item.bytes), self.size, self.resize)


@dataclass(frozen=True)
class AsItIs:
    """A picture that must have its size already: a resize changes figures."""

    where: str
    size: tuple[int, int]

    def __call__(self, item: Item, reader: Reader) -> Bytes:
        pixels = np.asarray(reader(item.path, item.bytes), dtype=np.uint8)
        if pixels.shape[:2] != self.size:
            raise ImageError(
                f"{self.where}: {item.key} has {_px(pixels.shape[:2])}, the first picture {_px(self.size)}. Samples "
                "must have one size: draw them with one model, into a folder of their own."
            )
        return pixels


def samples_of(path: Path, bad: SkipBad, cut: CentreView | None = None) -> PictureSet:
    """What `mvar sample` or another program drew: class folders of pictures named by number, tars, or an .npz.

    `cut`: how files become pictures, if not as they are. Raises ImageError.
    """
    where = f"samples {path}"
    if path.suffix == ".npz":
        return NpzPictures(path, where)
    if not path.exists():
        raise ImageError(f"{where}: no such file or folder. Give what `mvar sample` or `mvar merge-samples` wrote.")
    if detect(str(path)) == "tars":
        items = Listing(look_into_tars(str(path), None, NUMBERS), MemberReader(), 0.0).splits["train"]
        reader: Reader = MemberReader(**vars(AS_PUBLISHED))
    else:
        folder = ImageFolder(path)
        if not all(name.isdigit() for name in folder.classes):
            raise ImageError(
                f"{where}: sub-folders must be class numbers, got {list(folder.classes[:5])}. Point --samples at the "
                "folder that `mvar sample --out` wrote."
            )
        items = tuple(item._replace(label=int(folder.classes[item.label])) for item in folder.splits["train"])
        reader = FileReader(**vars(AS_PUBLISHED))
    lossy = Counter(os.path.splitext(item.path.partition("@")[0])[1].lower() in (".jpg", ".jpeg") for item in items)
    if lossy[True]:
        log.warning("%s: %d pictures are JPEGs, whose losses make FID worse. Write PNGs.", where, lossy[True])
    if cut is not None:
        return ListedPictures(where, items, reader, cut, (cut.size, cut.size), bad)
    width, height = reader(items[0].path, items[0].bytes).size
    return ListedPictures(where, items, reader, AsItIs(where, (height, width)), (height, width), bad)


# --- .npz ------------------------------------------------------------------------------------------------------------


class NpzPictures:
    """Pictures in member `arr_0` of an .npz, read block by block: 50,000 of 256 px are 9.8 GB."""

    def __init__(self, path: Path, where: str) -> None:
        self.path, self.where = path, where
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as member:
                shape = self._shape(member)
                self.labels_N = _labels(archive) if f"{LABELS}.npy" in archive.namelist() else None
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ImageError(
                f"{where}: cannot be read ({error}). Expected an .npz whose {IMAGES} is uint8 (N, H, W, 3)."
            ) from None
        self._count, self.size = shape[0], (shape[1], shape[2])
        if self.labels_N is not None and len(self.labels_N) != self._count:
            raise ImageError(f"{where}: {self._count} pictures, but {len(self.labels_N)} labels. Make it anew.")

    def __len__(self) -> int:
        return self._count

    def blocks(self, batch: int) -> Iterator[Bytes]:
        """As `PictureSet`. Raises ImageError where the file ends early or its checksum is wrong."""
        height, width = self.size
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as member:
                self._shape(member)
                for begin in range(0, self._count, batch):
                    count = min(batch, self._count - begin)
                    block_BHWC: Bytes = np.empty((count, height, width, 3), dtype=np.uint8)
                    _fill(block_BHWC, member)
                    yield block_BHWC
                if member.read(1):  # Its end: here zipfile compares the checksum.
                    raise ValueError("more bytes than its shape says")
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ImageError(f"{self.where}: damaged ({error}). Copy or merge it again.") from None

    def _shape(self, member: IO[bytes]) -> tuple[int, ...]:
        """The array's shape; the member is at its first value then. Raises ValueError."""
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(f"{IMAGES} is {dtype} {shape}{' in Fortran order' if fortran else ''}")
        return tuple(shape)


def _labels(archive: zipfile.ZipFile) -> I64:
    with archive.open(f"{LABELS}.npy") as member:
        labels_N = np.lib.format.read_array(member, allow_pickle=False)
    if labels_N.ndim != 1 or not np.issubdtype(labels_N.dtype, np.integer):
        raise ValueError(f"{LABELS} is {labels_N.dtype} {labels_N.shape}, expected class numbers")
    return labels_N.astype(np.int64)


def _fill(block_BHWC: Bytes, member: IO[bytes]) -> None:
    """Read as many bytes as the block has. Raises EOFError where there are fewer."""
    place = block_BHWC.reshape(-1).data
    while place:
        count = member.readinto(place)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("it ends in the middle of a picture")
        place = place[count:]


def _px(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]} px"
