"""Writing checkpoints while training goes on: what is saved, when it exists, what failures do."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mvar.checkpoint import saver, tensors
from mvar.checkpoint.choosing import retain, verify
from mvar.checkpoint.loading import CheckpointReader
from mvar.checkpoint.record import RECORD, CheckpointRecord, Progress
from mvar.checkpoint.saver import Saver
from mvar.config import CheckpointConfig
from mvar.errors import CheckpointError, WriteError
from mvar.log import Chosen
from mvar.run.names import folder_of, steps_in
from tests.unit.checkpoint.test_checkpoint import ALONE, HandMade, identity, values


class Gate:
    """Holds writers back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.writing = threading.Event(), threading.Event()
        original: Any = tensors._chunks

        def chunks(*arguments: Any) -> Iterator[Any]:
            self.writing.set()
            self.open.wait()
            yield from original(*arguments)

        monkeypatch.setattr(tensors, "_chunks", chunks)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.open.set()


def make(folder: Path, tensors: Any, **settings: Any) -> Saver:
    partition: Any = HandMade(tensors)
    return Saver(folder, partition, ALONE, identity(), CheckpointConfig(**settings))


def weights(folder: Path, step: int) -> torch.Tensor:
    return CheckpointReader(folder_of(folder, step)).read("head.weight", "weight", 0, 15)


def test_what_is_saved_is_the_moment_of_the_call_and_exists_after_settling(tmp_path: Path, gate: Gate) -> None:
    tensors = values(1)
    before = tensors["weight"]["head.weight"].flatten().clone()
    saving = make(tmp_path, tensors)
    assert saving.save(Progress(1)) == [] and not saving.ended
    gate.writing.wait()
    tensors["weight"]["head.weight"].add_(1)  # Training goes on.
    assert steps_in(tmp_path) == []
    gate.open.set()
    (saved,) = saving.settle()
    assert saved.step == 1 and saved.error is None and 0 <= saved.stall_s <= saved.seconds
    assert steps_in(tmp_path) == [1] and torch.equal(weights(tmp_path, 1), before)
    assert saving.settle() == [] and not saving.ended


def test_a_second_one_waits_for_the_first_and_uses_the_same_memory(tmp_path: Path, gate: Gate) -> None:
    tensors = values(1)
    saving = make(tmp_path, tensors)
    saving.save(Progress(1))
    buffer: Any = saving._snapshot._buffer
    tensors["weight"]["head.weight"].zero_()
    threading.Timer(0.2, gate.open.set).start()
    assert [saved.step for saved in saving.save(Progress(2))] == [1]
    assert saving._snapshot._buffer is buffer
    saving.settle()
    assert torch.equal(weights(tmp_path, 1), values(1)["weight"]["head.weight"].flatten())
    assert not weights(tmp_path, 2).any()


def test_the_last_one_exists_when_the_call_returns(tmp_path: Path) -> None:
    saving = make(tmp_path, values(1))
    saving.save(Progress(1))
    assert [saved.step for saved in saving.save(Progress(2), last=True)] == [1, 2]
    assert steps_in(tmp_path) == [1, 2]


def test_without_memory_for_a_snapshot_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "available_memory", lambda: 100)
    saving = make(tmp_path, values(1))
    for step in (1, 2):
        assert [saved.step for saved in saving.save(Progress(step))] == [step]
    assert saving._snapshot._buffer is None
    assert saving.chosen == Chosen("saving", "training waits", "1 ranks lack memory for a snapshot", slow=True)


def test_how_it_saves_is_told(tmp_path: Path) -> None:
    assert make(tmp_path, values(1)).chosen == Chosen("saving", "while training goes on")
    assert make(tmp_path, values(1), background="off").chosen == Chosen("saving", "training waits")


def noted(folder: Path, step: int) -> float | None:
    verify(folder_of(folder, step))
    return CheckpointRecord.read(folder_of(folder, step)).progress.validation_loss


def test_a_validation_after_the_save_is_noted_in_its_checkpoint(tmp_path: Path, gate: Gate) -> None:
    saving = make(tmp_path, values(1))
    saving.save(Progress(1))
    saving.validated(1, 2.5)  # While it is being written.
    gate.open.set()
    saving.settle()
    assert noted(tmp_path, 1) == 2.5
    saving.save(Progress(2), last=True)
    assert noted(tmp_path, 2) is None
    before = CheckpointRecord.read(folder_of(tmp_path, 2))
    saving.validated(2, 1.5)  # After it was written.
    saving.validated(3, 0.5)  # Of a step that was not saved.
    assert noted(tmp_path, 2) == 1.5 and noted(tmp_path, 1) == 2.5
    after = CheckpointRecord.read(folder_of(tmp_path, 2))
    assert after.model_copy(update={"progress": before.progress}) == before
    assert sorted(path.name for path in folder_of(tmp_path, 2).iterdir()) == sorted([*after.files, RECORD])
    saving.save(Progress(4), last=True)
    retain(tmp_path, last=1, best=True)
    assert steps_in(tmp_path) == [2, 4]


def test_a_validation_that_cannot_be_noted_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saving = make(tmp_path, values(1))
    saving.save(Progress(1), last=True)

    def full(*_: Any) -> None:
        raise WriteError("No space left on device")

    monkeypatch.setattr("mvar.checkpoint.saving.write_text", full)
    saving.validated(1, 2.5)
    assert "its validation loss 2.5000 is not noted: No space left" in caplog.text
    assert noted(tmp_path, 1) is None


@pytest.mark.parametrize("background", ["auto", "off"])
def test_a_failure_is_told_once_and_leaves_the_older_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    saving = make(tmp_path, values(1), on_failure="go_on", background=background)
    saving.save(Progress(1))
    saving.settle()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        (failed,) = saving.save(Progress(2))
        assert failed.step == 2 and "Free space" in (failed.error or "")
        with pytest.raises(CheckpointError, match="Free space"):
            saving.save(Progress(3), last=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    saving.save(Progress(4), last=True)
    assert steps_in(tmp_path) == [1, 4]


def test_a_writer_that_fails_in_the_background_raises_when_it_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunks(*_: Any) -> Iterator[Any]:
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr(tensors, "_chunks", chunks)
    saving = make(tmp_path, values(1))
    saving.save(Progress(1))
    with pytest.raises(WriteError, match=r"step-000000001: cannot be written \(Input/output error"):
        saving.settle()
    assert list(tmp_path.iterdir()) == []
    assert saving.settle() == []
