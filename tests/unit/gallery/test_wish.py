"""A form's fields as a wish, and as the command that draws the same."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mvar.errors import ConfigError
from mvar.gallery.entries import Exhibit
from mvar.gallery.wish import MOST, HowFields, Wish, command_line, wish_of
from mvar.sampling.arguments import arguments, sampling_options
from mvar.sampling.classes import parse_classes
from mvar.sampling.options import DEFAULTS, SamplingOptions
from mvar.sampling.pictures import Picture

NAMES = ("cat", "dog", "3", "bird")
ENTRY = Exhibit("a run, step 7", Path("runs/it's mine"), Path("tok.safetensors"), 7)


def wish(classes: str = "0", how: HowFields | None = None, per_class: float = 2, seed: float = 5) -> Wish:
    return wish_of(classes, per_class, seed, how or HowFields(), len(NAMES), NAMES)


def test_untouched_fields_are_the_defaults_and_need_no_flags() -> None:
    assert wish().options == DEFAULTS and HowFields().flags == []


def test_pictures_come_row_by_row_with_the_seeds_of_mvar_sample() -> None:
    found = wish("dog,0")
    assert found.pictures == [Picture(0, 0), Picture(0, 1), Picture(1, 0), Picture(1, 1)]
    assert found.seeds == [picture.seed(5) for picture in found.pictures]


def test_all_options_reach_the_sampler() -> None:
    how = HowFields(" 0,1,2 ", "ramp", "1-2", "5", "0.5", "0.7,1,1", True)
    assert wish(how=how).options == SamplingOptions((0.0, 1.0, 2.0), 5, 0.5, True, (0.7, 1.0, 1.0), "ramp", (1, 2))


def test_the_command_says_all_that_the_form_does() -> None:
    how = HowFields("2.5", "constant", "1-2", "5", "0.5", "0.7", True)
    words = shlex.split(command_line(ENTRY, wish("2-3,dog", how), how, NAMES))
    assert words[:2] == ["mvar", "sample"]
    args = arguments(None).parse_args(words[2:])
    assert args.weights == ENTRY.weights and args.step == 7 and args.tokenizer == ENTRY.tokenizer
    assert sampling_options(args) == how.options()
    assert parse_classes(args.classes, len(NAMES), NAMES) == [1, 2, 3]  # 3 is the name of class 2.
    assert (args.per_class, args.seed, args.batch) == ("2", 5, 6)
    assert (args.grid_classes, args.grid_per_class, args.no_images) == (3, 2, True)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"classes": "horse"}, "no class is called 'horse'"),
        ({"classes": "0-9"}, "not within 0-3"),
        ({"classes": ""}, "no class is called ''"),
        ({"per_class": 0}, "images of each class 0: expected a whole number"),
        ({"per_class": MOST + 1}, f"more than the {MOST} images of one click"),
        ({"seed": 1.5}, "seed 1.5: expected a whole number"),
        ({"seed": None}, "seed None"),
        ({"how": HowFields(cfg="much")}, "--cfg much: expected a number"),
        ({"how": HowFields(top_p="2")}, "expected top_k >= 0 and top_p from 0 to 1"),
    ],
)
def test_what_cannot_be_is_one_message(given: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        wish(**given)  # type: ignore[arg-type]
