"""`mvar export`: weights of a run, for other programs. `safetensors` is ours, `published` the reference layout.

Reads any checkpoint (of any ZeRO stage and number of ranks), export or published file, one parameter at a time: memory
need not hold the model. What is written is complete or absent.

    --out NAME.safetensors    one file
    --out NAME                a folder: model.safetensors, or above --shard-gb several files and
                              model.safetensors.index.json, which says in which one each parameter is
    --out NAME.pth            the published layout (--to published)
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mvar.checkpoint.partition import EMA, WEIGHT
from mvar.checkpoint.published import published_state_dict, write_published
from mvar.checkpoint.tensors import write_tensors
from mvar.checkpoint.weights import MODEL_KEY, PRECISION_KEY, SHARD_INDEX, SINGLE_FILE, Weights, open_weights
from mvar.cli import run_command
from mvar.errors import CheckpointError, MvarError
from mvar.files.disk import cannot_write, synced, writing, writing_folder
from mvar.model.transformer import MVAR

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GB = 10**9


def write_safetensors(
    out: Path, weights: Weights, *, dtype: torch.dtype = torch.float32, shard_bytes: int = 5 * GB
) -> list[Path]:
    """Write `weights` to a file, or to a folder of files of at most `shard_bytes` each, if one parameter fits in it.

    Returns the files. A folder that holds an export is replaced. Raises CheckpointError, WriteError.
    """
    shards = _cut(weights, dtype, shard_bytes)
    if out.suffix == ".safetensors":
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
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with writing_folder(out) as folder:
        for name, parameters in zip(names, shards, strict=True):
            with synced(folder / name) as file:
                _write_one(file, weights, parameters, dtype)
        if len(shards) > 1:
            with synced(folder / SHARD_INDEX) as file:
                file.write(_index(weights, dict(zip(names, shards, strict=True)), dtype))
    return [out / name for name in names]


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


def export_published(out: Path, weights: Weights) -> None:
    """Write the published layout. The parameters pass through a file beside `out`, from which they are mapped."""
    config = weights.config
    if config.num_classes is None:
        raise MvarError(f"{weights.path}: its configuration has no number of classes.")
    with torch.device("meta"):
        model = MVAR.from_config(config, num_classes=config.num_classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.{os.getpid()}.staged")
    try:
        model.load_state_dict(_staged(staged, weights), assign=True)
        write_published(out, published_state_dict(model))
    except OSError as error:
        raise cannot_write(out, error) from None
    finally:
        staged.unlink(missing_ok=True)


def _staged(path: Path, weights: Weights) -> dict[str, Tensor]:
    """All parameters, mapped from a file that they are written to one by one."""
    with path.open("wb") as file:
        for name in weights.shapes:
            weights.read(name).contiguous().numpy().tofile(file)
    state, offset = {}, 0
    for name, shape in weights.shapes.items():
        mapped = np.memmap(path, np.float32, "r+", offset, shape)
        state[name] = torch.from_numpy(mapped)
        offset += mapped.nbytes
    return state


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mvar export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", type=Path, required=True, help="run folder, checkpoint folder, export, or published .pth"
    )
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest that verifies)")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    parser.add_argument("--to", choices=["safetensors", "published"], default="safetensors", help="layout")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="precision of what is written")
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest file, 10^9 bytes (default 5)"
    )
    parser.add_argument("--out", type=Path, required=True, help="file or folder to write")
    args = parser.parse_args(argv)
    if (args.out.suffix == ".pth") != (args.to == "published"):
        expected = "a name that ends in .pth" if args.to == "published" else "NAME.safetensors, or a folder"
        raise MvarError(f"--out {args.out}: --to {args.to} writes {expected}.")
    if args.to == "published" and args.dtype != "fp32":
        raise MvarError(f"--dtype {args.dtype}: the published layout is fp32.")
    if not args.shard_gb > 0:
        raise MvarError(f"--shard-gb {args.shard_gb:g}: expected more than 0.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    weights = open_weights(args.weights, step=args.step, kind=EMA if args.ema else WEIGHT)
    if args.to == "published":
        export_published(args.out, weights)
        files = [args.out]
    else:
        shard_bytes = round(args.shard_gb * GB)
        files = write_safetensors(args.out, weights, dtype=DTYPES[args.dtype], shard_bytes=shard_bytes)
    size = sum(file.stat().st_size for file in files) / 2**20
    print(f"wrote {args.out} ({'1 file' if len(files) == 1 else f'{len(files)} files'}, {size:.1f} MiB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
