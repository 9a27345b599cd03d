"""Jobs of several tasks: in what two of them differ, and which of an array have to run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def differences(
    left: Mapping[str, Any], right: Mapping[str, Any], left_name: str, right_name: str, prefix: str = ""
) -> list[str]:
    """One line for each differing leaf of two trees, which are called by their names."""
    lines = []
    for key in sorted(left.keys() | right.keys()):
        one, other = left.get(key), right.get(key)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += differences(one, other, left_name, right_name, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {left_name} has {_short(one)}, {right_name} {_short(other)}")
    return lines


def array_list(numbers: set[int]) -> str:
    """Task numbers as Slurm's --array wants them: 0,3-5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
