"""Weights written as safetensors, one parameter at a time: one file, or several and an index of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mvar.checkpoint.tensors import write_tensors
from mvar.checkpoint.weights import MODEL_KEY, PRECISION_KEY, SHARD_INDEX, SINGLE_FILE, Weights
from mvar.errors import CheckpointError
from mvar.files.disk import synced, writing, writing_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GB = 10**9
SHARD_BYTES = 5 * GB
"""Largest file where nothing is asked for."""


def write_safetensors(
    out: Path, weights: Weights, *, dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write `weights` to a file, or to a folder of files of at most `shard_bytes` each, if one parameter fits in it.

    Returns the files. A folder that holds an export is replaced. Raises CheckpointError, WriteError.
    """
    if out.suffix == ".safetensors":
        shards = _cut(weights, dtype, shard_bytes)
        if len(shards) > 1:
            total = sum(_bytes(shape, dtype) for shape in weights.shapes.values())
            raise CheckpointError(
                f"--out {out}: the weights take {total / GB:.3g} GB, a file may have {shard_bytes / GB:g} (--shard-gb)."
                f" Name a folder ({out.with_suffix('')}) for several files, or raise --shard-gb."
            )
        with writing(out) as file:
            _write_one(file, weights, shards[0], dtype)
        return [out]
    if out.exists() and not (out / SHARD_INDEX).is_file() and not (out / SINGLE_FILE).is_file():
        raise CheckpointError(f"--out {out}: exists and is no export. Give another name, or remove it.")
    with writing_folder(out) as folder:
        names = write_shards(folder, weights, dtype=dtype, shard_bytes=shard_bytes)
    return [out / name for name in names]


def write_shards(folder: Path, weights: Weights, *, dtype: torch.dtype, shard_bytes: int) -> list[str]:
    """Write `weights` into a folder that gets its name later: one file, or several and their index.

    Returns the names of the files of tensors. Raises CheckpointError, OSError.
    """
    shards = _cut(weights, dtype, shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, parameters in zip(names, shards, strict=True):
        with synced(folder / name) as file:
            _write_one(file, weights, parameters, dtype)
    if len(shards) > 1:
        with synced(folder / SHARD_INDEX) as file:
            file.write(_index(weights, dict(zip(names, shards, strict=True)), dtype))
    return names


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _cut(weights: Weights, dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    """Parameters in their order, as many in a file as fit."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in weights.shapes.items():
        size = _bytes(shape, dtype)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_one(file: BinaryIO, weights: Weights, names: list[str], dtype: torch.dtype) -> None:
    layout = [(name, weights.shapes[name]) for name in names]
    metadata = {MODEL_KEY: weights.config.model_dump_json(), "format": "pt"}
    if weights.precision is not None:
        metadata[PRECISION_KEY] = weights.precision
    write_tensors(file, layout, (_cast(weights, name, dtype) for name in names), metadata, dtype)


def _cast(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    value = weights.read(name)
    if dtype == torch.float16 and value.numel():
        largest = float(value.abs().max())
        if torch.finfo(dtype).max < largest < math.inf:
            raise CheckpointError(f"{weights.path}: {name} has a value of {largest:.3g}, too large for fp16. Use bf16.")
    return value.to(dtype)


def _index(weights: Weights, shards: Mapping[str, list[str]], dtype: torch.dtype) -> bytes:
    total = sum(_bytes(shape, dtype) for shape in weights.shapes.values())
    places = {name: file for file, names in shards.items() for name in names}
    metadata = {"total_size": total, MODEL_KEY: weights.config.model_dump_json()}
    return json.dumps({"metadata": metadata, "weight_map": places}, indent=1).encode()
