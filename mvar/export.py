"""`mvar export`: weights of a run, for others: as safetensors, in the published layout, or as a whole hub folder.

Reads any checkpoint (of any ZeRO stage and number of ranks), export or published file, one parameter at a time: memory
need not hold the model. What is written is complete or absent.

    --out NAME.safetensors    one file
    --out NAME                a folder: model.safetensors, or above --shard-gb several files and
                              model.safetensors.index.json, which says in which one each parameter is
    --out NAME.pth            the published layout (--to published)
    --to hub DIR              a folder with the tokenizer, configuration, model card: what `from_pretrained` reads
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvar.checkpoint.partition import EMA, WEIGHT
from mvar.checkpoint.published import published_state_dict, write_published
from mvar.checkpoint.sharding import DTYPES, GB, write_safetensors
from mvar.checkpoint.weights import Weights, open_weights
from mvar.cli import run_command
from mvar.errors import MvarError
from mvar.files.disk import cannot_write
from mvar.hub.folder import write_hub
from mvar.hub.objects import require_free
from mvar.model.transformer import MVAR
from mvar.sampling.sharing import add_hub_options, hub_model
from mvar.tokenizer.files import load_tokenizer


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
    parser.add_argument("--to", choices=["safetensors", "published", "hub"], default="safetensors", help="layout")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="precision of what is written")
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest file, 10^9 bytes (default 5)"
    )
    parser.add_argument("--out", type=Path, help="file or folder to write")
    parser.add_argument("place", type=Path, nargs="?", metavar="DIR", help="the same, without --out")
    parser.add_argument("--tokenizer", type=Path, help="with --to hub: file of the tokenizer that made the codes")
    add_hub_options(parser)
    args = parser.parse_args(argv)
    if (args.out is None) == (args.place is None):
        raise MvarError("--out: required, once. Name the file or folder to write.")
    args.out = args.out or args.place
    if args.to == "hub":
        _check_hub(args)
    elif (args.out.suffix == ".pth") != (args.to == "published"):
        expected = "a name that ends in .pth" if args.to == "published" else "NAME.safetensors, or a folder"
        raise MvarError(f"--out {args.out}: --to {args.to} writes {expected}.")
    for name in ("tokenizer", "license", "figures", "grid", "class_names"):
        if args.to != "hub" and getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise MvarError(f"--{flag}: --to {args.to} writes the model's weights alone. Use --to hub.")
    if args.to == "published" and args.dtype != "fp32":
        raise MvarError(f"--dtype {args.dtype}: the published layout is fp32.")
    if not args.shard_gb > 0:
        raise MvarError(f"--shard-gb {args.shard_gb:g}: expected more than 0.")
    return args


def _check_hub(args: argparse.Namespace) -> None:
    if args.tokenizer is None:
        raise MvarError("--to hub: --tokenizer is missing, the file of the tokenizer that made the codes.")
    if args.out.suffix in (".pth", ".safetensors"):
        raise MvarError(f"--out {args.out}: --to hub writes a folder, such as {args.out.with_suffix('')}.")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    weights = open_weights(args.weights, step=args.step, kind=EMA if args.ema else WEIGHT)
    shard_bytes = round(args.shard_gb * GB)
    if args.to == "published":
        export_published(args.out, weights)
        files = [args.out]
    elif args.to == "hub":
        require_free(args.out)
        model = hub_model(args, weights, load_tokenizer(args.tokenizer))
        files = write_hub(args.out, model, dtype=DTYPES[args.dtype], shard_bytes=shard_bytes)
    else:
        files = write_safetensors(args.out, weights, dtype=DTYPES[args.dtype], shard_bytes=shard_bytes)
    size = sum(file.stat().st_size for file in files) / 2**20
    print(f"wrote {args.out} ({'1 file' if len(files) == 1 else f'{len(files)} files'}, {size:.1f} MiB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
