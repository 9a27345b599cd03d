"""What DeepSpeed is told, and refusals before anything is allocated."""

import json
from pathlib import Path
from typing import Any

import pytest

from mvar.config import TrainConfig
from mvar.ds_config import BatchSplit, find_template, resolve
from mvar.errors import ConfigError

SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero_infinity")


def train_config(template: Path | str, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {"run": "r", "data": {"store": "s"}, "global_batch": 64}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        tree.setdefault(section, {})[leaf] = value
    tree.setdefault("engine", {})["ds_config"] = str(template)
    return TrainConfig.model_validate(tree)


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "template.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | sections))
    return path


SPLIT = BatchSplit(64, 2, 8, 4)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_resolve(name: str, tmp_path: Path) -> None:
    stage = int(name.removeprefix("zero").removeprefix("_infinity")[:1] or 3)
    precision = "fp32" if stage == 0 else "bf16"
    config = train_config(f"ds_configs/{name}.json", engine__precision=precision, engine__offload_folder=str(tmp_path))
    tree = resolve(config, SPLIT)
    assert tree["zero_optimization"]["stage"] == stage
    assert tree["train_batch_size"] == 64
    assert tree["train_micro_batch_size_per_gpu"] == 8
    assert tree["gradient_accumulation_steps"] == 4
    assert tree["gradient_clipping"] == (2.0 if stage else 0.0)
    assert tree["bf16"]["enabled"] is (precision == "bf16")
    assert '"auto"' not in json.dumps(tree)
    from deepspeed.runtime.config import DeepSpeedConfig

    assert DeepSpeedConfig({**tree, "train_batch_size": 32, "gradient_accumulation_steps": 4}) is not None


@pytest.mark.parametrize(
    ("precision", "ranks", "expected"),
    [("bf16", 8, None), ("bf16", 63, None), ("bf16", 64, "fp32"), ("fp16", 512, "fp32"), ("fp32", 512, None)],
)
def test_many_ranks_add_up_their_gradients_in_fp32(precision: str, ranks: int, expected: str | None) -> None:
    config = train_config("ds_configs/zero2.json", engine__precision=precision)
    assert resolve(config, BatchSplit(ranks * 8, ranks, 8, 1)).get("communication_data_type") == expected


def test_a_template_may_decide_how_gradients_are_added_up(tmp_path: Path) -> None:
    path = write(tmp_path, communication_data_type="bf16")
    assert resolve(train_config(path), BatchSplit(4096, 512, 8, 1))["communication_data_type"] == "bf16"


def test_templates_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_template(Path("ds_configs/zero2.json")).is_file()
    assert find_template(Path("zero2.json")).samefile(find_template(Path("ds_configs/zero2.json")))
    (tmp_path / "mine.json").write_text("{}")
    assert find_template(Path("mine.json")) == Path("mine.json")
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        find_template(Path("nowhere.json"))


def test_a_template_may_repeat_the_recipe_or_say_auto(tmp_path: Path) -> None:
    path = write(tmp_path, train_batch_size=64, gradient_clipping="auto", bf16={"enabled": True})
    assert resolve(train_config(path), SPLIT)["gradient_clipping"] == 2.0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"gradient_clipping": 1.0}, ['"gradient_clipping": 1.0', "optim.clip_grad", "2.0"]),
        ({"train_batch_size": 32}, ['"train_batch_size": 32', "global_batch", "64"]),
        ({"fp16": {"enabled": True}}, ['"fp16.enabled": true', "engine.precision"]),
        ({"optimizer": {"type": "Adam"}}, ['"optimizer"', "optim"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "4"]),
        ({"zero_optimization": {"stage": 2, "reduce_bukket_size": 5}}, ["reduce_bukket_size"]),
        ({"zero_optimization": True}, ["zero_optimization"]),
    ],
)
def test_contradictions_name_both_places(tmp_path: Path, sections: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path, **sections)
    with pytest.raises(ConfigError) as error:
        resolve(train_config(path), SPLIT)
    assert all(word in str(error.value) for word in [str(path), *words])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_without_zero_is_refused_with_a_way_out(precision: str) -> None:
    with pytest.raises(ConfigError, match=r"zero1\.json"):
        resolve(train_config("ds_configs/zero0.json", engine__precision=precision), SPLIT)


def test_offloading_to_disk_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.offload_folder"):
        resolve(train_config("ds_configs/zero_infinity.json"), SPLIT)
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match="no such folder"):
        resolve(train_config("ds_configs/zero_infinity.json", engine__offload_folder=str(missing)), SPLIT)


@pytest.mark.parametrize(
    ("global_batch", "ranks", "micro_batch", "expected"),
    [(64, 2, None, (32, 1)), (64, 2, 8, (8, 4)), (64, 1, 64, (64, 1)), (6, 3, 1, (1, 2))],
)
def test_batch_splits(global_batch: int, ranks: int, micro_batch: int | None, expected: tuple[int, int]) -> None:
    split = BatchSplit.of(global_batch, ranks, micro_batch)
    assert (split.micro_batch, split.accumulation) == expected


@pytest.mark.parametrize(
    ("global_batch", "ranks", "micro_batch", "near"),
    [(64, 3, None, "63 or 66"), (2, 4, None, "4;"), (64, 2, 10, "8"), (64, 2, 100, "32"), (14, 2, 6, "7")],
)
def test_impossible_batch_splits_propose_the_nearest(
    global_batch: int, ranks: int, micro_batch: int | None, near: str
) -> None:
    with pytest.raises(ConfigError, match=near):
        BatchSplit.of(global_batch, ranks, micro_batch)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_apex_is_refused_where_its_steps_are_counted_once_a_sub_group(tmp_path: Path, stage: int) -> None:
    path = write(tmp_path, zero_optimization={"stage": stage})
    config = train_config(path, optim__impl="apex", engine__precision="bf16_autocast")
    if stage < 3:
        resolve(config, SPLIT)
        return
    with pytest.raises(
        ConfigError, match=r"optim\.impl apex with ZeRO stage 3 \(.*template\.json\).*optim\.impl=torch"
    ):
        resolve(config, SPLIT)
