"""Whether all ranks compute with the same weights, bit for bit, before a checkpoint says that they did.

Under ZeRO 0 to 2 every rank holds all weights. A rank whose memory or links changed one goes on with its own, its
gradients go into everybody's, and nothing fails. A hash of each rank's weights tells, at the price of reading them once
and of one small exchange. Under ZeRO 3 every weight lies on one rank only: there is nothing to compare.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from mvar.checkpoint.bits import hash_of_all, hashes_of
from mvar.checkpoint.partition import WEIGHT, Partition
from mvar.run.world import World


@dataclass(frozen=True)
class Disagreement:
    """Ranks that hold other weights than they should."""

    ranks: tuple[int, ...]
    evidence: str

    @property
    def certain(self) -> bool:
        """Whether these ranks are the wrong ones. Else one of them is, and nothing says which."""
        return "cannot be told" not in self.evidence


def disagreement(partition: Partition, weights: dict[str, Tensor], world: World) -> Disagreement | None:
    """What all ranks find together; None where they agree. `weights`: what this rank computes with, by name."""
    if partition.stage == 3 or world.size == 1:
        return None
    found = world.gather(hash_of_all(list(weights.values())))
    if len(set(found)) == 1:
        return None
    return _beside_masters(partition, weights, world) or _by_majority(found)


def _beside_masters(partition: Partition, weights: dict[str, Tensor], world: World) -> Disagreement | None:
    """ZeRO 1 and 2 have one fp32 master of each weight, on the rank that updates it: who differs from it is wrong."""
    if partition.stage == 0:
        return None
    own: dict[str, int] = {}
    for piece, kind, values in partition.blocks():
        if kind == WEIGHT:
            rounded = values.to(weights[piece.name].dtype)
            own[f"{piece.name} {piece.start} {piece.stop}"] = int(hashes_of([rounded])[0])
    wrong = set()
    for place, expected in (item for part in world.gather(own) for item in part.items()):
        name, start, stop = place.split(" ")
        here = weights[name].detach().view(-1)[int(start) : int(stop)]
        if int(hashes_of([here])[0]) != expected:
            wrong.add(name)
    by_rank = world.gather(sorted(wrong))
    ranks = tuple(rank for rank, names in enumerate(by_rank) if names)
    names = sorted({name for part in by_rank for name in part})
    evidence = f"other bits than the rank that updates them, in {', '.join(names[:4])}{' ...' * (len(names) > 4)}"
    return Disagreement(ranks, evidence) if ranks else None


def _by_majority(found: list[int]) -> Disagreement:
    usual, count = Counter(found).most_common(1)[0]
    if 2 * count > len(found):
        odd = tuple(rank for rank, own in enumerate(found) if own != usual)
        return Disagreement(odd, f"other bits than {count} of {len(found)} ranks")
    return Disagreement(tuple(range(len(found))), "other bits than each other; which ones are right cannot be told")
