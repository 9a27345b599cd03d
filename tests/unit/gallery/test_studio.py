"""Pictures of a gallery: the bytes of `mvar sample`, scale by scale, two at once, and given up in the middle."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from mvar.cli import main as mvar
from mvar.errors import CheckpointError, ConfigError
from mvar.gallery.entries import Exhibit, entries_of
from mvar.gallery.studio import KEPT, Studio
from mvar.gallery.wish import HowFields, Wish, command_line, wish_of
from mvar.sampling.packing import encode_png
from mvar.testing.tiny_pairs import CLASSES, PYRAMID, SIDE_PX, write_pair

HOW = HowFields(cfg="2", top_k="20")


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[Exhibit]:
    """Three models: the second has the first one's tokenizer, the third its own."""
    found = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        write_pair(folder, seed=seed)
        tokenizer = found[0].tokenizer if seed == 1 else folder / "tokenizer.safetensors"
        found.append(Exhibit(f"model {seed}", folder / "model.safetensors", tokenizer))
    return found


@pytest.fixture
def studio() -> Studio:
    return Studio(torch.device("cpu"))


def wish(how: HowFields = HOW) -> Wish:
    return wish_of("0,2-3", 2, 7, how, CLASSES, None)


def test_the_last_frame_is_what_the_shown_command_writes_byte_for_byte(
    entries: list[Exhibit], studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = list(studio.frames(entries[0], wish()))
    assert [frame.scale for frame in frames] == list(range(len(PYRAMID))) and frames[-1].last
    assert all(frame.images_BHWC.shape == (6, SIDE_PX, SIDE_PX, 3) for frame in frames)
    assert len({frame.images_BHWC.tobytes() for frame in frames}) == len(PYRAMID)  # It grows.
    monkeypatch.chdir(tmp_path)
    assert mvar([*shlex.split(command_line(entries[0], wish(), HOW))[1:], "--device", "cpu"]) == 0
    assert (tmp_path / "samples.png").read_bytes() == encode_png(wish().sheet(frames[-1].images_BHWC))


def test_two_settings_and_two_models_are_drawn_with_the_same_seeds(entries: list[Exhibit], studio: Studio) -> None:
    alone = list(studio.frames(entries[0], wish()))[-1]
    plain = wish(HowFields(cfg="0", top_k="20"))
    for other, asked in ((entries[0], plain), (entries[1], wish())):
        *_, (left, right) = studio.side_by_side((entries[0], wish()), (other, asked))
        assert left.images_BHWC.tobytes() == alone.images_BHWC.tobytes() != right.images_BHWC.tobytes()


def test_models_of_different_tokenizers_are_not_compared_and_the_next_wish_is_drawn(
    entries: list[Exhibit], studio: Studio
) -> None:
    with pytest.raises(ConfigError, match=r"model 0 and model 2 speak the codes of different tokenizers"):
        next(studio.side_by_side((entries[0], wish()), (entries[2], wish())))
    assert len(list(studio.frames(entries[2], wish()))) == len(PYRAMID)


def test_a_drawing_that_is_given_up_holds_nothing(entries: list[Exhibit], studio: Studio) -> None:
    expected = [frame.images_BHWC.tobytes() for frame in studio.frames(entries[0], wish())]
    given_up = studio.frames(entries[0], wish())
    next(given_up)  # A browser went away, and nobody closes the drawing.
    assert [frame.images_BHWC.tobytes() for frame in studio.frames(entries[0], wish())] == expected
    assert len(list(given_up)) == len(PYRAMID) - 1


def test_few_models_are_kept_and_one_that_cannot_be_read_disturbs_none(entries: list[Exhibit], studio: Studio) -> None:
    ready = [studio.open(entry) for entry in entries]
    assert studio.open(entries[2]) is ready[2] and studio.open(entries[1]) is ready[1] and KEPT == 2
    assert studio.open(entries[0]) is not ready[0]
    with pytest.raises(CheckpointError):
        studio.open(Exhibit("none", entries[0].tokenizer, entries[0].tokenizer))
    assert studio.open(entries[0]).num_classes == CLASSES


def test_entries_of_files_need_a_tokenizer_each_or_one_for_all(entries: list[Exhibit]) -> None:
    weights = [entry.weights for entry in entries]
    found = entries_of(weights, [entries[0].tokenizer])
    assert list(found) == [str(path) for path in weights]  # All are called model.safetensors.
    assert list(entries_of(weights[:1], [entries[0].tokenizer])) == ["model.safetensors"]
    with pytest.raises(ConfigError, match="nothing tells which tokenizer"):
        entries_of(weights)
    with pytest.raises(ConfigError, match="2 files for 3"):
        entries_of(weights, [entries[0].tokenizer] * 2)
    with pytest.raises(CheckpointError, match="no such file"):
        entries_of([Path("none")])
