"""What was found out about a machine: one line for each thing, with what to do where it is not as it should be."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

State = Literal["good", "missing", "bad"]
SIGNS: dict[State, str] = {"good": " ", "missing": "-", "bad": "!"}
"""`missing`: mvar does without, slower or with less. `bad`: something will fail or crawl."""
NAME_WIDTH, LINE_WIDTH = 24, 120


@dataclass(frozen=True)
class Finding:
    """`fix`: a shell command that mends it, where there is one."""

    name: str
    text: str
    state: State = "good"
    fix: str = ""

    def lines(self) -> list[str]:
        head = f"{SIGNS[self.state]} {self.name:{NAME_WIDTH}} "
        return textwrap.wrap(self.text, LINE_WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [head]


Report = dict[str, list[Finding]]
"""Section -> what belongs there."""


def screen(report: Report) -> str:
    """All sections, for people."""
    lines: list[str] = []
    for section, findings in report.items():
        lines += [section, *(line for finding in findings for line in finding.lines())]
    counts = [sum(f.state == state for found in report.values() for f in found) for state in ("bad", "missing")]
    return "\n".join([*lines, f"{counts[0]} bad (!), {counts[1]} missing (-)"])


def fixes(report: Report) -> list[str]:
    """The commands that mend what can be mended, each once."""
    return list(dict.fromkeys(finding.fix for found in report.values() for finding in found if finding.fix))
