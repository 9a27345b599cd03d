"""A digest of weights that covers every value."""

import torch

from mvar.checkpoint.fingerprint import fingerprint


def test_every_value_name_and_shape_counts():
    state = {"a": torch.arange(20_000.0), "b.weight": torch.ones(3, 4), "c": torch.tensor([1, 2])}
    first = fingerprint(state)
    assert fingerprint(dict(reversed(state.items()))) == first
    assert fingerprint(state | {"b.weight": torch.ones(4, 3)}) != first
    assert fingerprint({"x" if name == "a" else name: value for name, value in state.items()}) != first
    for name in state:
        changed = {key: value.clone() for key, value in state.items()}
        changed[name].view(-1)[-1] += 1
        assert fingerprint(changed) != first


def test_the_way_that_values_are_stored_does_not_count():
    value = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert fingerprint({"w": value}) == fingerprint({"w": value.float()})
    assert fingerprint({"w": value.t().contiguous().t()}) == fingerprint({"w": value})
    assert fingerprint({"w": torch.tensor(0.0)}) != fingerprint({"w": torch.tensor(-0.0)})
    assert fingerprint({"w": torch.empty(0, 3)}) != fingerprint({"w": torch.empty(3, 0)})
