"""One global batch over several processes: who takes which part, and sums over all of them.

Every process holds all the weights (plain data parallelism). What is random or decided is decided alike everywhere,
from numbers that were summed over the processes, so that the number of processes only slices the work.

Legend: B images of the global batch, N rows over all ranks, C channels, W words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mvar.errors import ConfigError, TrainingError
from mvar.run.world import World


def part_of(count: int, world: World) -> range:
    """The places of a global batch (or of any list) that this rank takes: contiguous, sizes differ by one at most."""
    return range(world.rank * count // world.size, (world.rank + 1) * count // world.size)


def require_work_for_all(batch: int, world: World) -> None:
    """Raises ConfigError where a rank would have no image of a step."""
    if batch < world.size:
        raise ConfigError(
            f"batch: got {batch} images a step for {world.size} processes; expected at least one for each. Raise batch,"
            " or start fewer processes."
        )


def add_up_(world: World, tensors: Sequence[Tensor]) -> None:
    """Replace float32 tensors of one device by their sums over ranks, in one message. All ranks bring equal shapes."""
    sizes = [tensor.numel() for tensor in tensors]
    if world.size == 1 or not sum(sizes):
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(total.view(tensor.shape))


def whole_batch(world: World, own: Tensor, batch: int) -> Tensor:
    """Every rank's part of something with one entry for each image of a global batch, together: (B, ...) float32."""
    if world.size == 1:
        return own
    part = part_of(batch, world)
    whole = own.new_zeros(batch, *own.shape[1:])
    whole[part.start : part.stop] = own
    add_up_(world, [whole])  # Adding zeros changes no bit.
    return whole


class SharedRows:
    """Rows (N, C) that lie on several ranks, the same number for each image, read like one tensor.

    Reading is done by all ranks together, with the same places.
    """

    def __init__(self, world: World, own_NC: Tensor, rows_per_image: int, batch: int) -> None:
        """`own_NC`: the rows of this rank's images."""
        self._world, self._own_NC = world, own_NC
        self._total = rows_per_image * batch
        self._first = 0 if world.size == 1 else rows_per_image * part_of(batch, world).start

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, places_W: Tensor) -> Tensor:
        """The rows at some places (int64), (W, C)."""
        places_W = places_W.to(self._own_NC.device) - self._first
        mine_W = (places_W >= 0) & (places_W < len(self._own_NC))
        rows_WC = self._own_NC.new_zeros(len(places_W), self._own_NC.shape[1])
        rows_WC[mine_W] = self._own_NC[places_W[mine_W]]
        add_up_(self._world, [rows_WC])
        return rows_WC


def hand_round(world: World, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Rank 0's float32 tensors for everybody, on the CPU; None elsewhere. Only rank 0 needs to see the files."""
    shapes = world.share(None if tensors is None else [(name, tuple(value.shape)) for name, value in tensors.items()])
    assert shapes is not None
    if world.size == 1:
        assert tensors is not None
        return dict(tensors)
    handed: dict[str, Tensor] = {}
    for name, shape in shapes:
        value = torch.empty(shape, device=world.device) if tensors is None else tensors[name].to(world.device)
        dist.broadcast(value, 0)
        handed[name] = value.cpu()
    return handed


def require_equal(world: World, tensors: Iterable[Tensor], what: str) -> None:
    """Raises TrainingError on all ranks unless all of them hold the same values."""
    if world.size == 1:
        return
    sums = world.gather(torch.stack([tensor.detach().double().sum() for tensor in tensors]).cpu().tolist())
    astray = [rank for rank, own in enumerate(sums) if own != sums[0]]
    if astray:
        raise TrainingError(
            f"{what}: ranks {astray[:8]} hold other values than rank 0, expected the same on all. Look for a faulty"
            " device on their machines; run the same command again to go on from the last saved state."
        )
