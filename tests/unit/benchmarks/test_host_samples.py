"""Looks at the host's stacks."""

from __future__ import annotations

import random

from benchmarks.host_samples import MAIN, HostSamples


def test_a_function_that_is_busy_is_found_with_its_callers() -> None:
    with HostSamples() as samples:
        while samples.taken < 20:
            for _ in range(1000):
                random.triangular(0, 1)
    tables = samples.tables()
    functions = {row["where"]: row for row in tables["host_functions"]}
    own = next(
        row
        for where, row in functions.items()
        if where.endswith("test_a_function_that_is_busy_is_found_with_its_callers")
    )
    assert own["thread"] == MAIN
    assert 0.5 < own["share"] <= 1
    assert not [where for where in functions if "host_samples.py:HostSamples" in where], "the benchmark's own frames"
    assert sum(row["share"] for row in tables["host_lines"]) <= 2
    assert samples.seconds > 0
