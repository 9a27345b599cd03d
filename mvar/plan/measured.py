"""What a run that was trained shows of a cluster's speed."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from mvar.errors import ConfigError
from mvar.files.json_lines import read

FEWEST = 20
"""Steps that a median wants."""


def measured_mfu(run: Path) -> float:
    """Share of the peak that a run's steps reached: the median over the later half of its records.

    What the messages of its ranks cost is in it. Raises ConfigError where the run says too little.
    """
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"--measured {run}: no metrics.jsonl there. Give the folder of a run.")
    shares: list[float] = [
        record["mfu"] for record in read(metrics) if record.get("kind") == "train" and record.get("mfu")
    ]
    if len(shares) < FEWEST:
        raise ConfigError(
            f"--measured {run}: {len(shares)} steps with an mfu, expected {FEWEST} at least. Runs on a GPU note it by "
            "themselves, runs on CPUs with tracking.peak_tflops=measure. Or give --mfu."
        )
    return float(median(shares[len(shares) // 2 :]))
