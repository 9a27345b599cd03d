"""`python -m benchmarks [NAME ...]`: run benchmarks one after the other; results go to benchmarks/results/NAME.json."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUPPORT = {"__init__", "__main__", "harness", "var", "gpu"}
"""No benchmarks of a CPU."""


def main(names: Sequence[str]) -> int:
    """Run all benchmarks, or those named; the exit code is 1 if one of them failed."""
    known = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SUPPORT)
    unknown = set(names) - set(known)
    if unknown:
        print(f"unknown benchmarks: {', '.join(sorted(unknown))}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or known:
        print(f"\n=== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(HERE / "results" / f"{name}.json")]
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
