"""Saved states of a tokenizer's training: what a kill, a full disk or a flipped bit leaves."""

import errno
import os

import pytest
import torch

from mvar.errors import CheckpointError, WriteError
from mvar.tokenizer.training.state import StateFile, TokenizerTrainingState


def some_state(step: int) -> TokenizerTrainingState:
    return TokenizerTrainingState(step, {"model.a": torch.full((2, 3), float(step))}, {"lr": 0.1, "geometry.phis": 4})


def same(a: TokenizerTrainingState, b: TokenizerTrainingState) -> bool:
    tensors = all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    return tensors and a.tensors.keys() == b.tensors.keys() and (a.step, a.identity) == (b.step, b.identity)


def test_the_newest_and_the_one_before_are_kept(tmp_path):
    file = StateFile(tmp_path)
    assert not file.exists()
    for step in (1, 2, 3):
        file.write(some_state(step))
    assert same(file.read(), some_state(3))
    os.replace(file.before, file.path)
    assert same(file.read(), some_state(2))
    assert sorted(os.listdir(tmp_path)) == ["state.safetensors"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_the_one_before_is_kept_also_where_there_are_no_hard_links(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    file = StateFile(tmp_path)
    for step in (1, 2, 3):
        file.write(some_state(step))
    assert same(file.read(), some_state(3)) and len(os.listdir(tmp_path)) == 2
    os.replace(file.before, file.path)
    assert same(StateFile(tmp_path).read(), some_state(2))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\1", lambda data: b""])
def test_damage_falls_back_loudly_and_is_not_kept(tmp_path, voice, capsys, damage):
    file = StateFile(tmp_path)
    file.write(some_state(1))
    file.write(some_state(2))
    file.path.write_bytes(damage(file.path.read_bytes()))
    assert same(file.read(), some_state(1))
    assert "WARNING: training state" in (told := capsys.readouterr().err)
    assert "state-before.safetensors, step 1" in told
    file.write(some_state(3))
    assert same(StateFile(tmp_path).read(), some_state(3))
    os.replace(file.before, file.path)
    assert same(StateFile(tmp_path).read(), some_state(1))


def test_both_damaged_is_an_error(tmp_path):
    file = StateFile(tmp_path)
    file.path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"state\.safetensors: damaged"):
        file.read()
    file.before.write_bytes(b"y")
    with pytest.raises(CheckpointError, match=r"state-before\.safetensors: damaged"):
        file.read()


def test_a_full_disk_leaves_the_states_before(tmp_path, monkeypatch):
    file = StateFile(tmp_path)
    file.write(some_state(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"state\.safetensors.*No space left.*what is complete is kept"):
        file.write(some_state(2))
    assert same(StateFile(tmp_path).read(), some_state(1))


def test_another_training_is_named_by_what_differs(tmp_path):
    path = tmp_path / "state.safetensors"
    some_state(1).require_same(path, {"lr": 0.1, "geometry.phis": 4})
    with pytest.raises(CheckpointError, match=r"geometry\.phis: 4 then, None now; lr: 0\.1 then, 0\.2 now"):
        some_state(1).require_same(path, {"lr": 0.2})
