"""Figures of a run while it trains, and of its checkpoints afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mvar.evaluation import EVALUATIONS
from mvar.files.json_lines import read
from mvar.testing.code_stores import make_store
from mvar.testing.extractors import write_extractor
from mvar.testing.ranks import Ranks, command
from mvar.testing.tiny_runs import losses, records, write_config

NUM = 18


def train(argv: list[str]) -> int:
    return command("mvar.train", argv)


def nowhere(argv: list[str]) -> int:
    """The extractor fails on rank 1 alone, at the first evaluation."""
    import os

    import mvar.training.evaluating as module

    look, seen = module.SampleFigures._look, [0]

    def looking(self: module.SampleFigures, *arguments: object) -> object:
        seen[0] += 1
        if os.environ["RANK"] == "1" and seen[0] == 1:
            raise RuntimeError("no eyes")
        return look(self, *arguments)  # type: ignore[arg-type]

    module.SampleFigures._look = looking  # type: ignore[assignment,method-assign]
    return command("mvar.train", argv)


def run_of(entry: str, folder: Path, config: Path, ranks: int) -> tuple[list[int], str]:
    job = Ranks(f"tests.integration.test_figures_of_runs:{entry}", [["--config", str(config)]], ranks, folder / "logs")
    return job.wait(), job.output()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tokenizer, an extractor, and real images in an .npz as the ADM evaluation suite has them."""
    root = tmp_path_factory.mktemp("figures")
    make_store(root / "store")
    write_extractor(root / "features.pt")
    from mvar.tokenizer.files import load_tokenizer

    side = load_tokenizer(root / "store" / "tokenizer.safetensors").image_size
    images = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), dtype=np.uint8)
    np.savez(root / "real.npz", arr_0=images, arr_1=np.arange(64) % 3)
    return root


def settings(inputs: Path, **others: object) -> dict[str, object]:
    return {
        "data__tokenizer": str(inputs / "store" / "tokenizer.safetensors"),
        "tracking__evaluate_every": 10,
        "tracking__evaluate_images": NUM,
        "tracking__evaluate_reference": str(inputs / "real.npz"),
        "tracking__evaluate_features": str(inputs / "features.pt"),
        "max_steps": 20,
        **others,
    }


def figures(path: Path) -> list[dict[str, object]]:
    return [
        {key: record[key] for key in ("step", "images", "fd", "kid", "recall")}
        for record in records(path, "evaluation")
    ]


def test_a_run_is_evaluated_alike_on_one_rank_and_on_two(tmp_path: Path, inputs: Path) -> None:
    found = []
    for ranks, stage in ((1, 2), (2, 2), (2, 3)):
        config = write_config(tmp_path, inputs / "store", f"run{ranks}{stage}", stage=stage, **settings(inputs))
        codes, output = run_of("train", tmp_path / f"{ranks}{stage}", config, ranks)
        assert codes == [0] * ranks, output
        found.append(figures(tmp_path / f"run{ranks}{stage}"))
        assert [record["step"] for record in found[-1]] == [10, 20]
    calm = write_config(tmp_path, inputs / "store", "calm", max_steps=20)
    codes, output = run_of("train", tmp_path / "calm-logs", calm, 1)
    assert losses(tmp_path / "run12") == losses(tmp_path / "calm"), "looking changes nothing"
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert ours["images"] == theirs["images"] == NUM
            assert ours == pytest.approx(theirs, rel=0.2, abs=0.2)  # Another rounding flips codes.
    assert "fd " in (tmp_path / "12" / "logs").joinpath(next(iter((tmp_path / "12" / "logs").iterdir()))).read_text()
    kept = read(tmp_path / "run12" / EVALUATIONS)
    assert [record["step"] for record in kept] == [10, 20] and kept[0]["while_training"]


def test_a_rank_that_fails_to_look_costs_the_figures_and_not_the_run(tmp_path: Path, inputs: Path) -> None:
    config = write_config(tmp_path, inputs / "store", "run", **settings(inputs))
    codes, output = run_of("nowhere", tmp_path, config, 2)
    assert codes == [0, 0], output
    assert "step 10: samples were not evaluated: rank 1: RuntimeError: no eyes" in output
    assert [record["step"] for record in records(tmp_path / "run", "evaluation")] == [20]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tracking__evaluate_reference": None}, "evaluate_every needs tracking.evaluate_reference"),
        ({"tracking__evaluate_reference": "nowhere.npz"}, "nowhere.npz: no such file"),
        ({"tracking__evaluate_features": "nowhere.pt"}, "nowhere.pt: no such file"),
        ({"data__tokenizer": None}, "evaluate_every needs data.tokenizer"),
    ],
)
def test_what_evaluations_lack_is_said_at_the_start(
    tmp_path: Path, inputs: Path, change: dict[str, object], said: str
) -> None:
    config = write_config(tmp_path, inputs / "store", "run", **settings(inputs, **change))
    codes, output = run_of("train", tmp_path, config, 1)
    assert codes == [2] and said in output, output
    assert records(tmp_path / "run", "train") == [] if (tmp_path / "run" / "metrics.jsonl").exists() else True


def test_kept_checkpoints_are_evaluated_once(tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mvar.evaluate_checkpoints import main

    config = write_config(tmp_path, inputs / "store", "run", max_steps=20, checkpoint__keep_last=2)
    codes, output = run_of("train", tmp_path, config, 1)
    assert codes == [0], output
    run = tmp_path / "run"
    words = [str(run), "--tokenizer", str(inputs / "store" / "tokenizer.safetensors"), "--num", str(NUM)]
    words += ["--reference", str(inputs / "real.npz"), "--features", str(inputs / "features.pt"), "--device", "cpu"]
    assert main(words) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in told] == ["14", "20"] and all("fd " in line for line in told)
    made = read(run / EVALUATIONS)
    assert main([*words, "--watch"]) == 0, "a finished run is not watched any longer"
    assert capsys.readouterr().out == "" and read(run / EVALUATIONS) == made
    assert main([*words, "--cfg", "0"]) == 0
    both = read(run / EVALUATIONS)
    assert len(both) == 4 and both[:2] == made and json.loads(json.dumps(both[2]["options"]))["cfg"] == 0
    assert both[0]["fd"] != both[2]["fd"]
