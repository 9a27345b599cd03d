"""The whole run fits onto the machine that it runs on."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest

from benchmarks.parts import DEPTHS, LIMIT_MINUTES, PARTS, Machine, Part

FAST, SLOW, PLAIN = Machine(1e6, 1e7), Machine(1.0, 2.0), Machine(1e6, 1e5)


class ParsedError(Exception):
    """The command line is one that the benchmark takes."""


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_its_benchmark_takes_its_words(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(self: Any, argv: Any = None, parse: Any = parse) -> None:
            parse(self, argv)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)
    for size, _ in part.sizes:
        module, *words = part.command(PLAIN, 30, size)
        with pytest.raises(ParsedError):
            importlib.import_module(module).main(words)


def test_a_fast_machine_takes_the_largest_size_and_a_slow_one_the_smallest() -> None:
    part = Part("a", "train_step", "--batch 2", 5, 100, DEPTHS)
    assert part.command(FAST, 30) == ["benchmarks.train_step", "--batch", "2", "--depth", "12"]
    assert part.command(SLOW, 30)[-1] == "4"
    assert part.command(FAST, -1)[-1] == "4", "nothing is left of the time"
    assert part.command(SLOW, 30, "--depth 7")[-1] == "7"


def test_without_fast_bf16_a_part_may_leave_it_out() -> None:
    part = Part("a", "tokenize", "", 5, without_bf16="--precision fp32")
    assert part.command(FAST, 30) == ["benchmarks.tokenize"]
    assert part.command(PLAIN, 30) == ["benchmarks.tokenize", "--precision", "fp32"]


@pytest.mark.parametrize("machine", [Machine(165, 20), Machine(380, 1500), Machine(1000, 4000)])
def test_what_is_expected_of_the_sized_parts_leaves_room_for_the_others(machine: Machine) -> None:
    expected = 0.0
    for part in PARTS:
        words = " ".join(part.command(machine, LIMIT_MINUTES))
        share = next((share for size, share in part.sizes if size and size in words), 1.0)
        expected += machine.minutes(share * part.tflop) if part.tflop else part.minutes
    assert expected < 0.95 * LIMIT_MINUTES
