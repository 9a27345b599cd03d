"""Small code stores made of nothing, for tests of whoever reads them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch

from data_prep.shards import read_shard, shard_writer
from mvar.data.manifest import (
    INDEX,
    MANIFEST,
    QUANTIZER,
    FileInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    TokenizerInfo,
)
from mvar.data.store import IndexTable, write_index
from mvar.files.disk import sha256_of
from mvar.scales import ScalePyramid
from mvar.tokenizer.files import save_quantizer, save_tokenizer
from mvar.tokenizer.vqvae import VQVAE


def make_store(
    folder: Path,
    *,
    train: int = 50,
    val: int = 10,
    classes: int = 3,
    views: int = 2,
    patch_nums: tuple[int, ...] = (1, 2, 3),
    vocab: int = 32,
    latent: int = 8,
    seed: int = 0,
) -> Path:
    """A store of `train` and `val` samples whose codes lean towards a few words of their class, so there is something
    to learn. The tokenizer it claims is saved beside it as `tokenizer.safetensors`. Returns its folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    vqvae = VQVAE(8, latent, vocab, patch_nums, channel_mult=(1, 1), res_blocks=1)
    save_tokenizer(folder / "tokenizer.safetensors", vqvae)
    save_quantizer(folder / QUANTIZER, vqvae.quantizer)
    rng = np.random.default_rng(seed)
    tokens = ScalePyramid(patch_nums).total
    tables, splits = {}, {}
    for split, count in (("train", train), ("val", val)):
        labels = np.arange(count, dtype=np.int32) % classes
        name = f"{split}-000000.tar"
        with shard_writer(folder, name, "test") as writer:
            for number, label in enumerate(labels):
                any_word = rng.integers(0, vocab, (views, tokens))
                own_word = (3 * label + np.arange(tokens) % 3) % vocab
                codes_VL = np.where(rng.random((views, tokens)) < 0.7, own_word, any_word).astype(np.uint16)
                writer.add(f"{split}{number:05d}", codes_VL, int(label))
        table = read_shard(folder / name, views, tokens)
        tables[split] = IndexTable(shard_N=np.zeros(count, np.int32), offset_N=table.offset_N, label_N=table.label_N)
        shard = ShardInfo(**_info(folder, name), samples=count)
        splits[split] = SplitInfo(samples=count, views=tuple(f"v{v}" for v in range(views)), shards=(shard,))
    index = io.BytesIO()
    write_index(index, tables)
    (folder / INDEX).write_bytes(index.getvalue())
    manifest = Manifest(
        patch_nums=patch_nums,
        vocab_size=vocab,
        latent_channels=latent,
        classes=tuple(f"class{number}" for number in range(classes)),
        tokenizer=TokenizerInfo(sha256=sha256_of(folder / "tokenizer.safetensors"), geometry=vqvae.geometry),
        source=SourceInfo(kind="test", images=train + val, bytes=0, sha256=hashlib.sha256(b"").hexdigest()),
        transform={},
        encoding={},
        statistics={},
        job_sha256="test",
        index=FileInfo(**_info(folder, INDEX)),
        quantizer=FileInfo(**_info(folder, QUANTIZER)),
        splits=splits,
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return folder


def _info(folder: Path, name: str) -> dict[str, object]:
    path = folder / name
    return {"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
