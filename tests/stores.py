"""Small stores and image folders for tests."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.finalize import finalize
from data_prep.job import SplitPlan, TokenizeJob, pin, quantizer_bytes
from data_prep.shards import shard_writer
from mvar.data.manifest import QUANTIZER, FileInfo, SourceInfo, TokenizerInfo
from mvar.tokenizer.files import save_tokenizer
from mvar.tokenizer.vqvae import VQVAE

PATCH_NUMS = (1, 2, 4)
TOKENS = 21
VOCAB = 64
LATENT = 8
SIZE_PX = 16


def tiny_vqvae(seed: int = 0) -> VQVAE:
    """A tokenizer of 16 px pictures with random weights whose codes vary."""
    torch.manual_seed(seed)
    vqvae = VQVAE(
        channels=32,
        latent_channels=LATENT,
        vocab_size=VOCAB,
        patch_nums=PATCH_NUMS,
        channel_mult=(1, 1, 1),
        res_blocks=1,
    )
    with torch.no_grad():
        features = vqvae.features(torch.rand(8, 3, SIZE_PX, SIZE_PX) * 2 - 1)
        words = features.permute(0, 2, 3, 1).reshape(-1, LATENT)[:VOCAB]
        vqvae.quantizer.embedding.weight.copy_(words)
    return vqvae.eval()


def tiny_tokenizer(path: Path, seed: int = 0) -> Path:
    save_tokenizer(path, tiny_vqvae(seed))
    return path


def image_folder(root: Path, *, classes: int = 3, per_class: int = 8) -> Path:
    """Noise of several sizes in class folders class0, class1, ..."""
    rng = np.random.default_rng(5)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            height, width = rng.integers(14, 40, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def synthetic_codes(split: str, place: int, views: int, tokens: int = TOKENS, vocab: int = VOCAB) -> np.ndarray:
    """The codes that `synthetic_store` puts at a place: uint16 (views, tokens)."""
    rng = np.random.default_rng([place, split == "val"])
    return rng.integers(0, vocab, (views, tokens)).astype(np.uint16)


def synthetic_store(
    folder: Path,
    *,
    train: int = 23,
    val: int = 5,
    views: int = 3,
    classes: int = 4,
    shard_samples: int = 5,
    vqvae: VQVAE | None = None,
) -> Path:
    """A complete store of random codes; sample i of a split has label i mod classes."""
    vqvae = vqvae or tiny_vqvae()
    quantizer = quantizer_bytes(vqvae)
    tokens = sum(side * side for side in vqvae.patch_nums)
    job = TokenizeJob(
        tokenizer=TokenizerInfo(sha256="0" * 64, geometry=vqvae.geometry),
        quantizer=FileInfo(name=QUANTIZER, bytes=len(quantizer), sha256=hashlib.sha256(quantizer).hexdigest()),
        source=SourceInfo(kind="synthetic", images=train + val, bytes=0, sha256="0" * 64),
        classes=tuple(f"class{label}" for label in range(classes)),
        transform={"size": vqvae.image_size, "resize_shorter_side": 18, "filter": "lanczos", "views": []},
        encoding={"precision": "fp32"},
        shard_samples=shard_samples,
        splits={
            "train": SplitPlan(samples=train, views=tuple(f"crop{view}" for view in range(views))),
            "val": SplitPlan(samples=val, views=("center",)),
        },
    )
    pin(folder, job, quantizer)
    for shard in job.shards():
        count = len(job.splits[shard.split].views)
        with shard_writer(folder, shard.name, job.sha256) as writer:
            for place in range(shard.first, shard.first + shard.samples):
                codes = synthetic_codes(shard.split, place, count, tokens, vqvae.vocab_size)
                writer.add(f"{shard.split}/{place}", codes, place % classes)
    finalize(folder)
    return folder
