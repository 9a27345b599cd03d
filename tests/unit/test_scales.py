"""The pyramid's arithmetic."""

import pytest

from mvar.errors import ConfigError
from mvar.scales import PATCH_NUMS_256, PATCH_NUMS_512, ScalePyramid


def test_published_pyramids_have_the_published_lengths() -> None:
    assert ScalePyramid(PATCH_NUMS_256).total == 680
    assert ScalePyramid(PATCH_NUMS_512).total == 2240


def test_segments_tile_the_sequence() -> None:
    pyramid = ScalePyramid((1, 2, 4))
    assert [pyramid.segment(k) for k in range(3)] == [slice(0, 1), slice(1, 5), slice(5, 21)]


@pytest.mark.parametrize("sides", [(), (0, 1), (2, 2), (3, 1)])
def test_sides_must_rise(sides: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        ScalePyramid(sides)
