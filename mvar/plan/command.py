"""`mvar plan`: memory, messages, time and checkpoints of a training, before anything is started, on any machine.

    mvar plan --config recipes/d32.yaml --nodes 16 --gpus 8 --gpu h100-80gb --png plan.png --json plan.json
    mvar plan --config recipes/d32.yaml --gpu h100-80gb --network ib-ndr --simulate 8..4096 --png scaling.png

Parameters are counted on the model itself, without memory. Without a code store that exists, the data are ImageNet's
1,281,167 images in 1,000 classes. Exit codes: 0, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from mvar.config import DataConfig, TrainConfig
from mvar.errors import ConfigError
from mvar.files.disk import write_text
from mvar.plan import draw, draw_scaling
from mvar.plan.gpus import GPUS, Gpu, find_gpu
from mvar.plan.links import BETWEEN_US, DEFAULT_NETWORK, NETWORKS, SHARE, Links, find_network
from mvar.plan.measured import measured_mfu
from mvar.plan.simulate import simulate, sizes_between
from mvar.plan.step_time import Cluster
from mvar.plan.study import Assumptions, Study
from mvar.settings import PathOrUrl, load

DEFAULT_MFU = 0.4
POSITIVE = (
    *("nodes", "gpus", "memory_gib", "peak_tflops", "mfu", "link_gb_s", "inside_gb_s", "latency_us", "link_share"),
    *("price_gpu_hour", "mtbf_hours", "disk_gb_s"),
)


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
        epilog=f"known GPUs: {', '.join(GPUS)}; networks: {', '.join(NETWORKS)}",
    )
    parser.add_argument("--config", type=Path, help="YAML file, such as recipes/d32.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the configuration")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each (default 8)")
    parser.add_argument("--gpu", default="h100-80gb", help="which GPU (default h100-80gb)")
    parser.add_argument("--memory-gib", type=float, help="memory of a GPU, instead of the known one's")
    parser.add_argument("--peak-tflops", type=float, help="peak of dense bf16 matmuls, instead of the known GPU's")
    parser.add_argument("--mfu", type=float, help="share of the peak that arithmetic alone reaches (default 0.4)")
    parser.add_argument("--measured", type=Path, metavar="RUN", help="take that share from a run on such GPUs")
    parser.add_argument("--network", default=DEFAULT_NETWORK, help=f"between nodes (default {DEFAULT_NETWORK})")
    parser.add_argument("--link-gb-s", type=float, help="GB/s out of a node, all adapters, instead of the network's")
    parser.add_argument("--inside-gb-s", type=float, help="GB/s from GPU to GPU inside a node, instead of the GPU's")
    parser.add_argument(
        "--latency-us", type=float, help=f"of a hop between nodes, microseconds (default {BETWEEN_US:g})"
    )
    parser.add_argument("--link-share", type=float, default=SHARE, help=f"of it that is reached (default {SHARE})")
    parser.add_argument("--price-gpu-hour", type=float, help="what a GPU costs an hour, in any currency")
    parser.add_argument(
        "--simulate", metavar="FIRST..LAST", help="efficiency on so many GPUs, doubling, such as 8..4096"
    )
    parser.add_argument("--mtbf-hours", type=float, default=24.0, help="hours between failures of the job (default 24)")
    parser.add_argument("--disk-gb-s", type=float, default=2.0, help="GB/s a checkpoint is written with (default 2)")
    parser.add_argument("--png", type=Path, help="draw memory by ZeRO stage, or what --simulate found, into this file")
    parser.add_argument("--json", type=Path, help="write every number into this file")
    return parser.parse_intermixed_args(argv)


def gpu_of(args: argparse.Namespace) -> Gpu:
    """Raises ConfigError for an unknown GPU whose memory and peak are not given."""
    if args.memory_gib and args.peak_tflops:
        return Gpu(args.gpu, args.memory_gib, args.peak_tflops)
    known = find_gpu(args.gpu)
    memory_gib, peak = args.memory_gib or known.memory_gib, args.peak_tflops or known.bf16_tflops
    return replace(known, memory_gib=memory_gib, bf16_tflops=peak)


def links_of(args: argparse.Namespace, gpu: Gpu) -> Links:
    """As the makers say, but for what the command says. Raises ConfigError."""
    given = {
        "inside_bytes_s": args.inside_gb_s and args.inside_gb_s * 1e9,
        "between_bytes_s": args.link_gb_s and args.link_gb_s * 1e9,
        "between_hop_s": args.latency_us and args.latency_us * 1e-6,
    }
    told = {name: value for name, value in given.items() if value is not None}
    return replace(Links.of(gpu, find_network(args.network), args.gpus), share=args.link_share, **told)


def assumptions_of(args: argparse.Namespace) -> Assumptions:
    """Raises ConfigError."""
    if args.measured is not None and args.mfu is not None:
        raise ConfigError("--mfu and --measured say the same thing: give one of them.")
    mfu, origin = args.mfu or DEFAULT_MFU, "given" if args.mfu else "assumed"
    if args.measured is not None:
        mfu, origin = measured_mfu(args.measured), f"measured: {args.measured}"
    gpu = gpu_of(args)
    cluster = Cluster(args.nodes, args.gpus, gpu, mfu, links_of(args, gpu))
    return Assumptions(cluster, args.mtbf_hours * 3600, args.disk_gb_s * 1e9, args.price_gpu_hour, origin)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a number above 0.")
    config = load(PlannedConfig, args.config, args.overrides)
    worlds = None if args.simulate is None else sizes_between(args.simulate)
    study = Study.of(config, assumptions_of(args))
    if worlds is not None:
        points = simulate(study, worlds)
        print(draw_scaling.table(study, points))
        figures = draw_scaling.figures(study, points)
    else:
        print(draw.table(study))
        figures = study.figures()
    if args.json:
        write_text(args.json, json.dumps(figures, indent=1) + "\n")
    if args.png:
        if worlds is not None:
            draw_scaling.picture(study, points, args.png)
        else:
            draw.picture(study, args.png)
        print(f"picture: {args.png}")
    return 0
