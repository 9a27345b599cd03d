"""Batches ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mvar.data.prefetch import Feed


def numbers(until: int) -> Iterator[int]:
    yield from range(until)
    raise OSError("a damaged shard")


@pytest.mark.parametrize("ahead", [1, 2])
def test_an_error_is_known_so_many_steps_before_its_data_is_needed(ahead: int) -> None:
    feed = Feed(numbers(10), 2, ahead)  # Five steps of two batches; the sixth cannot be read.
    known = []
    for step in range(5):
        assert feed.take() == [2 * step, 2 * step + 1]
        known.append(feed.error is not None)
    assert known == [False] * (5 - ahead) + [True] * ahead
    assert feed.take() == [] and "damaged" in str(feed.error)
