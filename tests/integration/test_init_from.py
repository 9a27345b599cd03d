"""A run that begins with the weights of another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvar.checkpoint.loading import CheckpointReader
from mvar.run.names import folder_of
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import Ranks
from mvar.testing.tiny_runs import losses, records, template, write_config


def run(folder: Path, config: Path, ranks: int, *arguments: str, expected: int = 0) -> str:
    argv = ["--config", str(config), *arguments]
    job = Ranks("mvar.testing.ranks:command", ["mvar.train", argv], ranks, folder / "logs")
    assert job.wait() == [expected] * ranks, job.output()
    return job.output()


def test_a_run_begins_with_the_weights_of_another_on_any_ranks_and_pyramid(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    first = write_config(tmp_path, store, "first")
    run(tmp_path, first, 1)
    learned = records(tmp_path / "first", "val")[-1]["loss"]

    begins = []
    for ranks, stage, path in ((1, 1, "first"), (2, 3, "first/checkpoints/step-000000025")):
        again = write_config(tmp_path, store, f"again{ranks}", stage=stage, init_from=str(tmp_path / path))
        text = run(tmp_path, again, ranks, "max_steps=2", "optim.ema_decay=0.5")
        assert "beginning with the weights of" in text
        begins.append(losses(tmp_path / f"again{ranks}"))
        saved = CheckpointReader(folder_of(tmp_path / f"again{ranks}" / "checkpoints", 2))
        assert saved.record.progress.samples == 16 and saved.record.progress.adam_steps == 2
    assert begins[1] == pytest.approx(begins[0], rel=1e-5)
    assert begins[0][0] < losses(tmp_path / "first")[0] - 0.5

    # Resuming does not begin again, and does not need the source any more.
    resumed = run(tmp_path, again, 2, "max_steps=3", "init_from=nowhere", "optim.ema_decay=0.5")
    assert "going on from step-000000002" in resumed

    finer = make_store(tmp_path / "finer", patch_nums=(1, 2, 3, 4))
    larger = write_config(tmp_path, finer, "larger", model__patch_nums=[1, 2, 3, 4], init_from=str(tmp_path / "first"))
    run(tmp_path, larger, 1, "max_steps=1")
    known_scales = records(tmp_path / "larger")[0]["loss_per_scale"][:3]
    assert max(known_scales) < learned + 0.3  # What the smaller pyramid knew is still known.

    wider = write_config(tmp_path, store, "wider", model__width=128, init_from=str(tmp_path / "first"))
    assert "128" in run(tmp_path, wider, 1, f"engine.ds_config={template(tmp_path, 1)}", expected=2)
