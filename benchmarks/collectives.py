"""Time of all-reduces over gloo on this machine, against what a plan says of them.

Two constants, the latency of a hop and the bandwidth of the links, are fitted to every other size; the sizes between
are predicted (`mvar.plan.links`), each number of ranks by itself, because ranks of one machine share its memory.

worst_error_N  largest relative error of a predicted size on N ranks
gb_s_N, hop_us_N  the fitted constants
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.harness import Report, parser
from mvar.plan.links import Timed, fit
from mvar.run.world import World
from mvar.testing.ranks import run_ranks

MIB = 1 << 20
SIZES_MIB = (1, 2, 4, 8, 16, 32, 64)
"""Fitted: every other one, from the first on. Smaller messages are latency that scheduling decides."""


def timed(world: World, sizes: Sequence[int], rounds: int) -> list[float]:
    """Median seconds of an all-reduce of so many bytes, on one rank."""
    seconds = []
    for size in sizes:
        values = torch.ones(size // 4)
        took = []
        for number in range(rounds + 2):
            dist.barrier()
            begin_s = time.perf_counter()
            dist.all_reduce(values)
            if number >= 2:
                took.append(time.perf_counter() - begin_s)
            values.fill_(1.0)
        seconds.append(median(took))
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=15, help="rounds of each size (default 15)")
    arguments.add_argument("--mib", type=int, nargs="+", default=list(SIZES_MIB), help="sizes of messages, in MiB")
    arguments.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default 2 4)")
    args = arguments.parse_args(argv)
    report = Report("collectives")
    sizes = [size * MIB for size in args.mib]
    for world in args.worlds:
        with tempfile.TemporaryDirectory() as scratch:
            by_rank = run_ranks(timed, world, Path(scratch), sizes=sizes, rounds=args.rounds)
        slowest = [max(rank[i] for rank in by_rank) for i in range(len(sizes))]
        measured = [Timed(world, size, took) for size, took in zip(sizes, slowest, strict=True)]
        links = fit(measured[::2])
        errors = {}
        for one in measured[1::2]:
            errors[one.handed // MIB] = links.collective_s("all_reduce", one.handed, 1, world) / one.seconds - 1
        report.context[f"seconds_{world}"] = dict(zip(args.mib, slowest, strict=True))
        report.context[f"errors_{world}"] = errors
        report.add(f"worst_error_{world}", max(map(abs, errors.values())), "<= 0.2")
        report.add(f"gb_s_{world}", links.inside_bytes_s / 1e9)
        report.add(f"hop_us_{world}", links.inside_hop_s * 1e6)
    report.finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
