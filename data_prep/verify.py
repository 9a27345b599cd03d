"""`mvar verify`: is this code store whole? Digests, index against tars, labels, codes; pictures to look at.

Everything is checked the way a stranger would: the tars are walked with Python's tarfile, not with what wrote them.

Legend: N samples, V views, L tokens, S scales.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.job import TokenizeConfig
from data_prep.origin import Origin
from mvar.cli import run_command
from mvar.data.manifest import ShardInfo, check_file
from mvar.data.store import CODES_SUFFIX, LABEL_SUFFIX, CodeStore, Split
from mvar.errors import MvarError, StoreError
from mvar.files.disk import sha256_of, write_text
from mvar.images.arrays import Bytes, grid, save_png, to_uint8
from mvar.randomness import permuted
from mvar.settings import load
from mvar.tokenizer.files import load_tokenizer


def verify(folder: Path) -> dict[str, int]:
    """Check everything in a store; returns what was counted. Raises StoreError that lists all that is wrong."""
    store = CodeStore.open(folder)
    problems: list[str] = []
    samples = 0
    for name, info in store.manifest.splits.items():
        first = 0
        for shard in info.shards:
            problems += _problems(store, store.split(name), shard, first)
            first += shard.samples
        samples += first
    try:
        store.quantizer()
    except MvarError as error:
        problems.append(str(error))
    if problems:
        shown = problems if len(problems) <= 20 else [*problems[:20], f"... and {len(problems) - 20} more"]
        listed = "\n  ".join(shown)
        raise StoreError(
            f"code store {folder}: {len(problems)} problems:\n  {listed}\n"
            f"Run the tokenize command again (it re-makes damaged shards), then mvar finalize {folder}."
        )
    return {"samples": samples, "shards": sum(len(info.shards) for info in store.manifest.splits.values())}


def contact_sheet(
    folder: Path, tokenizer: Path, samples: int = 8, seed: int = 0, origin: Origin | None = None
) -> Bytes:
    """Random samples decoded: a row for each sample, a column for the picture of scales 0..k; uint8 (H, W, 3).

    With `origin` the first column is the original. Raises StoreError unless `tokenizer` is the file that made the
    store.
    """
    store = CodeStore.open(folder)
    found, made_by = sha256_of(tokenizer), store.manifest.tokenizer.sha256
    if found != made_by:
        raise StoreError(
            f"tokenizer {tokenizer}: not the one that made code store {folder} (sha256 {found[:12]}..., expected "
            f"{made_by[:12]}...). Give the tokenizer's file that the store was made with."
        )
    vqvae = load_tokenizer(tokenizer, {"patch_nums": list(store.manifest.patch_nums)})
    split = store.split("train")
    chosen_N = some_samples(split, samples, seed)
    views_N = chosen_N % split.views
    codes_NL = torch.from_numpy(split.codes(chosen_N, views_N).astype(np.int64))
    with torch.inference_mode():
        columns = [
            to_uint8(vqvae.decode_latent(vqvae.quantizer.latent_from_codes(codes_NL, k + 1)))
            for k in range(len(store.manifest.patch_nums))
        ]
    if origin is not None:
        columns.insert(0, origin.views(split, chosen_N)[np.arange(len(chosen_N)), views_N])
    pictures_NCHWC = np.stack(columns, axis=1)
    return grid(pictures_NCHWC.reshape(-1, *pictures_NCHWC.shape[2:]), columns=len(columns))


def some_samples(split: Split, count: int, seed: int = 0) -> NDArray[np.int64]:
    """At most `count` samples of a split, picked by `seed`."""
    return permuted(seed, 0, np.arange(min(count, len(split))), len(split))


def _problems(store: CodeStore, split: Split, shard: ShardInfo, first: int) -> Iterator[str]:
    """What is wrong with one shard, whose samples are [first, first + samples) of the split."""
    try:
        check_file(store.folder, shard)
        walked = _walk(store.folder / shard.name)
        keys = set()
        for place in range(first, first + shard.samples):
            key, codes_VL, label = next(walked)
            here = f"shard {store.folder / shard.name}, sample {key}"
            views_V = np.arange(split.views)
            if key in keys:
                yield f"{here}: the key is there twice"
            keys.add(key)
            if label != split.labels_N[place]:
                yield f"{here}: label {label}, the index says {split.labels_N[place]}"
            if codes_VL.max() >= store.manifest.vocab_size:
                yield f"{here}: code {codes_VL.max()}, expected below {store.manifest.vocab_size}"
            if not np.array_equal(split.codes(np.full_like(views_V, place), views_V), codes_VL):
                yield f"{here}: the codes are not where the index says"
        if next(walked, None) is not None:
            yield f"shard {store.folder / shard.name}: more than {shard.samples} samples"
    except MvarError as error:
        yield str(error)
    except (tarfile.TarError, StopIteration, ValueError) as error:
        yield f"shard {store.folder / shard.name}: cannot be walked as a tar of samples ({error!r})"


def _walk(path: Path) -> Iterator[tuple[str, NDArray[np.uint16], int]]:
    """(key, codes (V, L), label) of each sample of a tar."""
    with tarfile.open(path, "r:") as tar:
        while (codes := tar.next()) is not None:
            label = tar.next()
            key = codes.name.removesuffix(CODES_SUFFIX)
            if label is None or codes.name == key or label.name != key + LABEL_SUFFIX:
                raise ValueError(f"member {codes.name} is not followed by its label")
            yield key, np.load(io.BytesIO(_data(tar, codes)), allow_pickle=False), int(_data(tar, label))


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"member {member.name} is not a file")
    return file.read()


def main(argv: Sequence[str] | None = None) -> int:
    """`mvar verify STORE [--tokenizer FILE --sheet PNG] [--config FILE source=... key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="mvar verify",
        description="Check a code store; exit code 2 if it is damaged. With the configuration that it was tokenized "
        "with, originals stand on the sheet and some images are encoded again.",
    )
    parser.add_argument("store", type=Path, help="folder of the code store")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer that made it: decode random samples")
    parser.add_argument("--sheet", type=Path, help="where their pictures go; default: STORE-sheet.png beside the store")
    parser.add_argument("--samples", type=int, default=8, help="rows of the sheet")
    parser.add_argument("--reencode", type=int, default=16, metavar="N", help="images of each split encoded again")
    parser.add_argument("--json", type=Path, help="write what was found as JSON")
    parser.add_argument("--config", type=Path, help="YAML file that the store was tokenized with")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of `mvar tokenize`, such as source=...")
    args = parser.parse_intermixed_args(argv)
    figures: dict[str, float] = dict(verify(args.store))
    print(f"code store {args.store}: whole; {figures['samples']:,} samples in {figures['shards']:,} shards")
    origin, tokenizer = None, args.tokenizer
    if args.config is not None or args.overrides:
        given = [f"store={args.store}", *([] if tokenizer is None else [f"tokenizer={tokenizer}"])]
        origin = Origin.open(CodeStore.open(args.store), load(TokenizeConfig, args.config, [*given, *args.overrides]))
        tokenizer = origin.config.tokenizer
        figures |= _reencode(origin, args.reencode)
    if tokenizer is not None:
        sheet = args.sheet or args.store.with_name(f"{args.store.resolve().name}-sheet.png")
        save_png(sheet, contact_sheet(args.store, tokenizer, args.samples, origin=origin))
        first = "" if origin is None else "the original, then "
        print(f"one sample a row, {first}pictures of scales 0..k: {sheet}")
    if args.json is not None:
        write_text(args.json, json.dumps({"name": "verify", "figures": figures}, indent=1) + "\n")
    return 0


def _reencode(origin: Origin, count: int) -> dict[str, float]:
    """Encode some images of each split again; prints and returns the share of equal codes."""
    figures = {}
    for name in origin.store.manifest.splits:
        split = origin.store.split(name)
        if len(split) and count:
            shares_S = origin.agreement(split, some_samples(split, count, seed=1))
            print(f"{name}: {min(count, len(split))} images encoded again, equal codes by scale: ", end="")
            print("  ".join(f"{share:.1%}" for share in shares_S))
            figures[f"reencode_agreement_{name}"] = float(np.mean(shares_S))
    return figures


if __name__ == "__main__":
    raise SystemExit(run_command(main))
