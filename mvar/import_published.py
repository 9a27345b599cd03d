"""`mvar import-published`: the published weights as a hub folder, after a check of every name and shape.

    mvar import-published --model d16.pth --tokenizer vae_ch160v4096z32.pth --out models/d16

Depth, L2-normalised attention and scales are read off the files. Nothing but tensors is unpickled. What is written is
complete or absent; `mvar sample --weights DIR`, `mvar export` and `MVARPipeline.from_pretrained` read it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mvar.checkpoint.published import read_published
from mvar.checkpoint.sharding import DTYPES, GB, SHARD_BYTES
from mvar.checkpoint.tensors import FileRecord
from mvar.checkpoint.weights import PUBLISHED_PRECISION, Weights
from mvar.cli import run_command
from mvar.config import ModelConfig
from mvar.errors import CheckpointError, MvarError
from mvar.files.disk import sha256_of
from mvar.hub.folder import HubModel, write_hub
from mvar.hub.objects import require_free
from mvar.log import log
from mvar.sampling.options import DEFAULTS
from mvar.sampling.sharing import add_hub_options, hub_model
from mvar.scales import PATCH_NUMS_256
from mvar.tokenizer.files import load_tokenizer


@dataclass(frozen=True)
class PaperFigures:
    """ImageNet 256 px, 50,000 images (arXiv 2411.10433); and whether the published file's attention normalises."""

    fid: float
    inception_score: float
    precision: float
    recall: float
    l2_norm: bool

    def __str__(self) -> str:
        return f"FID {self.fid}, IS {self.inception_score}, precision {self.precision}, recall {self.recall}"


PAPER = {
    12: PaperFigures(4.19, 234.8, 0.83, 0.48, l2_norm=True),
    16: PaperFigures(3.07, 294.6, 0.84, 0.53, l2_norm=False),
    20: PaperFigures(2.41, 308.4, 0.85, 0.58, l2_norm=False),
    24: PaperFigures(1.93, 320.7, 0.83, 0.59, l2_norm=True),
    32: PaperFigures(1.78, 331.2, 0.83, 0.61, l2_norm=True),
}
IMAGENET_CLASSES = 1000


def published_weights(path: Path) -> Weights:
    """Checked names, shapes and values, mapped from the file. Raises CheckpointError."""
    config, state = read_published(path)
    for name, value in state.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds values that are not finite. Download it again.")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return Weights(path, config, shapes, lambda name: state[name], PUBLISHED_PRECISION)


def paper_of(config: ModelConfig) -> PaperFigures | None:
    """What was published of that model, if it is one of those."""
    of_paper = config.num_classes == IMAGENET_CLASSES and config.patch_nums == PATCH_NUMS_256
    usual = config.resolved_width == 64 * config.depth
    return PAPER.get(config.depth) if of_paper and usual else None


def told(model: HubModel, files: int) -> str:
    """What was recognised, and how the paper draws from it."""
    config = model.weights.config
    paper = paper_of(config)
    norm = "on" if config.attn_l2_norm else "off"
    if paper is not None and paper.l2_norm != config.attn_l2_norm:
        norm += f" (the published file of depth {config.depth} has it {'on' if paper.l2_norm else 'off'})"
    options = f"--cfg {DEFAULTS.cfg} --top-k {DEFAULTS.top_k} --top-p {DEFAULTS.top_p}, no smoothing"
    rows = {
        "depth": f"{config.depth}, width {config.resolved_width}, {config.resolved_heads} heads",
        "L2-norm": norm,
        "scales": f"{', '.join(map(str, config.patch_nums))}: {model.tokenizer.image_size} px",
        "classes": f"{config.num_classes}",
        "checked": f"{len(model.weights.shapes)} parameters and the tokenizer, names and shapes",
        "paper": f"{options}; {'no figures of this model' if paper is None else f'published: {paper}'}",
    }
    rows |= {file: f"{record.bytes:,} bytes, sha256 {record.sha256}" for file, record in model.source.items()}
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in rows.items()) + f"\n{files} files written"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mvar import-published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="published weights, such as d16.pth")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer, such as vae_ch160v4096z32.pth")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="precision of what is written")
    add_hub_options(parser)
    return parser.parse_args(argv)


def record_of(path: Path) -> FileRecord:
    """Raises MvarError."""
    try:
        return FileRecord(path.stat().st_size, sha256_of(path))
    except OSError as error:
        raise MvarError(f"{path}: cannot be read ({error.strerror}). Give an existing file.") from None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    require_free(args.out)
    source = {path.name: record_of(path) for path in (args.model, args.tokenizer)}
    weights = published_weights(args.model)
    # A published tokenizer does not say its scales; the model does.
    tokenizer = load_tokenizer(args.tokenizer, {"patch_nums": list(weights.config.patch_nums)})
    model = hub_model(args, weights, tokenizer, source=source)
    files = write_hub(args.out, model, dtype=DTYPES[args.dtype], shard_bytes=SHARD_BYTES)
    print(told(model, len(files)))
    log.info("wrote %s, %.2f GB", args.out, sum(file.stat().st_size for file in files) / GB)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
