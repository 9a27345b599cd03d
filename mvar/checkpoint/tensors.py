"""A file of tensors: written as safetensors, one tensor at a time, with its size and digest."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mvar.files.disk import problem_of_file

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class FileRecord:
    """What a file must be like to be trusted."""

    bytes: int
    sha256: str

    def problem_of(self, path: Path, *, digest: bool = True) -> str | None:
        """Why the file at `path` is not this one, in words; None if it is, as far as it was looked at."""
        return problem_of_file(path, self.bytes, self.sha256 if digest else None)


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What tensors may be written in -> its name in a safetensors file."""


def write_tensors(
    file: BinaryIO,
    layout: list[tuple[str, tuple[int, ...]]],
    values: Iterable[Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> FileRecord:
    """Write tensors as safetensors, one at a time. `values` come in the order of `layout`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, shape in layout:
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    for chunk in _chunks([struct.pack("<Q", len(text)), text], values, dtype):
        file.write(chunk)
        digest.update(chunk)
        written += len(chunk)
    assert written == 8 + len(text) + end
    return FileRecord(written, digest.hexdigest())


def _chunks(head: list[bytes], values: Iterable[Tensor], dtype: torch.dtype) -> Iterator[memoryview]:
    yield from (memoryview(part) for part in head)
    for value in values:
        array: Any = value.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
        whole = memoryview(array)
        for start in range(0, len(whole), _BLOCK_BYTES):
            yield whole[start : start + _BLOCK_BYTES]
