"""`mvar evaluate` at the size of papers: seconds and memory of the whole command, on pictures of noise.

seconds         the whole command: both sets read and put through the network, FD, KID, precision, recall, their errors
                over ten parts, and the floor
cpu_seconds     of all its threads: what a busy machine does not change
peak_rss_gib    most memory that the command's process held

50,000 samples of 64 px against 50,000, both as .npz; the network is a stand-in that costs little and gives
1,280 features. Smaller runs, for which the goals do not count: --images, --size, --width.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from benchmarks.harness import Report, parser
from mvar.testing.extractors import write_extractor

IMAGES = 50_000
BLOCK = 1000
GIB = 1 << 30


def write_noise(path: Path, count: int, size: int, seed: int, spread: int) -> None:
    """An .npz as ADM's: soft noise in arr_0, written block by block."""
    rng = np.random.default_rng(seed)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for begin in range(0, count, BLOCK):
            rows = min(BLOCK, count - begin)
            coarse = rng.integers(128 - spread, 128 + spread, (rows, size // 8, size // 8, 3), dtype=np.uint8)
            member.write(coarse.repeat(8, axis=1).repeat(8, axis=2).tobytes())


def watched(command: list[str], threads: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak resident GiB of a command."""
    begin_s, peak = time.perf_counter(), 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    own = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, sum(one.memory_info().rss for one in [own, *own.children(recursive=True)]))
        except psutil.Error:
            break
        time.sleep(0.2)
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin_s, cpu_s, peak / GIB


def measure(images: int, size: int, width: int, threads: int) -> Report:
    report = Report("evaluate")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        features = write_extractor(root / "small.pt", width=width, side=8)
        for name, seed, spread in (("samples", 1, 100), ("real", 2, 110)):
            write_noise(root / f"{name}.npz", images, size, seed, spread)
        command = [sys.executable, "-m", "mvar.evaluate", "--samples", str(root / "samples.npz")]
        command += ["--reference", str(root / "real.npz"), "--features", str(features), "--batch", "256"]
        seconds, cpu_s, peak_gib = watched([*command, "--json", str(root / "figures.json")], threads)
        found = json.loads((root / "figures.json").read_text())
    report.context["size"] = {"images": images, "size_px": size, "features": width, "threads": threads}
    report.context["evaluated"] = found["figures"]
    whole = images == IMAGES
    report.add("seconds", seconds, "<= 900" if whole else None)
    report.add("cpu_seconds", cpu_s)
    report.add("peak_rss_gib", peak_gib, "<= 4" if whole else None)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=IMAGES, help="pictures in each set")
    arguments.add_argument("--size", type=int, default=64, help="their side in pixels, a multiple of 8")
    arguments.add_argument("--width", type=int, default=1280, help="features of the stand-in network")
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    args = arguments.parse_args(argv)
    measure(args.images, args.size, args.width, args.threads).finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
