"""What this machine can do at best: the figures that shares of a peak are taken from.

matmul_gflops_fp32, matmul_gflops_bf16   the fastest of a few large torch.matmul shapes, billions of operations a second
peak_gflops_bf16                         how fast bf16 matrices are multiplied at best: as they are, or, on a CPU
                                         without 16-bit matrix instructions, in fp32
memory_gib_s                             copying a large tensor, reading and writing counted
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.harness import DTYPES, Report, parser, seconds_of, spread

Shapes = Sequence[tuple[int, int, int]]
"""Rows, inner size, columns."""
SHAPES: Shapes = ((2720, 768, 3072), (2720, 3072, 768), (2048, 2048, 2048), (4096, 1024, 4096))
"""Linear layers as the model has them, and squares."""
QUICK: Shapes = ((512, 768, 768),)
"""Enough to see which of two types is the faster one."""


def matmul_gflops(dtype: torch.dtype, device: torch.device, rounds: int = 10, shapes: Shapes = SHAPES) -> float:
    """Peak of torch.matmul, in GFLOP/s: the fastest round of the fastest shape."""
    best = 0.0
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype).t()
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        fastest_s = min(seconds_of(partial(torch.matmul, a, b, out=out)) for _ in range(rounds))
        best = max(best, 2e-9 * rows * inner * columns / fastest_s)
    return best


def peak(precision: str, device: torch.device, rounds: int = 10, shapes: Shapes = SHAPES) -> tuple[float, str]:
    """GFLOP/s at which matrices of that precision are multiplied at best, and in which precision that is."""
    ways = ["fp32"] if precision == "fp32" else list(DTYPES)
    quick = {way: matmul_gflops(DTYPES[way], device, 3, QUICK) for way in ways}
    near = [way for way in ways if quick[way] > max(quick.values()) / 2]
    return max((matmul_gflops(DTYPES[way], device, rounds, shapes), way) for way in near)


def copy_gib_s(device: torch.device, mebibytes: int = 512, rounds: int = 10) -> list[float]:
    """Bandwidth of copying, in GiB/s, one figure a round."""
    source = torch.zeros(mebibytes << 18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return [2 * mebibytes / 1024 / seconds_of(lambda: target.copy_(source)) for _ in range(rounds)]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options.add_argument("--rounds", type=int, default=10, help="rounds of each measurement (default 10)")
    options.add_argument("--tiny", action="store_true", help="small matrices and tensors, for tests")
    args = options.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("roofline")
    shapes = QUICK if args.tiny else SHAPES
    for name, dtype in DTYPES.items():
        report.add(f"matmul_gflops_{name}", matmul_gflops(dtype, device, args.rounds, shapes))
    gflops, way = peak("bf16", device, args.rounds, shapes)
    report.add("peak_gflops_bf16", gflops, how={"multiplied_in": way})
    copied = copy_gib_s(device, 8 if args.tiny else 512, args.rounds)
    report.add("memory_gib_s", spread(copied)["median"], how=spread(copied))
    report.finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
