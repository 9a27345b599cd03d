"""A hub folder out of weights and a tokenizer: what `mvar export --to hub` and `mvar import-published` share."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mvar.checkpoint.tensors import FileRecord
from mvar.checkpoint.weights import SINGLE_FILE, Weights
from mvar.errors import ConfigError
from mvar.hub.folder import HubModel, read_figures
from mvar.hub.layout import PREPROCESSING, Preprocessing
from mvar.hub.objects import empty_model
from mvar.images.arrays import Bytes
from mvar.images.pixels import read_rgb
from mvar.log import log
from mvar.sampling.arguments import add_sampling_options, sampling_options
from mvar.sampling.classes import class_names, manifest_of_run
from mvar.sampling.drawing import draw_few
from mvar.sampling.gallery import sheet, shown
from mvar.sampling.loading import ModelPair, pick_device
from mvar.sampling.options import SamplingOptions
from mvar.sampling.painter import CPU_BATCH
from mvar.sampling.planning import Request
from mvar.sampling.sampler import check_geometry
from mvar.tokenizer.vqvae import VQVAE

DRAW = "draw"
ROWS, COLUMNS = 10, 8
"""Of a grid that is drawn: classes, evenly spaced, and images of each."""
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """What `hub_model` reads, beside the sampling options, which become the folder's own."""
    add = parser.add_argument_group("of a hub folder").add_argument
    add(
        "--license",
        metavar="ID",
        help="of the weights, such as mit or cc-by-4.0; without it the card says so",
    )
    add("--figures", type=Path, metavar="JSON", help="what `mvar evaluate --json` wrote, for the card")
    add("--grid", metavar="PICTURE", help=f"sheet of samples for the card; `{DRAW}`: drawn now, with the options below")
    add("--class-names", type=Path, help="file with a class name a line, or code store (default: the run's code store)")
    add("--device", default="auto", help=f"for --grid {DRAW}: auto, cpu, cuda or cuda:1 (default auto)")
    add_sampling_options(parser)


def hub_model(
    args: argparse.Namespace,
    weights: Weights,
    tokenizer: VQVAE,
    *,
    source: Mapping[str, FileRecord] | None = None,
) -> HubModel:
    """All of a hub folder. `source`: the files that imported weights came in. Raises MvarError."""
    if args.license is not None and not _LICENSE.fullmatch(args.license):
        raise ConfigError(f"--license {args.license!r}: expected an identifier, such as mit, apache-2.0 or cc-by-4.0.")
    figures = None if args.figures is None else read_figures(args.figures)
    options = sampling_options(args)
    model = empty_model(weights)
    check_geometry(model, tokenizer.quantizer)
    options.of_scales(model.pyramid.num_scales)
    where = weights.path.parent if weights.path.name == SINGLE_FILE else weights.path
    names = class_names(where, args.class_names, model.num_classes)
    if args.license is None:
        log.warning("no --license: the card says that nobody has stated one")
    if names is None:
        log.warning("the classes' names are not known (--class-names): labels of this model are numbers")
    preprocessing = Preprocessing(
        image_size=tokenizer.image_size,
        transform=_transform(where),
        classes=names,
    )
    return HubModel(
        weights,
        tokenizer,
        preprocessing,
        dataclasses.asdict(options),
        license=args.license,
        figures=figures,
        grid_HWC=_grid(args, weights, tokenizer, options),
        source=dict(source or {}),
    )


def _transform(where: Path) -> dict[str, Any] | None:
    """How images were cut, as a hub folder or the code store of a run tells it."""
    if (where / PREPROCESSING).is_file():
        return Preprocessing.read(where / PREPROCESSING).transform
    manifest = manifest_of_run(where)
    return None if manifest is None else manifest.transform


def _grid(args: argparse.Namespace, weights: Weights, tokenizer: VQVAE, options: SamplingOptions) -> Bytes | None:
    if args.grid is None:
        return None
    if args.grid != DRAW:
        return np.asarray(read_rgb(args.grid))
    device = pick_device(args.device)
    num_classes = empty_model(weights).num_classes
    state = {name: weights.read(name) for name in weights.shapes}
    source = ModelPair(weights.path, weights.config, num_classes, state, tokenizer, weights.precision, weights.step)
    request = Request(source, dict.fromkeys(range(num_classes), COLUMNS), options, seed=0, device=device)
    painter = request.painter(request.decided_precision(), CPU_BATCH, compiled=False)
    return sheet(draw_few(shown(request.counts, ROWS, COLUMNS), painter))
