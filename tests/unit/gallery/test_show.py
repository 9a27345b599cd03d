"""What the page shows: nothing of a file or a field becomes markup."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mvar.errors import ConfigError
from mvar.gallery import show
from mvar.gallery.studio import Growth
from mvar.gallery.wish import HowFields, wish_of
from tests.unit.reporting.runs import transformer_run

BAD = "<script>x</script>"
WISH = wish_of("0-1", 1, 0, HowFields(), 2, (BAD, "dog"))


def frame(scale: int) -> Growth:
    return Growth(scale, 2, np.full((2, 8, 8, 3), 40 * scale, np.uint8))


def test_pictures_can_be_downloaded_once_they_are_done() -> None:
    growing, done = (show.growing([frame(k) for k in range(n)], WISH, None) for n in (1, 2))
    assert "download=" not in growing and 'download="mvar-seed0.png"' in done
    assert growing.count("<span>") == 1 and done.count("<span>") == 2 and "scale 2 of 2" in done
    pair = show.pair((frame(1), frame(1)), (WISH, WISH), ("A: x", "B: y"), None)
    assert 'download="mvar-seed0.png"' in pair and 'download="mvar-seed0-b.png"' in pair


def test_an_edit_without_a_class_says_so() -> None:
    """Its label is the one past the last class, which has no name."""
    wish = dataclasses.replace(WISH, counts={2: 1})
    assert "rows: class 2 (none)" in show.growing([frame(0)], wish, (BAD, "dog"))


def test_names_labels_and_errors_are_escaped() -> None:
    shown = [
        show.growing([frame(0)], WISH, (BAD, "dog")),
        show.pair((frame(0), frame(0)), (WISH, WISH), (BAD, BAD), (BAD, "dog")),
        show.error(ConfigError(BAD)),
        show.classes((BAD, "dog"), 2),
        show.curves(Path(BAD)),
    ]
    assert all("<script" not in text and "&lt;script&gt;" in text for text in shown)


def test_curves_of_a_run_have_its_distances_first_and_a_file_has_none(tmp_path: Path) -> None:
    text = show.curves(transformer_run(tmp_path / "run"))
    assert 0 < text.index("Frechet distance") < text.index("<b>Loss</b>")
    assert "no run folder" in show.curves(tmp_path / "model.safetensors")
