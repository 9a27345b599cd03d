"""What was written before the tree had rooms is still read, and gone on with.

The files in tests/data/before_rooms were written by commit dbbe8b5: a store, the third checkpoint of a run of four
steps (run.yaml), the state of a tokenizer's training after three of four steps (tokenizer.yaml), its pictures, and the
tokenizer that it ended with. Both metrics.jsonl go on to the fourth step, which is done again here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvar.checkpoint.choosing import verify
from mvar.checkpoint.weights import load_weights
from mvar.data.store import CodeStore
from mvar.data.stream import TrainStream
from mvar.testing.ranks import Ranks
from mvar.testing.tiny_runs import records
from mvar.tokenizer.files import load_tokenizer
from tests.golden import REPOSITORY
from tests.stores import synthetic_codes

BEFORE = REPOSITORY / "tests/data/before_rooms"
LAST_STEP = 4
LOST_DIGITS = 1e-5
"""Machines differ in how they add."""


def go_on(module: str, config: str, out: Path, *overrides: str) -> dict[str, Any]:
    """Run a training in a copy of its folder; the record of its last step."""
    entry = ["--config", str(BEFORE / config), *overrides]
    job = Ranks("mvar.testing.ranks:command", [module, entry], 1, out.parent / "logs")
    assert job.wait() == [0], job.output()
    assert [record["step"] for record in records(out)] == [1, 2, 3, LAST_STEP]
    return records(out)[-1]


def recorded(folder: str) -> dict[str, Any]:
    return records(BEFORE / folder)[LAST_STEP - 1]


def test_a_store_gives_the_codes_that_were_put_into_it() -> None:
    store = CodeStore.open(BEFORE / "store", verify=True)
    for name, views in (("train", 2), ("val", 1)):
        split = store.split(name)
        for place in range(len(split)):
            expected = synthetic_codes(name, place, views)
            assert np.array_equal(split.codes([place] * views, range(views)), expected)
            assert split.labels_N[place] == place % 3
    batch = TrainStream(store.split("train"), seed=0, global_batch=4).batch(8, 0, 4)
    assert batch.codes_BL.shape == (4, 21) and sorted(batch.epochs_B) == [0, 0, 0, 0]
    assert store.quantizer().patch_nums == (1, 2, 4)


def test_a_checkpoint_is_in_order_and_its_weights_are_read() -> None:
    verify(BEFORE / "run/checkpoints/step-000000003")
    config, weights = load_weights(BEFORE / "run")
    assert (config.depth, config.width, config.num_classes) == (1, 32, 3)
    assert weights["head.weight"].shape == (64, 32)


def test_a_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(BEFORE / "run", run)
    here = [f"run={run}", f"data.store={BEFORE / 'store'}", f"max_steps={LAST_STEP}"]
    again, then = go_on("mvar.train", "run.yaml", run, *here), recorded("run")
    assert [record["step"] for record in records(run, "resume")] == [0, 3]
    for name in ("loss", "loss_per_scale", "accuracy", "grad_norm", "lr", "weight_decay", "samples"):
        assert again[name] == pytest.approx(then[name], rel=LOST_DIGITS), name
    assert json.loads((run / "FINISHED").read_text()) == {"step": LAST_STEP, "samples": 16}


def test_a_tokenizers_training_goes_on_from_its_state(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer"
    shutil.copytree(BEFORE / "tokenizer", out)
    again = go_on("mvar.train_tokenizer", "tokenizer.yaml", out, f"out={out}", f"images={BEFORE / 'pictures'}")
    then = recorded("tokenizer")
    for name in ("loss", "l1", "l2", "codebook", "adversarial_weight", "grad_norm", "psnr_db", "lr"):
        assert again[name] == pytest.approx(then[name], rel=LOST_DIGITS), name
    made, finished = (
        load_tokenizer(path) for path in (out / "tokenizer.safetensors", BEFORE / "tokenizer.safetensors")
    )
    assert made.geometry == finished.geometry
    for (name, value), other in zip(made.state_dict().items(), finished.state_dict().values(), strict=True):
        assert value.numpy() == pytest.approx(other.numpy(), rel=1e-3, abs=1e-5), name
