"""Names and paths are taken as they are written; what a shell would expand in a path is expanded; no key is lost."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mvar import shipped, status
from mvar.cluster import chain
from mvar.config import TrainConfig
from mvar.ds_config import read_template
from mvar.errors import ConfigError
from mvar.plan.command import PlannedConfig
from mvar.settings import dump, load

NEEDED = ["run=runs/x", "data.store=codes"]


def overridden(*overrides: str) -> TrainConfig:
    return load(TrainConfig, None, [*NEEDED, *overrides])


@pytest.mark.parametrize(
    "text",
    ["runs/exp #3", "20241105", "2024-11-05", "1e3", "true", "null", "[a]", "a: b", "007", "'quoted'", " x", "*"],
)
def test_the_name_of_a_run_is_what_was_typed(text: str) -> None:
    assert overridden(f"run={text}").run == Path(text)
    assert overridden(f"data.store={text}").data.store == text
    assert overridden(f"tracking.wandb_project={text}").tracking.wandb_project == text


@pytest.mark.parametrize("text", ["20241105", "2024-11-05", "1e3", "true", "007", "0x10", "1_000"])
def test_a_bare_name_in_a_file_is_what_was_typed(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"run: {text}\ndata: {{store: {text}}}\ntracking:\n  wandb_project: {text}\n")
    config = load(TrainConfig, file)
    assert (config.run, config.data.store, config.tracking.wandb_project) == (Path(text), text, text)


def test_a_key_that_may_be_empty_can_be_emptied(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: r\ndata: {store: s, tokenizer: t.pth}\ninit_from: w.pth\n")
    assert load(TrainConfig, file).init_from == Path("w.pth")
    for nothing in ("", "null"):
        config = load(TrainConfig, file, [f"init_from={nothing}", f"data.tokenizer={nothing}"])
        assert config.init_from is None and config.data.tokenizer is None
    file.write_text("run: r\ndata: {store: s}\ninit_from: null\n")
    assert load(TrainConfig, file).init_from is None


def test_home_and_variables_are_expanded_in_paths_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch/a b")
    file = tmp_path / "a.yaml"
    file.write_text("run: ~/runs/x\ndata: {store: $SCRATCH/codes}\nengine: {offload_folder: '${SCRATCH}/swap'}\n")
    for config in (
        load(TrainConfig, file),
        overridden("run=~/runs/x", "data.store=$SCRATCH/codes", "engine.offload_folder=${SCRATCH}/swap"),
        load(
            TrainConfig, None, ["run=~/runs/x", "data={store: $SCRATCH/codes}", "engine.offload_folder=$SCRATCH/swap"]
        ),
    ):
        assert config.run == Path("/home/ada/runs/x")
        assert config.data.store == "/scratch/a b/codes"
        assert config.engine.offload_folder == Path("/scratch/a b/swap")
    assert load(PlannedConfig, None, ["data.store=~/codes"]).data.store == "/home/ada/codes"
    assert overridden("tracking.wandb_project=$SCRATCH").tracking.wandb_project == "$SCRATCH"
    pipe = "pipe:aws s3 cp s3://bucket/{file} - | awk '{print $1}'"
    assert overridden(f"data.store={pipe}").data.store == pipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=$NOWHERE/x", r"run: '\$NOWHERE/x': the environment has no variable NOWHERE"),
        ("data.store=${NOWHERE}", r"data\.store: .*no variable NOWHERE"),
        ("run=$EMPTY/x", r"run: .*no variable EMPTY"),
        ("run=~nobody-of-that-name/x", r"run: .*no such user"),
        ("run=", "run: got nothing, expected a path"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError, match=message):
        overridden(override)
    file = tmp_path / "a.yaml"
    key, _, value = override.partition("=")
    group, _, leaf = key.rpartition(".")
    file.write_text(f"{group}:\n  {leaf}: '{value}'\n" if group else f"{leaf}: '{value}'\n")
    with pytest.raises(ConfigError, match=rf"configuration .*a\.yaml: {message}"):
        load(TrainConfig, file)


def test_a_dumped_configuration_means_the_same_folders(tmp_path: Path) -> None:
    config = overridden("run=a$$b/$$HOME #3", "data.store=./~x/20241105", "init_from=./~/w")
    assert (config.run, config.data.store, config.init_from) == (
        Path("a$b/$HOME #3"),
        "./~x/20241105",
        Path("~/w"),
    )
    file = tmp_path / "a.yaml"
    file.write_text(dump(config))
    assert load(TrainConfig, file) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: r\noptim: {base_lr: 1e-4}\ndata: {store: s}\noptim: {betas: [0, 0]}\n", "optim .*lines 2 and 4"),
        ("run: r\ndata:\n  store: s\n  store: t\n", "store .*lines 3 and 4"),
        ("run: r\n\nrun: r\n", "run .*lines 1 and 3"),
        ('{"run": "r",\n "data": {"store": "s"},\n "run": "x"}', "run .*lines 1 and 3"),
    ],
)
def test_a_doubled_key_is_refused_with_both_lines(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.yaml: key {message}"):
        load(TrainConfig, file)


def test_a_doubled_key_on_one_line_or_in_an_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"override .optim=.*base_lr stands twice"):
        overridden("optim={base_lr: 1, base_lr: 2}")


def test_a_doubled_key_of_a_template_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2},\n "zero_optimization": {"stage": 1}}')
    with pytest.raises(ConfigError, match=r'zero\.json.*key "zero_optimization" stands twice'):
        read_template(file)


def test_anchors_and_merged_groups_still_work(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: r\ndata: &d {store: 1000}\noptim: &o {base_lr: 2e-4}\nmodel: {}\n")
    assert load(TrainConfig, file).data.store == "1000"
    file.write_text("run: r\ndata:\n  <<: {store: 1000, reader: ram}\n  reader: mmap\n")
    config = load(TrainConfig, file)
    assert (config.data.store, config.data.reader) == ("1000", "mmap")


@pytest.mark.parametrize(("text", "seed"), [("010", 10), ("1_000", 1000), ("0x10", 16), ("7", 7)])
def test_a_number_is_decimal_unless_it_says_otherwise(tmp_path: Path, text: str, seed: int) -> None:
    assert overridden(f"seed={text}").seed == seed
    with pytest.raises(ConfigError, match="seed: got '1:30'"):
        overridden("seed=1:30")


def test_a_chain_and_its_status_mean_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert chain.parse_begin(["--config", "d16.yaml", "run=~/x"])[0] == Path("/home/ada/x")
    command = "slurm/train.sbatch run=$SCRATCH/x run=$NOWHERE/x"
    assert status._runs_in(command, tmp_path) == [Path("/scratch/x")]


@pytest.mark.parametrize(("word", "code"), [("run=$NOWHERE/x", 2), ("run=${HOME}/x", 2), ("data.store=$HOME/x", 0)])
def test_the_batch_script_takes_no_folder_that_it_cannot_read(tmp_path: Path, word: str, code: int) -> None:
    """Its own refusal names the word; without it, it goes on to miss its other files here."""
    script = shipped.ROOT / "slurm" / "train.sbatch"
    environ = {"PATH": os.environ["PATH"], "MVAR_HOME": str(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(script), word], capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert (f"{word}: a variable that no shell has replaced" in done.stderr) == (code == 2)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
