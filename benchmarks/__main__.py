"""`python -m benchmarks [NAME ...]`: run benchmarks one after the other, then write benchmarks/results/README.md.

What is run is listed in `benchmarks/parts.py`. Results go to benchmarks/results/NAME.json; the result of a benchmark
that fails is removed, and the page says what is missing. After a whole run, run.json says how long it took.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks import page
from benchmarks.harness import HERE, RESULTS, Report, parser
from benchmarks.parts import LIMIT_MINUTES, PARTS, PLANNED_MINUTES, Machine, allotted


def main(argv: Sequence[str] | None = None) -> int:
    """Run all benchmarks, or those named; the exit code is 1 if one of them failed."""
    known = [part.name for part in PARTS]
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    options.add_argument("--depth", type=int, help="of the models (default: what fits into the time)")
    planned = f"that the models' depths are chosen for (default {PLANNED_MINUTES:g})"
    options.add_argument("--minutes", type=float, default=PLANNED_MINUTES, help=planned)
    options.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    args = options.parse_args(argv)
    unknown = set(args.names) - set(known)
    if unknown:
        options.error(f"unknown benchmarks: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    whole, began_s = Report("run"), time.monotonic()
    machine = Machine.measure()
    commands: dict[str, str] = {}
    failed = []
    chosen = [part for part in PARTS if not args.names or part.name in args.names]
    for number, part in enumerate(chosen):
        has_depth = part.sizes[0][0].startswith("--depth")
        size = f"--depth {args.depth}" if args.depth and has_depth else None
        elapsed_minutes = (time.monotonic() - began_s) / 60
        minutes = part.minutes if args.names else allotted(chosen[number:], elapsed_minutes, args.minutes)
        words = part.command(machine, minutes, size)
        commands[part.name] = " ".join(words)
        print(f"\n=== {part.name}: python -m {commands[part.name]}", flush=True)
        if args.dry_run:
            continue
        target = RESULTS / f"{part.name}.json"
        target.unlink(missing_ok=True)
        command = [sys.executable, "-m", *words, "--json", str(target)]
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            failed.append(part.name)
    if args.dry_run:
        return 0
    if not args.names:
        whole.context |= {"commands": commands, "failed": failed}
        whole.context["matmul_gflops"] = {"fp32": machine.fp32_gflops, "bf16": machine.bf16_gflops}
        whole.add("minutes", (time.monotonic() - began_s) / 60, f"<= {LIMIT_MINUTES:g}")
        args.json = args.json or RESULTS / "run.json"
        whole.finish(args)
    page.write(RESULTS)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
