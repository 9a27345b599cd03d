"""Views: sizes, the published resize, and crops that are pure functions of (seed, key, view)."""

import numpy as np
import pytest
from PIL import Image

from mvar.errors import ConfigError
from mvar.images.views import ViewPlan, centre_view, random_crop_view, resize_shorter_side


def noise(width=40, height=30):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def coordinates(width, height):
    """A picture whose red and green tell where a pixel comes from."""
    down, across = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([across, down, np.zeros_like(down)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("size_in", "expected"),
    [((500, 375), (384, 288)), ((375, 500), (288, 384)), ((100, 100), (288, 288)), ((288, 400), (288, 400))],
)
def test_the_shorter_side_becomes_one_and_an_eighth_times_the_size(size_in, expected):
    assert resize_shorter_side(noise(*size_in), 256).size == expected


def test_the_resize_is_lanczos_of_the_whole_image():
    image = noise(100, 80)
    assert np.array_equal(resize_shorter_side(image, 32), image.resize((45, 36), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("size_in", [(40, 30), (17, 90), (1, 1), (64, 64), (300, 2)])
@pytest.mark.parametrize("resize", [1.0, 1.125, 1.5])
def test_views_have_their_size_whatever_the_image(size_in, resize):
    image = noise(*size_in)
    for view in (centre_view(image, 16, resize), random_crop_view(image, 16, 0, "a", 0, resize)):
        assert view.shape == (16, 16, 3)
        assert view.dtype == np.uint8


def test_the_centre_view_is_the_centre():
    view = centre_view(coordinates(48, 36), 32)  # The shorter side is already 1.125 x 32.
    assert view[0, 0].tolist() == [8, 2, 0]
    assert view[-1, -1].tolist() == [39, 33, 0]


def test_without_margin_and_at_size_the_view_is_the_image():
    image = noise(32, 32)
    assert np.array_equal(centre_view(image, 32, resize=1.0), np.asarray(image))
    assert np.array_equal(random_crop_view(image, 32, 5, "key", 3, resize=1.0), np.asarray(image))


def test_a_crop_is_a_function_of_seed_key_and_view():
    image = noise(200, 100)
    first = random_crop_view(image, 32, 0, "a/1", 0)
    assert np.array_equal(first, random_crop_view(image, 32, 0, "a/1", 0))
    others = [(1, "a/1", 0), (0, "a/2", 0), (0, "a/1", 1)]
    assert not any(np.array_equal(first, random_crop_view(image, 32, *other)) for other in others)


def test_crops_have_their_fixed_places():
    # A change here changes the codes of every store: the same command would no longer make the same bytes.
    image = coordinates(60, 36)
    places = [random_crop_view(image, 32, 0, "a/1", view)[0, 0, :2].tolist() for view in range(4)]
    assert places == [[27, 2], [18, 4], [28, 0], [14, 3]]


def test_crops_reach_every_place_about_equally_often():
    image = coordinates(40, 36)
    corners = np.array([random_crop_view(image, 32, 0, str(key), 0)[0, 0, :2] for key in range(3000)])
    for axis, places in ((0, 9), (1, 5)):
        counts = np.bincount(corners[:, axis], minlength=places)
        assert len(counts) == places
        assert ((counts - 3000 / places) ** 2 / (3000 / places)).sum() < 27


def test_a_plan_renders_the_views_that_it_names():
    image = coordinates(60, 36)
    plan = ViewPlan(32, random_crops=2, center=True, hflip="both")
    assert plan.names == ("center", "center-mirror", "crop0", "crop0-mirror", "crop1", "crop1-mirror")
    views = plan.render(image, 3, "k")
    assert views.shape == (6, 32, 32, 3)
    assert np.array_equal(views[0], centre_view(image, 32))
    for number in range(2):
        assert np.array_equal(views[2 + 2 * number], random_crop_view(image, 32, 3, "k", number))
    assert np.array_equal(views[1::2], views[0::2, :, ::-1])


def test_adding_views_leaves_the_others_as_they_are():
    few = ViewPlan(32, random_crops=1).render(noise(), 0, "k")
    many = ViewPlan(32, random_crops=4, center=True).render(noise(), 0, "k")
    assert np.array_equal(few[0], many[1])


def test_ten_crop_is_the_corners_and_the_centre_with_their_mirrors():
    plan = ViewPlan(32, random_crops=0, ten_crop=True)
    assert len(plan.names) == 10
    views = plan.render(coordinates(60, 36), 0, "k")
    corners = {name: tuple(view[0, 0, :2].tolist()) for name, view in zip(plan.names, views, strict=True)}
    plain = {name: place for name, place in corners.items() if not name.endswith("mirror")}
    assert sorted(plain.values()) == [(0, 0), (0, 4), (14, 2), (28, 0), (28, 4)]
    assert np.array_equal(views[1::2], views[0::2, :, ::-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_crops": 0}, "ask for at least one"),
        ({"ten_crop": True, "hflip": "both"}, "ten_crop holds the centre and the mirrors"),
    ],
)
def test_a_plan_without_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ViewPlan(32, **options)


def test_a_resize_smaller_than_the_crop_is_refused():
    with pytest.raises(ConfigError, match=r"resize: got 0\.5"):
        centre_view(noise(), 16, resize=0.5)
