"""`mvar export`: weights of a run, for other programs. `safetensors` is ours, `published` the reference layout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mvar.cli import run_command
from mvar.errors import MvarError
from mvar.model.transformer import MVAR, published_state_dict
from mvar.published import write_published
from mvar.weights import load_weights, save_weights

SUFFIX = {"safetensors": ".safetensors", "published": ".pth"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mvar export", description=__doc__)
    parser.add_argument(
        "--weights", type=Path, required=True, help="run folder, checkpoint folder, .safetensors or .pth"
    )
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest that verifies)")
    parser.add_argument("--to", choices=sorted(SUFFIX), default="safetensors", help="layout (default safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    if args.out.suffix != SUFFIX[args.to]:
        raise MvarError(f"--out {args.out}: a {args.to} file must end in {SUFFIX[args.to]}.")

    config, state = load_weights(args.weights, step=args.step)
    if args.to == "safetensors":
        save_weights(args.out, config, state)
    else:
        if config.num_classes is None:
            raise MvarError(f"{args.weights}: its configuration has no number of classes.")
        model = MVAR.from_config(config, num_classes=config.num_classes)
        model.load_state_dict(state)
        write_published(args.out, published_state_dict(model))
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
