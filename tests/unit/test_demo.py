"""What the demo claims about its killed and resumed training."""

from pathlib import Path

import numpy as np
from PIL import Image

from mvar.demo import Demo, command, compare_losses, draw_samples
from mvar.images.arrays import save_png
from mvar.sampling.job import RECORD, RECORDS


def _steps(first: int, last: int, shift: float = 0.0) -> list[dict[str, object]]:
    return [{"kind": "train", "step": step, "loss": 1 / step + shift} for step in range(first, last + 1)]


def test_only_steps_that_were_computed_twice_count() -> None:
    killed = [{"kind": "resume", "step": 0}, *_steps(1, 150)]
    resumed = [{"kind": "resume", "step": 0}, *_steps(1, 100), {"kind": "resume", "step": 100}, *_steps(101, 200)]
    assert compare_losses(killed, resumed) == (50, True)


def test_one_differing_loss_is_told() -> None:
    resumed = [*_steps(1, 100), {"kind": "resume", "step": 100}, *_steps(101, 149), *_steps(150, 150, shift=1e-16)]
    assert compare_losses(_steps(1, 150), resumed) == (50, False)


def test_nothing_computed_twice_is_no_success() -> None:
    resumed = [*_steps(1, 100), {"kind": "resume", "step": 100}, *_steps(101, 200)]
    assert compare_losses(_steps(1, 100), resumed) == (0, False)


def test_options_and_settings_become_a_command_line() -> None:
    line = command("mvar.train", "word", options={"task": 1}, **{"data.store": "a b"})
    assert line[1:] == ["-m", "mvar.train", "word", "--task", "1", "data.store=a b"]


def test_the_sheet_of_samples_shows_the_classes_of_a_job_in_their_order(tmp_path: Path) -> None:
    demo = Demo(tmp_path, tmp_path / "images", 4)
    for label in (2, 0, 10):
        for number in range(2):
            save_png(demo.samples / f"{label:04d}/{number:05d}.png", np.full((4, 4, 3), 10 * label + number, np.uint8))
    (demo.samples / RECORDS).mkdir()
    (demo.samples / RECORD).write_text("{}")
    draw_samples(demo, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        shown = np.asarray(sheet)[::12, ::12, 0]
    assert shown.tolist() == [[0, 1], [20, 21], [100, 101]]
