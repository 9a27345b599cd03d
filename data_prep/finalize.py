"""`mvar finalize`: shards -> a complete code store. Verifies every shard, then writes index and, last, manifest.

Legend: N samples, V views, L tokens, S scales, W words of the codebook.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.calibrate import Calibration
from data_prep.job import LAST_RUN, LastRun, ShardPlan, TokenizeJob
from data_prep.shards import is_complete, read_record, read_shard
from mvar.cgroups import cores
from mvar.cli import run_command
from mvar.data.manifest import INDEX, MANIFEST, FileInfo, Manifest, Quarantined, ShardInfo, SplitInfo, check_file
from mvar.data.store import CodeStore, IndexTable, write_index
from mvar.errors import StoreError
from mvar.files.disk import remove_stale, write_file
from mvar.run.claims import remove_claims
from mvar.run.tasks import array_list
from mvar.scales import ScalePyramid

I64 = NDArray[np.int64]


class CheckedShard(NamedTuple):
    """What a verified shard contributes. `counts_SW`: how often each scale uses each word."""

    plan: ShardPlan
    info: ShardInfo
    offset_N: I64
    label_N: NDArray[np.int32]
    counts_SW: I64
    quarantine: tuple[Quarantined, ...]
    suspicious: tuple[str, ...]


def finalize(folder: Path, tasks: int | None = None, workers: int | None = None) -> Manifest:
    """Verify all shards of the job in `folder` and complete the store; the same store gives the same bytes.

    `tasks`: the number of tasks to name those that have to run again by; default: as in the last run. Raises
    StoreError while a shard is missing, damaged, or another job's, and leaves the store incomplete.
    """
    job = TokenizeJob.read(folder)
    plans = job.shards()
    _refuse_strangers(folder, plans)
    check_file(folder, job.quantizer)
    pyramid = ScalePyramid(tuple(job.tokenizer.geometry["patch_nums"]))
    with ThreadPoolExecutor(workers or cores()) as pool:
        checked = list(pool.map(lambda plan: _check(folder, job, plan, pyramid), plans))
    unfinished = [plan for plan, shard in zip(plans, checked, strict=True) if shard is None]
    if unfinished:
        (folder / MANIFEST).unlink(missing_ok=True)
        raise StoreError(_explain_unfinished(folder, plans, unfinished, tasks))
    shards = [shard for shard in checked if shard is not None]
    _refuse_too_many_bad(folder, shards)
    manifest = _write(folder, job, shards, pyramid)
    remove_stale(folder, stale_after_s=0)
    remove_claims(folder)
    (folder / LAST_RUN).unlink(missing_ok=True)
    return manifest


def summary(manifest: Manifest, labels_N: I64 | None = None) -> str:
    """The facts of a store as a table; `labels_N`: training labels, for the samples of each class."""
    lines = []
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        views = "1 view" if len(split.views) == 1 else f"{len(split.views)} views"
        lines.append(
            f"{name:5}  {split.samples:>11,} images x {views:9} {len(split.shards):>6} shards  {size:>17,} bytes"
        )
        lines += [f"  left out: {bad.key} ({bad.reason})" for bad in split.quarantine[:10]]
        if len(split.quarantine) > 10:
            lines.append(f"  ... {len(split.quarantine)} images are left out; all are in the manifest")
    if labels_N is not None:
        counts = np.bincount(labels_N, minlength=len(manifest.classes))
        lines.append(
            f"{len(manifest.classes)} classes, training images in each: fewest {counts.min():,}, "
            f"median {int(np.median(counts)):,}, most {counts.max():,}"
        )
    if suspicious := manifest.statistics.get("suspicious"):
        lines.append(
            f"WARNING: {suspicious['images']:,} images are nearly black, or nearly of one colour, such as "
            f"{', '.join(suspicious['such_as'])}. Look at them: were they read as they should be (docs/tokenize.md)?"
        )
    lines.append(f"{manifest.tokens} tokens a view; of {manifest.vocab_size} words each scale uses:")
    lines.append("  scale   side  words used  entropy, bits a token")
    statistics = manifest.statistics
    for scale, side in enumerate(manifest.patch_nums):
        used, bits = statistics["words_used"][scale], statistics["entropy_bits"][scale]
        lines.append(f"  {scale:>5} {side:>6}  {used:>6} {used / manifest.vocab_size:>4.0%}  {bits:>8.2f}")
    return "\n".join(lines)


def _refuse_strangers(folder: Path, plans: list[ShardPlan]) -> None:
    strangers = sorted({path.name for path in folder.glob("*.tar")} - {plan.name for plan in plans})
    if strangers:
        raise StoreError(
            f"code store {folder}: {len(strangers)} shards are not of this job: {', '.join(strangers[:5])}. "
            "Remove them: readers that stream all tars of the folder would mix them in."
        )


def _refuse_too_many_bad(folder: Path, shards: list[CheckedShard]) -> None:
    """Tasks that ran at once may together have left out more images than each of them knew of."""
    bad = [entry for shard in shards for entry in shard.quarantine]
    last = LastRun.read(folder)
    if last is not None and len(bad) > last.skip_bad:
        listed = "\n  ".join(f"{entry.key} ({entry.reason})" for entry in bad[:20])
        (folder / MANIFEST).unlink(missing_ok=True)
        raise StoreError(
            f"code store {folder}: {len(bad)} damaged images were left out, --skip-bad {last.skip_bad} allows fewer:"
            f"\n  {listed}\nRun one tokenize task with --skip-bad {len(bad)} to accept that, or mend the images and "
            "tokenize into another store=..."
        )


def _check(folder: Path, job: TokenizeJob, plan: ShardPlan, pyramid: ScalePyramid) -> CheckedShard | None:
    """The shard's content; None where it has to be made again. Raises StoreError where it is another job's."""
    if not is_complete(folder, plan.name, job.sha256):
        return None
    record = read_record(folder, plan.name)
    assert record is not None, "is_complete has just read it"
    words = job.tokenizer.geometry["vocab_size"]
    table = read_shard(folder / plan.name, len(job.splits[plan.split].views), pyramid.total)
    codes_NVL, label_N = table.codes_NVL, table.label_N
    good = len(label_N) == record.samples == plan.samples - len(record.quarantine)
    good = good and bool((codes_NVL < words).all() and (label_N >= 0).all() and (label_N < len(job.classes)).all())
    if not good:
        raise StoreError(
            f"shard {folder / plan.name}: its samples, codes or labels are out of range (expected {plan.samples} "
            f"samples, codes below {words}, labels below {len(job.classes)}). Remove it and tokenize again."
        )
    counts_SW = np.stack(
        [
            np.bincount(codes_NVL[:, :, pyramid.segment(scale)].ravel(), minlength=words)
            for scale in range(pyramid.num_scales)
        ]
    )
    info = ShardInfo(name=record.name, samples=record.samples, bytes=record.bytes, sha256=record.sha256)
    return CheckedShard(plan, info, table.offset_N, label_N, counts_SW, record.quarantine, record.suspicious)


def _write(folder: Path, job: TokenizeJob, shards: list[CheckedShard], pyramid: ScalePyramid) -> Manifest:
    tables, splits = {}, {}
    for split, plan in job.splits.items():
        everywhere = [shard for shard in shards if shard.plan.split == split]
        own = [shard for shard in everywhere if shard.info.samples]
        counts = [shard.info.samples for shard in own]
        tables[split] = IndexTable(
            shard_N=np.repeat(np.arange(len(own), dtype=np.int32), counts),
            offset_N=np.concatenate([np.empty(0, np.int64), *(shard.offset_N for shard in own)]),
            label_N=np.concatenate([np.empty(0, np.int32), *(shard.label_N for shard in own)]),
        )
        splits[split] = SplitInfo(
            samples=sum(counts),
            views=plan.views,
            shards=tuple(shard.info for shard in own),
            quarantine=tuple(entry for shard in everywhere for entry in shard.quarantine),
        )
    if not splits["train"].samples:
        raise StoreError(f"code store {folder}: all training images are damaged and were left out. Mend the source.")
    index = io.BytesIO()
    write_index(index, tables)
    geometry = job.tokenizer.geometry
    manifest = Manifest(
        patch_nums=pyramid.patch_nums,
        vocab_size=geometry["vocab_size"],
        latent_channels=geometry["latent_channels"],
        classes=job.classes,
        tokenizer=job.tokenizer,
        source=job.source,
        transform={"orientation": "stored"} | job.transform,  # Jobs name it only where it is another.
        encoding=job.encoding | _calibration(folder, job),
        job_sha256=job.sha256,
        statistics=_statistics(shards),
        index=FileInfo(name=INDEX, bytes=len(index.getvalue()), sha256=hashlib.sha256(index.getvalue()).hexdigest()),
        quantizer=job.quantizer,
        splits=splits,
    )
    # An old manifest must not vouch for a new index.
    if not (folder / INDEX).exists() or (folder / INDEX).read_bytes() != index.getvalue():
        (folder / MANIFEST).unlink(missing_ok=True)
        write_file(folder / INDEX, index.getvalue())
    write_file(folder / MANIFEST, manifest.to_json())
    return manifest


def _calibration(folder: Path, job: TokenizeJob) -> dict[str, Any]:
    """What a fast mode costs in codes, where the job used one."""
    found = Calibration.read(folder, job.sha256)
    return {} if found is None else {"calibration": found.model_dump(mode="json")}


def _statistics(shards: list[CheckedShard]) -> dict[str, Any]:
    """Words used and entropy of the codes of each scale, over the training views."""
    counts_SW = sum((shard.counts_SW for shard in shards if shard.plan.split == "train"), np.zeros((1, 1), np.int64))
    share_SW = counts_SW / counts_SW.sum(axis=1, keepdims=True)
    bits_SW = -share_SW * np.log2(np.where(share_SW > 0, share_SW, 1))
    return {
        "words_used": [int(used) for used in (counts_SW > 0).sum(axis=1)],
        "entropy_bits": [round(float(bits), 4) for bits in bits_SW.sum(axis=1)],
    } | _suspicious(shards)


def _suspicious(shards: list[CheckedShard]) -> dict[str, Any]:
    """How many images look wrong, and some of their keys."""
    keys = [key for shard in shards for key in shard.suspicious]
    return {"suspicious": {"images": len(keys), "such_as": keys[:5]}} if keys else {}


def _explain_unfinished(folder: Path, plans: list[ShardPlan], unfinished: list[ShardPlan], tasks: int | None) -> str:
    if tasks is None:
        last = LastRun.read(folder)
        tasks = len(plans) if last is None else last.tasks
    names = ", ".join([*(plan.name for plan in unfinished[:10]), *(["..."] if len(unfinished) > 10 else [])])
    numbers = array_list({plan.number % tasks for plan in unfinished})
    return (
        f"code store {folder}: {len(unfinished)} of {len(plans)} shards are missing or damaged: {names}. "
        f"Run these tasks again, then finalize: --array={numbers} (with --tasks {tasks})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`mvar finalize STORE`."""
    parser = argparse.ArgumentParser(prog="mvar finalize", description="Verify all shards and complete the store.")
    parser.add_argument("store", type=Path, help="folder that `mvar tokenize` wrote as store=...")
    parser.add_argument("--tasks", type=int, help="tasks of the array job, to name those to run again")
    parser.add_argument("--workers", type=int, help="shards verified at once; default: all cores")
    args = parser.parse_args(argv)
    manifest = finalize(args.store, args.tasks, args.workers)
    print(summary(manifest, CodeStore.open(args.store).split("train").labels_N))
    print(f"complete: {args.store / MANIFEST}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
