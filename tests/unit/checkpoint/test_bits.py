"""A hash of a tensor's bits: each bit counts, and so does the place; shape and device do not."""

from __future__ import annotations

import pytest
import torch

from mvar.checkpoint import bits
from mvar.checkpoint.bits import hash_of_all, hashes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    values = torch.linspace(-2, 2, 7).to(dtype)
    integers = values.view({2: torch.int16, 4: torch.int32}[values.element_size()])
    found = {int(hashes_of([values])[0])}
    for place in range(len(integers)):
        for bit in range(8 * values.element_size()):
            changed = integers.clone()
            changed[place] ^= torch.tensor(1, dtype=changed.dtype) << bit
            found.add(int(hashes_of([changed.view(dtype)])[0]))
    assert len(found) == 1 + 7 * 8 * values.element_size()


def test_places_count_also_beyond_the_first_chunk_and_shapes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "CHUNK", 16)
    values = torch.arange(100, dtype=torch.float32)
    swapped = values.clone()
    swapped[[3, 19]] = values[[19, 3]]  # The same place of two chunks.
    first, second, third, fourth = hashes_of([values, swapped, values.view(10, 10), values.flip(0)]).tolist()
    assert first == third and len({first, second, fourth}) == 3
    assert hash_of_all([values, swapped]) != hash_of_all([swapped, values])


def test_a_nan_is_equal_to_itself_and_minus_zero_is_no_zero() -> None:
    first, second, third = hashes_of([torch.tensor([float("nan")]), torch.tensor([0.0]), torch.tensor([-0.0])]).tolist()
    assert int(hashes_of([torch.tensor([float("nan")])])[0]) == first and second != third
