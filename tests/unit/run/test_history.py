"""history.jsonl tells what each start ran on, beside how it ended."""

from __future__ import annotations

from pathlib import Path

import torch

from mvar.run.history import History
from mvar.run.launcher import Place
from mvar.run.world import World
from tests.golden import REPOSITORY


def test_a_start_notes_versions_devices_and_commit_and_the_newest_counts(tmp_path: Path) -> None:
    history = History(tmp_path)
    assert history.environment() == {}
    with history.recording(world=2):
        history.runs_on("8 x an older GPU")
        history.runs_on("2 x GPU")
        history.going_on(7)
        history.end(0, 9, "finished")
    found = history.environment()
    assert found["device"] == "2 x GPU" and found["versions"]["torch"] == torch.__version__
    if (REPOSITORY / ".git").exists():
        assert len(found["commit"]) == 40 and isinstance(found["uncommitted_changes"], bool)
    (start,) = history.starts()  # An event of its own: it does not disturb those that were there before.
    assert (start.begin_step, start.end_step, start.code) == (7, 9, 0)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    History(tmp_path, writes=False).runs_on("cpu")
    assert not list(tmp_path.iterdir())


def test_devices_are_told_in_words() -> None:
    world = World(Place("none", size=2, local_size=2), torch.device("cpu"), own_cores=3)
    assert world.devices.startswith("2 x ") and world.devices.endswith("CPU (3 cores a rank)")
