"""Checkpoints: complete or absent, never believed when damaged, readable by any number of ranks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvar.checkpoint import saving
from mvar.checkpoint.choosing import choose, retain, verify
from mvar.checkpoint.loading import CheckpointReader
from mvar.checkpoint.ownership import numbers_of, ownership_of
from mvar.checkpoint.partition import KINDS, Piece
from mvar.checkpoint.record import FORMAT_VERSION, CheckpointRecord, Identity, Progress, differences, key_of
from mvar.checkpoint.saving import save
from mvar.checkpoint.tensors import write_tensors
from mvar.checkpoint.weights import load_weights
from mvar.config import ModelConfig, TrainConfig
from mvar.errors import CheckpointError, WriteError
from mvar.files.disk import synced
from mvar.run.launcher import Place
from mvar.run.names import folder_of, steps_in
from mvar.run.world import World
from tests.exports import save_weights

SHAPES = {"head.weight": (5, 3), "head.bias": (5,), "scale": (1, 1)}
ALONE = World(Place("alone"), torch.device("cpu"))


class HandMade:
    """A partition without DeepSpeed: the part of `rank` of `ranks`, each parameter cut into equal runs."""

    stage = 2
    kinds = KINDS
    bytes_of_all = bytes_owned = 4 * len(KINDS) * 21

    def __init__(self, values: dict[str, dict[str, Tensor]], rank: int = 0, ranks: int = 1) -> None:
        self.shapes = SHAPES
        self._values = values
        self.adam_steps = 3
        self.owned = []
        for number, (name, shape) in enumerate(SHAPES.items()):
            count = torch.Size(shape).numel()
            start, stop = count * rank // ranks, count * (rank + 1) // ranks
            if stop > start:
                self.owned.append(Piece(name, start, stop, number, start))

    def layout(self) -> list[tuple[Piece, str]]:
        return [(piece, kind) for piece in self.owned for kind in KINDS]

    def blocks(self) -> Iterator[tuple[Piece, str, Tensor]]:
        for piece, kind in self.layout():
            yield piece, kind, self._values[kind][piece.name].flatten()[piece.start : piece.stop]


def values(seed: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for kind in KINDS}


def identity(**changes: Any) -> Identity:
    tree: dict[str, Any] = {"run": "r", "data": {"store": "s"}, "model": {"depth": 2}} | changes
    config = TrainConfig.model_validate(tree)
    return Identity(config, config.model.model_copy(update={"num_classes": 10}), "0" * 64, {"torch": "2"})


def saved(checkpoints: Path, step: int, seed: int = 0) -> Path:
    partition: Any = HandMade(values(seed))
    return save(checkpoints, partition, ALONE, Progress(step, step * 8, step, 0, {"cur_scale": 0.1}), identity())


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, 123)
    assert folder.name == "step-000000123"
    reader = CheckpointReader(folder)
    assert reader.record.progress == Progress(123, 984, 123, 0, {"cur_scale": 0.1})
    for kind, tensors in values(0).items():
        for name, expected in tensors.items():
            assert torch.equal(reader.read(name, kind, 0, expected.numel()), expected.flatten())
    assert torch.equal(reader.read("head.weight", "exp_avg", 4, 9), values(0)["exp_avg"]["head.weight"].flatten()[4:9])
    # Any safetensors reader can open the file.
    assert load_file(folder / "rank-00000.safetensors")["weight/head.bias"].shape == (5,)


def test_pieces_of_many_ranks_are_read_across_their_borders(tmp_path: Path) -> None:
    parts, files = [], {}
    for rank in range(4):
        partition = HandMade(values(7), rank, 4)
        layout = [(key_of(piece.name, kind), (piece.count,)) for piece, kind in partition.layout()]
        name = f"rank-{rank:05d}.safetensors"
        with synced(tmp_path / name) as file:
            record = write_tensors(file, layout, (v for *_, v in partition.blocks()), {})
        parts.append(numbers_of(partition.owned, list(SHAPES)))
        files[name] = record
    one: Any = HandMade(values(7))
    template = CheckpointRecord.read(save(tmp_path / "one", one, ALONE, Progress(1), identity()))
    many = template.model_copy(update={"ownership": ownership_of(parts, SHAPES), "files": files})
    (tmp_path / "checkpoint.json").write_text(many.text())
    verify(tmp_path)
    reader = CheckpointReader(tmp_path)
    whole = values(7)["weight"]["head.weight"].flatten()
    for start in range(15):
        for stop in range(start + 1, 16):
            assert torch.equal(reader.read("head.weight", "weight", start, stop), whole[start:stop])


def damages() -> list[tuple[str, Callable[[Path], None]]]:
    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(bytes(data))

    return [
        ("truncated", truncate),
        ("emptied", lambda path: path.write_bytes(b"")),
        ("flipped", flip),
        ("removed", lambda path: path.unlink()),
    ]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "checkpoint.json"])
@pytest.mark.parametrize(("how", "damage"), damages(), ids=[name for name, _ in damages()])
def test_damage_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, file: str, how: str, damage: Callable[[Path], None], voice: None, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "checkpoints"
    saved(checkpoints, 1, seed=1)
    damage(saved(checkpoints, 2, seed=2) / file)
    with pytest.raises(CheckpointError, match=file):
        verify(folder_of(checkpoints, 2))
    with pytest.raises(CheckpointError):
        load_weights(tmp_path, step=2)
    _, state = load_weights(tmp_path)
    assert torch.equal(state["head.bias"], values(1)["weight"]["head.bias"])
    assert choose(checkpoints, ALONE) == folder_of(checkpoints, 1)
    assert "WARNING: damaged checkpoint set aside as step-000000002.damaged" in capsys.readouterr().err
    assert steps_in(checkpoints) == [1]
    damage(folder_of(checkpoints, 1) / file)
    assert choose(checkpoints, ALONE) is None


def test_trusting_sizes_skips_reading_but_not_sizes(tmp_path: Path) -> None:
    weights = saved(tmp_path, 1) / "rank-00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert choose(tmp_path, ALONE, trust_sizes=True) == folder_of(tmp_path, 1)
    weights.write_bytes(bytes(data[:-1]))
    assert choose(tmp_path, ALONE, trust_sizes=True) is None


def test_a_newer_format_is_not_called_damaged(tmp_path: Path) -> None:
    path = saved(tmp_path, 1) / "checkpoint.json"
    tree = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="Update it"):
        verify(path.parent)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_write_synced", full)
    with pytest.raises(WriteError, match=r"step-000000002: cannot be written \(No space left on device"):
        saved(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="Free space"):
        saved(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_a_half_written_folder_is_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / ".tmp-step-000000002").mkdir()
    (tmp_path / "step-2").mkdir()
    assert steps_in(tmp_path) == [1]


def test_a_step_is_saved_where_nfs_keeps_a_file_of_its_first_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank, or a process that is about to die, still has it open."""
    hidden = tmp_path / ".tmp-step-000000002" / ".nfs0001"
    hidden.parent.mkdir()
    hidden.touch()
    unlink = os.unlink

    def busy(path: Any, *, dir_fd: int | None = None) -> None:
        if Path(path).name == hidden.name:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", busy)
    saved(tmp_path, 2)
    verify(folder_of(tmp_path, 2))
    assert steps_in(tmp_path) == [2]


def test_only_the_newest_are_kept_and_never_only_damaged_ones(tmp_path: Path) -> None:
    for step in range(1, 6):
        saved(tmp_path, step)
    retain(tmp_path, last=3)
    assert steps_in(tmp_path) == [3, 4, 5]
    for step in (4, 5):
        (folder_of(tmp_path, step) / "checkpoint.json").unlink()
    retain(tmp_path, last=2)
    assert steps_in(tmp_path) == [3, 4, 5]
    assert not list(tmp_path.glob(".trash-*"))


def test_of_checkpoints_that_were_set_aside_the_newest_of_each_kind_is_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        saved(tmp_path, step)
    aside = ["3.damaged", "3.damaged-1", "9.damaged", "7.diverged", "8.diverged", "7.diverged-1", "7.diverged-2"]
    for age, name in enumerate(aside):
        step, why = name.split(".")
        folder = tmp_path / f"step-{int(step):09d}.{why}"
        folder.mkdir()
        (folder / "checkpoint.json").write_text("{}")
        os.utime(folder, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "step-000000007.diverged.mine").mkdir()  # A user's own.
    retain(tmp_path, last=2)
    assert steps_in(tmp_path) == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000003.damaged",
        "step-000000004",
        "step-000000005",
        "step-000000007.diverged",
        "step-000000007.diverged.mine",
    ]


def test_set_aside_in_one_moment_the_later_step_counts_as_newer(tmp_path: Path) -> None:
    for name in ("step-000000007.diverged", "step-000000009.diverged", "step-000000009.diverged-10"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    retain(tmp_path, last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000009.diverged-10"]


def test_every_nth_and_the_best_validated_are_kept_besides(tmp_path: Path) -> None:
    losses = {1: None, 2: 3.0, 3: 2.0, 4: None, 5: 2.5, 6: 2.0, 7: None, 8: None}
    for step, loss in losses.items():
        partition: Any = HandMade(values(step))
        save(tmp_path, partition, ALONE, Progress(step, validation_loss=loss), identity())
    retain(tmp_path, last=2, every=4, best=True)
    assert steps_in(tmp_path) == [3, 4, 7, 8]  # Of equally good ones the first.
    retain(tmp_path, last=1)
    assert steps_in(tmp_path) == [8]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"global_batch": 256}, "global_batch"),
        ({"model": {"depth": 3}}, "model.depth"),
        ({"model": {"depth": 2, "drop_path": 0.5}}, "model.drop_path"),
        ({"model": {"depth": 2, "init": "published"}}, "model.init"),
    ],
)
def test_what_makes_it_another_run(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    record = CheckpointRecord.read(saved(tmp_path, 1))
    assert any(difference.startswith(f"{key}: was ") for difference in differences(record, identity(**changes)))


def test_what_does_not(tmp_path: Path) -> None:
    record = CheckpointRecord.read(saved(tmp_path, 1))
    same = identity(
        run="elsewhere",
        epochs=3,
        model={"depth": 2, "width": 128, "heads": 2, "drop_path": 0.1 * 2 / 24, "mamba_backend": "torch"},
        engine={"precision": "fp32", "micro_batch": 4},
        optim={"base_lr": 1e-3},
        data={"store": "moved"},
    )
    assert differences(record, same) == []


def test_exported_weights_carry_their_configuration(tmp_path: Path) -> None:
    config, state = ModelConfig(depth=2, num_classes=10), values(3)["weight"]
    save_weights(tmp_path / "new" / "weights.safetensors", config, state)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights.safetensors"]
    config_read, state_read = load_weights(tmp_path / "new" / "weights.safetensors")
    assert config_read == config
    assert all(torch.equal(state_read[name], state[name]) for name in state)
    # The same call reads a checkpoint folder and a run folder.
    folder = saved(tmp_path / "run" / "checkpoints", 4, seed=3)
    for place in (folder, tmp_path / "run"):
        assert load_weights(place)[0].num_classes == 10
        assert torch.equal(load_weights(place)[1]["scale"], state["scale"])


def test_places_without_weights_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        load_weights(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_weights(tmp_path / "missing.safetensors")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        load_weights(tmp_path, step=3)
    with synced(tmp_path / "other.safetensors") as file:
        write_tensors(file, [("x", (1,))], [torch.zeros(1)], {})
    with pytest.raises(CheckpointError, match=r"mvar\.model"):
        load_weights(tmp_path / "other.safetensors")
