"""Which images a job draws, in which order, with which seeds."""

from __future__ import annotations

import pytest

from mvar.errors import ConfigError
from mvar.sampling.pictures import Picture, counts_of, in_turn


def test_every_stretch_of_the_order_has_all_classes() -> None:
    pictures = in_turn({0: 3, 2: 3, 7: 1})
    assert pictures == [*((c, 0) for c in (0, 2, 7)), *((c, 1) for c in (0, 2)), *((c, 2) for c in (0, 2))]
    many = in_turn(counts_of(range(1000), "balanced", 50_000))
    assert len(set(many)) == 50_000
    for first in range(0, 50_000, 5000):
        assert len({picture.label for picture in many[first : first + 5000]}) == 1000


@pytest.mark.parametrize(
    ("per_class", "total", "expected"),
    [
        (None, None, {1: 8, 5: 8}),
        (None, 5, {1: 3, 5: 2}),
        ("balanced", 1, {1: 1}),
        ("3", None, {1: 3, 5: 3}),
        ("3, 4", None, {1: 4, 5: 3}),
        ("3", 6, {1: 3, 5: 3}),
    ],
)
def test_counts_follow_from_what_is_asked_for(
    per_class: str | None, total: int | None, expected: dict[int, int]
) -> None:
    counts = counts_of([5, 1], per_class, total)
    assert counts == expected and list(counts) == sorted(counts)


@pytest.mark.parametrize("per_class", ["0", "-1", "1.5", "", "1,,2", "many"])
def test_counts_that_are_none_are_refused(per_class: str) -> None:
    with pytest.raises(ConfigError, match="whole numbers from 1"):
        counts_of([1, 2, 3], per_class, None)


def test_seeds_are_the_images_own() -> None:
    seeds = {Picture(label, number).seed(base) for label in range(20) for number in range(20) for base in range(3)}
    assert len(seeds) == 1200 and all(0 <= seed < 2**63 for seed in seeds)
    assert Picture(207, 3).seed(0) == 8397854477517995349  # For ever: published samples depend on it.
