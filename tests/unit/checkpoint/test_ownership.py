"""Who holds what, over any number of ranks, in few numbers, and nothing of it is lost."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvar.checkpoint.ownership import holders, numbers_of, ownership_of
from mvar.checkpoint.partition import Piece
from mvar.checkpoint.record import CheckpointRecord
from mvar.checkpoint.saving import save
from mvar.run.launcher import Place
from mvar.run.world import World
from mvar.testing.ranks import run_ranks
from tests.unit.checkpoint.test_checkpoint import ALONE, HandMade, Progress, identity, values


def as_zero3(shapes: dict[str, tuple[int, ...]], ranks: int) -> list[list[Piece]]:
    """What DeepSpeed gives each rank in stage 3."""
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        width = -(-count // ranks)
        for rank in range(ranks):
            start, stop = min(rank * width, count), min((rank + 1) * width, count)
            if start < stop:
                held[rank].append(Piece(name, start, stop, 0, 0))
    return held


def as_zero2(shapes: dict[str, tuple[int, ...]], ranks: int) -> list[list[Piece]]:
    """One flat vector, cut into equal parts."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for rank in range(ranks):
        low, high, seen = total * rank // ranks, total * (rank + 1) // ranks, 0
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            start, stop = max(low - seen, 0), min(high - seen, count)
            if start < stop:
                held[rank].append(Piece(name, start, stop, 0, 0))
            seen += count
    return held


def scattered(shapes: dict[str, tuple[int, ...]], ranks: int) -> list[list[Piece]]:
    """No order at all."""
    rng = random.Random(5)
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        cuts = sorted({0, count, *(rng.randrange(count + 1) for _ in range(6))})
        for start, stop in pairwise(cuts):
            held[rng.randrange(ranks)].append(Piece(name, start, stop, 0, 0))
    return held


SHAPES = {"a": (7, 5), "b": (3,), "c": (), "d": (16,), "e": (1, 61)}


@pytest.mark.parametrize("cut", [as_zero3, as_zero2, scattered])
@pytest.mark.parametrize("ranks", [1, 40])
def test_every_element_is_found_where_it_lies(cut: Any, ranks: int) -> None:
    held = cut(SHAPES, ranks)
    ownership = ownership_of([numbers_of(pieces, list(SHAPES)) for pieces in held], SHAPES)
    where = {(p.name, p.start): (rank, p.stop) for rank, pieces in enumerate(held) for p in pieces}
    for name, shape in SHAPES.items():
        count = int(np.prod(shape))
        owner = np.full(count, -1)
        for (piece, start), (rank, stop) in where.items():
            if piece == name:
                owner[start:stop] = rank
        for start in range(count):
            for stop in {start + 1, min(start + 9, count)}:
                found = list(holders(ownership[name], shape, start, stop))
                assert all(where[name, first] == (rank, last) for rank, first, last in found)
                assert all(first < stop and last > start for _, first, last in found)
                seen = np.concatenate([np.full(min(last, stop) - max(first, start), r) for r, first, last in found])
                assert np.array_equal(seen, owner[start:stop])


def test_a_parameter_that_all_ranks_share_is_one_row() -> None:
    shapes = {f"blocks.{number}.weight": (1024, 4096 + number) for number in range(20)} | {"bias": (5,)}
    held = as_zero3(shapes, 1024)
    ownership = ownership_of([numbers_of(pieces, list(shapes)) for pieces in held], shapes)
    assert all(len(rows) == 1 for rows in ownership.values())


def test_the_record_of_many_ranks_stays_small(tmp_path: Path) -> None:
    """As many parameters as a large model's: of 1,024 ranks that were 731,136 rows."""
    alone: Any = HandMade(values(1))
    record = CheckpointRecord.read(save(tmp_path, alone, ALONE, Progress(1), identity()))
    shapes = {f"blocks.{number // 20}.part{number % 20}.weight": (2048, 2048) for number in range(714)}
    files = {f"rank-{rank:05d}.safetensors": record.files["config.yaml"] for rank in range(1024)}
    held = as_zero3(shapes, 1024)
    changes = {"shapes": shapes, "files": files}
    changes["ownership"] = ownership_of([numbers_of(pieces, list(shapes)) for pieces in held], shapes)
    text = record.model_copy(update=changes).text()
    assert len(text) < 500_000
    (tmp_path / "checkpoint.json").write_text(text)
    again = CheckpointRecord.read(tmp_path)
    file, first, last = next(again.holders("blocks.3.part7.weight", 4096 * 700, 4096 * 700 + 1))
    assert (file, first, last) == ("rank-00700.safetensors", 4096 * 700, 4096 * 701)


def saved_by(world: World, folder: str) -> list[str]:
    """Each rank's part of one checkpoint; and what each rank was sent."""
    partition: Any = HandMade(values(3), world.rank, world.size)
    sent: list[str] = []
    original = World.gather

    def gather(self: World, value: Any) -> list[Any]:
        everything = original(self, value)
        sent.extend(type(one).__name__ for one in everything if one is not None)
        return everything

    World.gather = gather  # type: ignore[method-assign]
    save(Path(folder), partition, world, Progress(9), identity())
    return sent


def test_ranks_other_than_0_are_sent_no_others_pieces(tmp_path: Path) -> None:
    sent = run_ranks(saved_by, 3, tmp_path, folder=str(tmp_path / "checkpoints"))
    assert sent == [[], [], []]
    from mvar.checkpoint.loading import CheckpointReader
    from mvar.run.names import folder_of

    reader = CheckpointReader(folder_of(tmp_path / "checkpoints", 9))
    whole = values(3)["exp_avg"]["head.weight"].flatten()
    assert torch.equal(reader.read("head.weight", "exp_avg", 0, 15), whole)
    assert json.loads((reader.folder / "checkpoint.json").read_text())["format_version"] == 3
    assert World(Place("alone"), torch.device("cpu")).gather_to_main(7) == [7]
