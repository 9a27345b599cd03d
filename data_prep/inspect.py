"""`python -m data_prep.inspect STORE`: the facts of a code store on one screen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_prep.calibrate import Calibration
from data_prep.finalize import summary
from mvar.cli import run_command
from mvar.data.store import CodeStore


def facts(folder: Path) -> str:
    """What the store holds and what it was made of. Raises StoreError."""
    store = CodeStore.open(folder)
    manifest = store.manifest
    transform, encoding = manifest.transform, dict(manifest.encoding)
    calibration = encoding.pop("calibration", None)
    shown = ", ".join(f"{label} {name}" for label, name in enumerate(manifest.classes[:6]))
    shown += ", ..." * (len(manifest.classes) > 6)
    return "\n".join(
        [
            f"code store {folder}, format {manifest.format_version}",
            f"source     {manifest.source.kind}: {manifest.source.images:,} images, {manifest.source.bytes:,} bytes, "
            f"listing {manifest.source.sha256[:12]}",
            f"tokenizer  {manifest.tokenizer.sha256[:12]}: {manifest.vocab_size} words of {manifest.latent_channels} "
            f"channels, sides {', '.join(map(str, manifest.patch_nums))}",
            f"transform  shorter side to {transform['resize_shorter_side']} px ({transform['filter']}), crops of "
            f"{transform['size']} px: {', '.join(transform['views'])}",
            f"pictures   transparency on {transform.get('background', 'white')}, orientation "
            f"{transform.get('orientation', 'stored')}, deep grey values of {transform.get('grey_bits', 'their')} bits",
            f"encoding   {', '.join(f'{key} {value}' for key, value in encoding.items())}",
            *([Calibration.model_validate(calibration).table()] if calibration else []),
            f"classes    {shown}",
            summary(manifest, store.split("train").labels_N),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect", description="Print a code store's facts.")
    parser.add_argument("store", type=Path, help="folder of the code store")
    print(facts(parser.parse_args(argv).store))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
