"""`mvar plan`: memory, messages, time and checkpoints of a training, before anything is started, on any machine.

    mvar plan --config recipes/d32.yaml --nodes 16 --gpus 8 --gpu h100-80gb --png plan.png --json plan.json

Parameters are counted on the model itself, without memory. Without a code store that exists, the data are ImageNet's
1,281,167 images in 1,000 classes. Exit codes: 0, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mvar.config import DataConfig, TrainConfig
from mvar.errors import ConfigError
from mvar.files.disk import write_text
from mvar.plan import draw
from mvar.plan.gpus import GPUS, Gpu, find_gpu
from mvar.plan.study import Assumptions, Study
from mvar.settings import PathOrUrl, load


class PlannedData(DataConfig):
    """A store that need not be there."""

    store: PathOrUrl = Field("", description="folder of the code store; default: as many images as ImageNet has")


class PlannedConfig(TrainConfig):
    """A training that need not have a run folder or data yet."""

    run: Path = Field(Path("runs/planned"), description="not used")
    data: PlannedData = Field(default_factory=lambda: PlannedData())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mvar plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"known GPUs: {', '.join(GPUS)}",
    )
    parser.add_argument("--config", type=Path, help="YAML file, such as recipes/d32.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the configuration")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each (default 8)")
    parser.add_argument("--gpu", default="h100-80gb", help="which GPU (default h100-80gb)")
    parser.add_argument("--memory-gib", type=float, help="memory of a GPU, instead of the known one's")
    parser.add_argument("--peak-tflops", type=float, help="peak of dense bf16 matmuls, instead of the known GPU's")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches (default 0.4)")
    parser.add_argument("--mtbf-hours", type=float, default=24.0, help="hours between failures of the job (default 24)")
    parser.add_argument("--disk-gb-s", type=float, default=2.0, help="GB/s a checkpoint is written with (default 2)")
    parser.add_argument("--png", type=Path, help="draw memory by ZeRO stage into this file")
    parser.add_argument("--json", type=Path, help="write every number into this file")
    return parser.parse_intermixed_args(argv)


def gpu_of(args: argparse.Namespace) -> Gpu:
    """Raises ConfigError for an unknown GPU whose memory and peak are not given."""
    if args.memory_gib and args.peak_tflops:
        return Gpu(args.gpu, args.memory_gib, args.peak_tflops)
    known = find_gpu(args.gpu)
    return Gpu(known.name, args.memory_gib or known.memory_gib, args.peak_tflops or known.bf16_tflops)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    for name in ("nodes", "gpus", "mfu", "mtbf_hours", "disk_gb_s"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above 0.")
    assumed = Assumptions(args.nodes, args.gpus, gpu_of(args), args.mfu, args.mtbf_hours * 3600, args.disk_gb_s * 1e9)
    study = Study.of(load(PlannedConfig, args.config, args.overrides), assumed)
    print(draw.table(study))
    if args.json:
        write_text(args.json, json.dumps(study.figures(), indent=1) + "\n")
    if args.png:
        draw.picture(study, args.png)
        print(f"picture: {args.png}")
    return 0
