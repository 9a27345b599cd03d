"""How many updates AdamW has made, wherever an implementation writes it down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvar.checkpoint.partition import Partition


def partition_of(steps: list[Any]) -> Any:
    """A partition with an optimizer that counts `steps` in the state of its tensors; None: a tensor without one."""
    found: Any = object.__new__(Partition)
    found._masters = [torch.nn.Parameter(torch.zeros(1)) for _ in steps]
    found._client = torch.optim.AdamW(found._masters)
    found._counts_in_groups = False
    for key, step in zip(found._masters, steps, strict=True):
        if step is not None:
            found._client.state[key]["step"] = step
    return found


@pytest.mark.parametrize(
    ("steps", "made"),
    [
        ([0, 0, 7], 7),  # DeepSpeed's FusedAdam under ZeRO 0: in the last tensor of a group.
        ([7, 7, 7], 7),
        ([torch.tensor(7.0), torch.tensor(7.0)], 7),
        ([None, 7], 7),
        ([None, None], 0),
    ],
)
def test_updates_are_counted_wherever_they_stand(steps: list[Any], made: int) -> None:
    assert partition_of(steps).adam_steps == made


def test_every_tensor_is_told_of_the_updates_that_were_made() -> None:
    one = partition_of([0, torch.tensor(0.0), 2])
    one.adam_steps = 9
    assert [int(one._client.state[key]["step"]) for key in one._masters] == [9, 9, 9]
