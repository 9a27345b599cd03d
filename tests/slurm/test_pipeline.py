"""From images to samples with the batch scripts, on a real cluster."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from pathlib import Path

import pytest

from data_prep.finalize import finalize
from data_prep.job import TokenizeConfig
from data_prep.prepare.digits import prepare
from data_prep.tokenize import tokenize
from data_prep.verify import verify
from mvar.cli import main as mvar
from mvar.settings import load
from mvar.testing.extractors import write_extractor
from mvar.testing.tiny_pairs import write_pair
from mvar.testing.tiny_runs import losses, write_config
from tests.slurm.harness import ROOT, Cluster, train_log, until
from tests.stores import LATENT, PATCH_NUMS, VOCAB, image_folder, tiny_tokenizer

pytestmark = pytest.mark.slurm

SCRIPTS = ROOT / "slurm"
CODES = "{shard_samples: 8, batch: 5, val_fraction: 0.25, views: {random_crops: 2}, threads: 1, workers: 1}"
SMALL = ("--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    image_folder(root / "images", per_class=40)
    tiny_tokenizer(root / "tokenizer.safetensors")
    (root / "codes.yaml").write_text(CODES)
    return root


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.is_file()}


def test_from_images_to_samples_on_two_nodes_with_two_tasks_each(
    cluster: Cluster, tmp_path: Path, inputs: Path
) -> None:
    geometry = {"patch_nums": PATCH_NUMS, "vocab_size": VOCAB, "latent_channels": LATENT}
    config = write_config(
        tmp_path, tmp_path, max_steps=12, checkpoint__every_steps=5, **{f"model__{k}": v for k, v in geometry.items()}
    )
    out = tmp_path / "out"
    words = ["--images", inputs / "images", "--tokenizer", inputs / "tokenizer.safetensors", "--config", config]
    words += ["--out", out, "--codes", inputs / "codes.yaml", "--nodes", "2", "--gpus", "2"]
    words += ["--tokenize-tasks", "2", "--sample-tasks", "2", "--chain", "3", "--per-class", "6"]
    words += ["--features", write_extractor(inputs / "features.pt", width=8)]
    for option in ("--cpus-per-task=1", "--time=10"):
        words += ["--sbatch", option]

    planned = cluster.run(SCRIPTS / "pipeline.sh", *words, "--dry-run", cwd=tmp_path)
    assert [line.split()[0] for line in planned.splitlines()] == ["sbatch"] * 5
    assert not out.exists() and cluster.run("squeue", "-h") == ""

    said = cluster.run(SCRIPTS / "pipeline.sh", *words, cwd=tmp_path)
    jobs = dict(line.split() for line in said.splitlines())
    assert list(jobs) == ["tokenize", "finalize", "train", "sample", "evaluate"]
    states = cluster.wait(*jobs.values())
    logs = "".join(path.read_text() for path in sorted((out / "logs").iterdir())) + train_log(out / "run")
    leftovers = {name for name in states if name.startswith(f"{jobs['train']}_") and name != f"{jobs['train']}_1"}
    assert leftovers and {states[name] for name in leftovers} == {"CANCELLED"}
    assert {state for name, state in states.items() if name not in leftovers} == {"COMPLETED"}, logs

    assert verify(out / "codes")["samples"] == 120
    assert (out / "sheet.png").stat().st_size > 0 and (out / "grid.png").stat().st_size > 0
    assert len(losses(out / "run")) == 12
    assert "4 ranks x 2 x 1" in train_log(out / "run")
    assert len(list((out / "samples").glob("*/*.png"))) == 18
    assert {"fd", "fd_floor", "kid", "recall"} <= json.loads((out / "figures.json").read_text())["figures"].keys()
    (table,) = (out / "logs").glob("mvar-evaluate-*.log")
    assert all(
        re.search(rf"^{name} ", table.read_text(), re.MULTILINE) for name in ("FD", "KID", "precision", "recall")
    )

    words = [out / "run", "--tokenizer", inputs / "tokenizer.safetensors", "--reference", out / "reference.npz"]
    words += ["--features", inputs / "features.pt", "--num", "18", "--watch"]
    beside = cluster.sbatch(*SMALL, "--array=1-2%1", SCRIPTS / "evaluate_checkpoints.sbatch", *words, cwd=tmp_path)
    assert set(cluster.wait(beside).values()) == {"COMPLETED"}
    measured = [json.loads(line) for line in (out / "run" / "evaluations.jsonl").read_text().splitlines()]
    kept = [int(path.name.removeprefix("step-")) for path in sorted((out / "run" / "checkpoints").glob("step-*"))]
    assert [record["step"] for record in measured] == kept and all(record["fd"] > 0 for record in measured)
    assert "every kept checkpoint has figures" in (tmp_path / f"mvar-evaluate-checkpoints-{beside}.log").read_text()


@pytest.mark.slow
def test_two_thousand_digits_of_32_px_end_with_the_table_of_figures(cluster: Cluster, tmp_path: Path) -> None:
    """The demo's recipes: what the classifier recognises was learnt, not drawn by chance (10 %)."""
    prepare(tmp_path / "all")
    for split, each in (("train", 180), ("val", 20)):
        for digit in sorted((tmp_path / "all" / split).iterdir()):
            (tmp_path / "digits" / split / digit.name).mkdir(parents=True)
            for image in sorted(digit.iterdir())[:each]:
                image.rename(tmp_path / "digits" / split / digit.name / image.name)
    out, learnt = tmp_path / "out", tmp_path / "tokenizer"
    recipe = ["--config", "recipes/tokenizer_32.yaml", f"images={tmp_path}/digits", f"out={learnt}", "steps=400"]
    assert mvar(["train-tokenizer", *recipe, "threads=2"]) == 0
    words = ["--images", tmp_path / "digits", "--tokenizer", learnt / "tokenizer.safetensors", "--out", out]
    words += ["--config", "recipes/demo.yaml", "--train", "epochs=10", "--codes", "recipes/demo_codes.yaml"]
    words += ["--nodes", "2", "--gpus", "1", "--tokenize-tasks", "2", "--sample-tasks", "2", "--chain", "2"]
    words += ["--per-class", "50", "--sample", "--cfg", "--sample", "0.5", "--size", "32"]
    for option in ("--cpus-per-task=1", "--time=60"):
        words += ["--sbatch", option]
    said = cluster.run(SCRIPTS / "pipeline.sh", *words, cwd=ROOT)
    jobs = dict(line.split() for line in said.splitlines())
    cluster.wait(*jobs.values(), patience_s=3600)
    (log,) = (out / "logs").glob("mvar-evaluate-*.log")
    print(log.read_text())
    figures = json.loads((out / "figures.json").read_text())["figures"]
    assert figures["classifier_accuracy_real"] > 0.9 and figures["classifier_accuracy_samples"] > 0.5


def test_samples_are_not_drawn_from_a_training_that_is_not_finished(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch(*SMALL, "--array=0-1", SCRIPTS / "sample.sbatch", cwd=tmp_path, MVAR_RUN=str(tmp_path / "run"))
    assert set(cluster.wait(job).values()) == {"FAILED"}
    assert "is not finished" in (tmp_path / f"mvar-sample-{job}_0.log").read_text()


def test_an_array_of_eight_survives_cancelled_tasks_and_a_dead_node(
    cluster: Cluster, tmp_path: Path, inputs: Path
) -> None:
    arguments = [f"source={inputs}/images", f"tokenizer={inputs}/tokenizer.safetensors"]
    pristine = tmp_path / "pristine"
    tokenize(load(TokenizeConfig, inputs / "codes.yaml", [*arguments, f"store={pristine}"]))
    finalize(pristine)

    store = tmp_path / "codes"
    words = [SCRIPTS / "tokenize.sbatch", "--config", inputs / "codes.yaml", *arguments, f"store={store}"]
    job = cluster.sbatch(*SMALL, "--array=0-7", "--spread-job", *words, cwd=tmp_path)
    until(lambda: len([s for s in cluster.states(job).values() if s == "RUNNING"]) == 8, explain=cluster.tail)
    chance = random.Random(4)
    for task in chance.sample(range(8), 3):
        time.sleep(chance.uniform(0, 2))
        cluster.run("scancel", f"{job}_{task}")
    nodes = re.findall(r" BatchHost=(\S+)", cluster.run("scontrol", "-o", "show", "job", job))
    cluster.power_cut(chance.choice(sorted(set(nodes))))
    states = cluster.wait(job)
    assert "CANCELLED" in states.values()

    command = ["sbatch", "--wait", "--parsable", *SMALL, SCRIPTS / "finalize.sbatch", store]
    first = cluster.run(*command, cwd=tmp_path, expect=2).split()[0]
    said = (tmp_path / f"mvar-finalize-{first}.log").read_text()
    named = re.search(r"--array=(\S+) \(with (--tasks) (8)\)", said)
    assert named is not None, said
    assert not (store / "manifest.json").exists()

    script, *others = words
    again = cluster.sbatch(*SMALL, f"--array={named[1]}", script, named[2], named[3], *others, cwd=tmp_path)
    assert set(cluster.wait(again).values()) == {"COMPLETED"}
    cluster.run(*command, cwd=tmp_path)
    assert contents(store) == contents(pristine)
    shutil.rmtree(store)


def test_an_array_of_samplers_is_merged_by_the_task_that_ends_last(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task is cancelled; the merge names it, and its second run merges what one process alone would have drawn."""
    places = write_pair(tmp_path)
    job_of = ["--num", "60", "--part", "4", "--device", "cpu", "--kind", "tars"]
    assert mvar(["sample", *places, *job_of, "--out", str(tmp_path / "one"), "--merge", str(tmp_path / "one.npz")]) == 0
    out, merged = tmp_path / "out", tmp_path / "out.npz"
    words = [SCRIPTS / "sample.sbatch", *places, *job_of, "--out", out, "--merge", merged]
    job = cluster.sbatch(*SMALL, "--array=0-3", *words, cwd=tmp_path)
    until(lambda: cluster.states(job).get(f"{job}_2") == "RUNNING", explain=cluster.tail)
    cluster.run("scancel", f"{job}_2")
    assert "CANCELLED" in cluster.wait(job).values()
    assert not merged.exists()
    capsys.readouterr()
    assert mvar(["merge-samples", str(out), "--out", str(merged)]) == 2
    assert "Run these tasks again: --array=2 (with --tasks 4)" in capsys.readouterr().err
    script, *others = words
    again = cluster.sbatch(*SMALL, "--array=2", script, "--tasks", "4", *others, cwd=tmp_path)
    assert set(cluster.wait(again).values()) == {"COMPLETED"}
    assert merged.read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_a_part_of_an_array_has_to_say_how_many_tasks_there_are(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch(*SMALL, "--array=3,5", SCRIPTS / "tokenize.sbatch", "store=codes", cwd=tmp_path)
    assert set(cluster.wait(job).values()) == {"FAILED"}
    assert "--tasks N" in (tmp_path / f"mvar-tokenize-{job}_3.log").read_text()
