"""`mvar evaluate-model`: loss, bits a token and accuracy of a model on a whole split of a code store, by scale.

    mvar evaluate-model --weights runs/d16 --store codes                               one process
    torchrun --nproc-per-node 8 -m mvar.evaluate_model --weights runs/d16 --store codes      one process per GPU

Batches are the same whoever computes them, and their sums are added in one order: the figures are the same bits for any
number of processes (on CPUs: with equally many --threads).

Legend: B images of a batch, L tokens, S scales, N batches.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mvar.cgroups import cores
from mvar.checkpoint.fingerprint import fingerprint
from mvar.checkpoint.partition import EMA, WEIGHT
from mvar.checkpoint.weights import open_weights
from mvar.cli import run_command
from mvar.data.store import CodeStore, Split
from mvar.errors import EXIT_FINISHED, CheckpointError, ConfigError, StoreError
from mvar.files.disk import write_text
from mvar.log import log
from mvar.model.transformer import MVAR
from mvar.run import world as worlds
from mvar.run.command import run_training
from mvar.run.world import World
from mvar.sampling.precision import DTYPES, PRECISIONS, SamplePrecision, arithmetic, choose
from mvar.training.objective import Objective
from mvar.version import __version__


def load_model(args: argparse.Namespace, store: CodeStore, device: torch.device) -> tuple[MVAR, str]:
    """The model, checked against the store, and the digest of its weights. Raises MvarError."""
    weights = open_weights(args.weights, step=args.step, kind=EMA if args.ema else WEIGHT)
    config = weights.config
    if config.num_classes is None:
        raise ConfigError(f"--weights {args.weights}: its configuration has no number of classes.")
    if config.num_classes < len(store.manifest.classes):
        raise StoreError(
            f"--store {args.store} has {len(store.manifest.classes)} classes, the model {config.num_classes}. Give the "
            "store that it was trained on, or one of the same classes."
        )
    with torch.device("meta"):
        model = MVAR.from_config(config, num_classes=config.num_classes)
    store.require_geometry(config.patch_nums, config.vocab_size, config.latent_channels)
    state = {name: weights.read(name) for name in weights.shapes}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"--weights {args.weights}: not the weights of the model it describes. {error}") from None
    digest = fingerprint(state)
    precision = cast(SamplePrecision, choose(args.precision, device, weights.precision).way)
    arithmetic(precision, device).apply()
    return model.store_matmuls_(DTYPES[precision]).to(device).eval(), digest


@torch.no_grad()
def losses(model: MVAR, objective: Objective, split: Split, batch: int, world: World) -> torch.Tensor:
    """Sums over all images of cross entropy and of right words, by scale: (2, S) float64, equal on all ranks."""
    scales, count = objective.pyramid.num_scales, len(split)
    sums_N2S = torch.zeros(math.ceil(count / batch), 2, scales, dtype=torch.float64)
    for number in range(world.rank, len(sums_N2S), world.size):
        indices_B = np.arange(number * batch, min((number + 1) * batch, count), dtype=np.int64)
        codes_BL = torch.from_numpy(split.codes(indices_B, np.zeros_like(indices_B)).astype(np.int64))
        found = objective(model, codes_BL, torch.from_numpy(split.labels_N[indices_B]))
        sums_N2S[number] = torch.stack([found.loss_BS.sum(dim=0), found.correct_BS.sum(dim=0)]).cpu()
    # Every number is one rank's and zero elsewhere: this sum rounds nothing.
    return world.sum(sums_N2S).cpu().sum(dim=0)


def figures_of(sums_2S: torch.Tensor, images: int, lengths: Sequence[int]) -> dict[str, float]:
    """Means over tokens; by scale: `loss_scale_1`, ..."""
    tokens_S = images * torch.tensor(lengths, dtype=torch.float64)
    loss_S, accuracy_S = sums_2S / tokens_S
    loss, accuracy = (float(value) for value in sums_2S.sum(dim=1) / tokens_S.sum())
    figures = {"loss": loss, "bits_per_token": loss / math.log(2), "accuracy": accuracy}
    for name, values_S in (("loss", loss_S), ("accuracy", accuracy_S)):
        figures |= {f"{name}_scale_{scale}": float(value) for scale, value in enumerate(values_S, start=1)}
    return figures


def table(figures: dict[str, float], lengths: Sequence[int]) -> str:
    """For people."""
    lines = [f"{'scale':>8}{'tokens':>9}{'loss':>10}{'bits/token':>12}{'accuracy':>11}"]
    for scale, tokens in enumerate(lengths, start=1):
        loss, accuracy = figures[f"loss_scale_{scale}"], figures[f"accuracy_scale_{scale}"]
        lines.append(f"{scale:>8}{tokens:>9,}{loss:>10.4f}{loss / math.log(2):>12.4f}{accuracy:>11.2%}")
    loss, bits, accuracy = (figures[name] for name in ("loss", "bits_per_token", "accuracy"))
    return "\n".join([*lines, f"{'all':>8}{sum(lengths):>9,}{loss:>10.4f}{bits:>12.4f}{accuracy:>11.2%}"])


def evaluate_model(args: argparse.Namespace, world: World) -> int:
    """All ranks together."""
    torch.set_num_threads(args.threads or max(1, cores() // world.place.local_size))

    def load() -> tuple[CodeStore, Split, MVAR, str]:
        store = CodeStore.open(args.store, verify=False)
        split = store.split(args.split)
        if len(split) == 0:
            raise StoreError(
                f"--store {args.store}: split {args.split} is empty. Tokenize with val_fraction, or a val/."
            )
        return store, split, *load_model(args, store, world.device)

    store, split, model, digest = world.together(load)
    log.info("%s images of %s, %d processes", f"{len(split):,}", args.split, world.size)
    objective = Objective(store.quantizer(), world.device)
    lengths = objective.pyramid.lengths
    figures = figures_of(losses(model, objective, split, args.batch, world), len(split), lengths)
    if world.is_main:
        print(table(figures, lengths))
        print(f"{len(split):,} images of {args.split}; weights {digest[:12]}, store {store.manifest.job_sha256[:12]}")
        write_json(args, figures, context(args, store, split, digest, world))
    return EXIT_FINISHED


def context(args: argparse.Namespace, store: CodeStore, split: Split, digest: str, world: World) -> dict[str, Any]:
    """How the figures were made."""
    return {
        "weights": str(args.weights),
        "weights_sha256": digest,
        "ema": args.ema,
        "store": str(args.store),
        "store_job_sha256": store.manifest.job_sha256,
        "tokenizer_sha256": store.manifest.tokenizer.sha256,
        "split": args.split,
        "images": len(split),
        "patch_nums": list(store.manifest.patch_nums),
        "view": "first",
        "batch": args.batch,
        "precision": args.precision,
        "processes": world.size,
        "device": str(world.device),
        "versions": {"mvar": __version__, "torch": torch.__version__},
    }


def write_json(args: argparse.Namespace, figures: dict[str, float], made: dict[str, Any]) -> None:
    """Where --json says. Raises WriteError."""
    if args.json is not None:
        payload = {"name": "evaluate-model", "figures": figures, "goals": {}, "context": made}
        write_text(args.json, json.dumps(payload, indent=1) + "\n")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar evaluate-model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="run folder, checkpoint folder, .safetensors or published .pth")
    add("--step", type=int, help="which checkpoint of a run (default: the newest that verifies)")
    add("--ema", action="store_true", help="the moving average of the weights")
    add("--store", type=Path, required=True, help="code store")
    add("--split", choices=("train", "val"), default="val", help="default val; of train each image's first view")
    add(
        "--batch",
        type=int,
        default=32,
        help="images computed at once; part of what the last bits depend on (default 32)",
    )
    add("--precision", choices=("auto", *PRECISIONS), default="fp32", help="arithmetic (default fp32, without TF32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: GPUs where there are any")
    add("--threads", type=int, help="CPU threads of each process (default: its share of the cores)")
    add("--json", type=Path, help="write the figures, and how they were made, here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)

    def prepare() -> argparse.Namespace:
        if args.batch < 1 or (args.threads is not None and args.threads < 1):
            raise ConfigError("--batch and --threads: expected whole numbers from 1.")
        return args

    return run_training(prepare, lambda _: worlds.join(device=args.device), evaluate_model)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
