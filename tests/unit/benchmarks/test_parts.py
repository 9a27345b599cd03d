"""The whole run fits onto the machine that it runs on."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest

from benchmarks.parts import DEPTHS, LIMIT_MINUTES, PARTS, Machine, Part, allotted

FAST, SLOW, PLAIN = Machine(1e6, 1e7, 64), Machine(1.0, 2.0, 64), Machine(1e6, 1e5, 64)


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
    assert part.command(FAST, 5) == ["benchmarks.train_step", "--batch", "2", "--depth", "12"]
    assert part.command(SLOW, 5)[-1] == "4"
    assert part.command(FAST, -1)[-1] == "4", "nothing is left of the time"
    assert part.command(SLOW, 5, "--depth 7")[-1] == "7"


def test_a_part_that_needs_much_memory_is_smaller_where_there_is_little() -> None:
    part = Part("a", "train_step", "", 5, 100, DEPTHS, gib=20)
    assert part.command(Machine(1e6, 1e7, 22), 5)[-1] == "12"
    assert part.command(Machine(1e6, 1e7, 16), 5)[-1] == "10"


def test_without_fast_bf16_a_part_may_leave_it_out() -> None:
    part = Part("a", "tokenize", "", 5, without_bf16="--precision fp32")
    assert part.command(FAST, 30) == ["benchmarks.tokenize"]
    assert part.command(PLAIN, 30) == ["benchmarks.tokenize", "--precision", "fp32"]


@pytest.mark.parametrize("machine", [Machine(165, 20, 22), Machine(380, 1500, 22), Machine(1000, 4000, 64)])
@pytest.mark.parametrize("slower", [0.7, 1.0, 1.3])
def test_the_whole_run_ends_in_time_also_where_parts_take_longer_than_expected(machine: Machine, slower: float) -> None:
    elapsed = 0.0
    for number, part in enumerate(PARTS):
        words = " ".join(part.command(machine, allotted(PARTS[number:], elapsed)))
        share = next((share for size, share in part.sizes if size and size in words), 1.0)
        elapsed += slower * (machine.minutes(share * part.tflop) if part.tflop else 0.6 * part.minutes)
    assert elapsed < LIMIT_MINUTES
