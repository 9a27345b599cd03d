"""The configuration tree: what a user types is what runs, and mistakes are named."""

from pathlib import Path

import pytest
import yaml

from mvar.config import ModelConfig, TrainConfig
from mvar.errors import ConfigError
from mvar.settings import check, describe, dump, load

NEEDED = ["run=runs/x", "data.store=codes"]


def test_overrides_win_over_the_file_in_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: r\ndata: {store: s}\noptim: {base_lr: 1e-4}\n")
    config = load(TrainConfig, file, ["optim.base_lr=2e-4", "optim.base_lr=3e-4", "model.patch_nums=[1,2]"])
    assert config.optim.base_lr == 3e-4
    assert config.model.patch_nums == (1, 2)


def test_exponent_without_a_point_is_a_number_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: r\ndata: {store: s}\noptim: {base_lr: 3e-4}\n")
    assert load(TrainConfig, file).optim.base_lr == 3e-4


def test_a_bare_off_is_the_word(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "run: r\ndata: {store: s}\nengine: {activation_checkpointing: off}\ntracking: {tensorboard: true}\n"
    )
    config = load(TrainConfig, file)
    assert config.engine.activation_checkpointing == "off"
    assert config.tracking.tensorboard is True
    assert load(TrainConfig, file, ["tracking.tensorboard=false"]).tracking.tensorboard is False


def test_a_shipped_recipe_is_found_by_name_unless_one_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("d16.yaml", "recipes/d16.yaml"):
        assert load(TrainConfig, Path(name), NEEDED).model.depth == 16
    Path("d16.yaml").write_text("model: {depth: 2}\n")
    assert load(TrainConfig, Path("d16.yaml"), NEEDED).model.depth == 2
    with pytest.raises(ConfigError, match=r"d99\.yaml: cannot be read.*shipped recipe: d12\.yaml, "):
        load(TrainConfig, Path("d99.yaml"), NEEDED)


def test_dump_reads_back_equal() -> None:
    config = load(TrainConfig, None, [*NEEDED, "engine.activation_checkpointing=2", "model.drop_path=0.3"])
    assert check(TrainConfig, yaml.safe_load(dump(config)), "dump") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.stroe=x", "data.stroe: unknown key; the nearest that exists is data.store"),
        ("optim.bas_lr=1", "the nearest that exists is optim.base_lr"),
        ("optim.base_lr=fast", "optim.base_lr: got 'fast'"),
        ("model.width=33", "multiple of heads"),
        ("model.patch_nums=[2,1]", "expected rising positive sides"),
        ("engine.precision=fp8", "engine.precision: got 'fp8'"),
        ("seed", "expected key=value"),
        ("run.x=1", "'run' is a value, not a group"),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match="(?s).*" + message.replace("[", r"\[")):
        load(TrainConfig, None, [*NEEDED, override])


def test_missing_required_key_says_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match=r"data\.store=\.\.\."):
        load(TrainConfig, None, ["run=x"])


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n"])
def test_a_file_that_is_no_tree_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(TrainConfig, file)


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load(TrainConfig, Path("nowhere.yaml"))


def test_every_key_is_described() -> None:
    text = describe(TrainConfig)
    for key in ("run", "optim.base_lr", "engine.ds_config", "tracking.sample_every"):
        assert f"  {key} " in text


def test_width_and_heads_follow_from_depth() -> None:
    config = ModelConfig(depth=12)
    assert (config.resolved_width, config.resolved_heads) == (768, 12)
    assert config.resolved_drop_path == pytest.approx(0.05)
