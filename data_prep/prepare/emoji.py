"""Colour emoji renders as an image folder: the npm package @lobehub/fluent-emoji-3d, 256 px, on white.

    npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-fluent-emoji-3d-*.tgz            (pictures: package/assets)
    npm pack emoji-datasource && tar xf emoji-datasource-*.tgz package/emoji.json        (classes)

The pictures are named by code points; emoji.json tells the category of each.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.prepare.images_out import write_png
from mvar.cli import run_command
from mvar.errors import ImageError
from mvar.images.pixels import FileReader


def prepare(out: Path, assets: Path, categories: Path, *, skin_tones: bool = False, limit: int | None = None) -> int:
    """Write out/<category>/<code points>.png of the emoji in `assets` (*.webp); returns the images.

    `categories`: emoji.json of emoji-datasource. `skin_tones`: also the variants that differ in skin tone only.
    `limit`: only the first so many. Emoji without a category are left out; what is there already is kept. Raises
    ImageError where an input is missing or damaged.
    """
    category_of = _categories(categories, skin_tones)
    files = {_canonical(path.stem): path for path in sorted(assets.glob("*.webp"))}
    if not files:
        raise ImageError(f"emoji {assets}: no *.webp files. Give the folder package/assets of the unpacked package.")
    chosen = [(code, path) for code, path in sorted(files.items()) if code in category_of][:limit]
    reader = FileReader(background="white")
    for code, path in chosen:
        target = out / category_of[code] / f"{code}.png"
        if not target.exists():
            write_png(target, reader(path))
    return len(chosen)


def _categories(path: Path, skin_tones: bool) -> dict[str, str]:
    """Folder name of each emoji, by its code points."""
    try:
        entries = json.loads(path.read_bytes())
        return {code: _folder(entry["category"]) for entry in entries for code in _codes(entry, skin_tones)}
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}). Give emoji-datasource's emoji.json.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"{path}: not emoji-datasource's emoji.json ({error!r}).") from None


def _codes(entry: dict[str, Any], skin_tones: bool) -> Iterator[str]:
    variants = [entry, *(entry.get("skin_variations") or {}).values()] if skin_tones else [entry]
    for variant in variants:
        for name in (variant.get("unified"), variant.get("non_qualified")):
            if name:
                yield _canonical(name)


def _canonical(code_points: str) -> str:
    """Code points in one spelling: lower case, joined by -, without leading zeros."""
    return "-".join(point.lstrip("0") for point in re.split("[-_]", code_points.lower()))


def _folder(category: str) -> str:
    return re.sub("[^a-z]+", "-", category.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the class folders into")
    parser.add_argument("--assets", type=Path, required=True, help="package/assets of @lobehub/fluent-emoji-3d")
    parser.add_argument("--categories", type=Path, required=True, help="emoji.json of emoji-datasource")
    parser.add_argument("--skin-tones", action="store_true", help="also the variants that differ in skin tone only")
    parser.add_argument("--limit", type=int, help="only the first so many")
    args = parser.parse_args(argv)
    count = prepare(args.out, args.assets, args.categories, skin_tones=args.skin_tones, limit=args.limit)
    print(f"{count:,} emoji in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
