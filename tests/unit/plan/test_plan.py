"""`mvar plan` and `mvar train --dry-run`: what they say, and what they refuse before anything is allocated."""

import json
import shutil
from pathlib import Path

import pytest

from mvar.cli import main
from mvar.config import TrainConfig
from mvar.ds_config import BatchSplit, resolve
from mvar.errors import ConfigError
from mvar.plan.gpus import GPUS, recognise
from mvar.plan.room import require_room
from mvar.settings import load
from mvar.testing.code_stores import make_store
from mvar.testing.tiny_runs import write_config

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def test_a_plan_without_a_store_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures_path, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ["--nodes", "16", "--gpus", "8", "--gpu", "h100-80gb", "--mfu", "0.5"]
    outputs = ["--json", str(figures_path), "--png", str(picture)]
    assert main(["plan", "--config", str(RECIPES / "d32.yaml"), *options, *outputs]) == 0
    said = capsys.readouterr().out
    assert "3,658,707,968 parameters" in said and "no code store found" in said and "* take: engine.ds_config=" in said
    figures = json.loads(figures_path.read_text())
    assert figures["images"] == 1_281_167 and figures["time"]["steps"] == 437_899
    assert figures["recipe"]["micro_batch"] * figures["recipe"]["accumulation"] * 128 == 1024
    work = figures["flops"]["training_per_image"] * 1024
    assert figures["time"]["arithmetic_s"] == pytest.approx(work / (128 * 989e12 * 0.5))
    assert figures["time"]["gpu_days"] == pytest.approx(figures["time"]["step_s"] * 437_899 * 128 / 86400)
    assert figures["checkpoint"]["bytes"] == 12 * 3_658_707_968
    for option in figures["options"]:
        assert option["largest_micro_batch"] is None or option["peak_bytes"] <= 0.9 * 80 * 2**30
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_takes_images_and_classes_from_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, make_store(tmp_path / "store"))
    assert main(["plan", "--config", str(path), "--gpus", "2"]) == 0
    assert "50 images of the code store" in capsys.readouterr().out


def test_smaller_gpus_get_smaller_micro_batches(tmp_path: Path) -> None:
    found = {}
    for gpu in ("a100-40gb", "h200-141gb"):
        path = tmp_path / f"{gpu}.json"
        assert main(["plan", "--config", str(RECIPES / "d24.yaml"), "--gpu", gpu, "--json", str(path)]) == 0
        options = json.loads(path.read_text())["options"]
        found[gpu] = next(o for o in options if o["ds_config"] == "zero2" and o["activation_checkpointing"] == "off")
    assert (found["a100-40gb"]["largest_micro_batch"] or 0) < found["h200-141gb"]["largest_micro_batch"]


def test_an_unknown_gpu_is_refused_with_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--config", str(RECIPES / "d12.yaml"), "--gpu", "h1000"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "h1000" in message and all(name in message for name in GPUS)
    assert main([*arguments, "--memory-gib", "64", "--peak-tflops", "500"]) == 0


def test_a_batch_that_cannot_be_divided_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(RECIPES / "d32.yaml"), "--nodes", "3", "--gpus", "7"]) == 2
    assert "cannot be divided over 21 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA L40", "l40-48gb"),
        ("NVIDIA H100 NVL", "h100-nvl-94gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
    ],
)
def test_devices_are_recognised_by_what_torch_calls_them(said: str, name: str) -> None:
    assert recognise(said) == GPUS[name]
    assert recognise("Quadro 600") is None


@pytest.mark.parametrize(
    ("said", "memory_gib", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20, 312 * 3 / 7),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10, 989 / 7),
        ("NVIDIA H100 80GB HBM3 MIG 1c.3g.40gb", 40, 989 / 7),  # One of a slice's three parts that compute.
        ("NVIDIA A30 MIG 2g.12gb", 12, 165 / 2),
    ],
)
def test_a_slice_of_a_gpu_is_its_share_of_it(said: str, memory_gib: float, tflops: float) -> None:
    found = recognise(said)
    assert found is not None and found.memory_gib == memory_gib and found.bf16_tflops == pytest.approx(tflops)


@pytest.mark.parametrize("said", ["NVIDIA H100 80GB HBM3 MIG", "NVIDIA H100 80GB HBM3 MIG half", "Fancy MIG 1g.10gb"])
def test_a_slice_that_says_nothing_of_its_size_is_not_taken_for_the_whole(said: str) -> None:
    assert recognise(said) is None


def test_a_dry_run_of_d32_pretends_a_thousand_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(RECIPES / "d32.yaml"), f"run={tmp_path}", "data.store=elsewhere", "--dry-run"]
    ranks = ["--pretend-world", "1024", "--pretend-rank"]
    orders = []
    for rank in ("7", "1023"):
        assert main(["train", *arguments, *ranks, rank, "engine.micro_batch=1"]) == 0
        said = capsys.readouterr().out
        assert "3,658,707,968 parameters" in said and "1024 ranks x 1 x 1" in said and "begins to fall" in said
        orders.append(said.partition("epoch 0:")[2].split()[0])
    assert orders[0] != orders[1]
    assert main(["train", *arguments, *ranks, "1024", "engine.micro_batch=1"]) == 2
    assert "--pretend-rank 1024: expected 0 to 1023" in capsys.readouterr().err
    assert main(["train", *arguments, *ranks, "0"]) == 2
    assert "engine.micro_batch 32 does not divide" in capsys.readouterr().err
    assert main(["train", *arguments[:-1], *ranks, "0"]) == 2
    assert "together with --dry-run" in capsys.readouterr().err


def test_a_dry_run_shows_the_order_that_training_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mvar.data.store import CodeStore
    from mvar.data.stream import TrainStream

    store = make_store(tmp_path / "store")
    path = write_config(tmp_path, store)
    assert main(["train", "--config", str(path), "--dry-run", "--pretend-world", "2", "--pretend-rank", "1"]) == 0
    said = capsys.readouterr().out
    batch = TrainStream(CodeStore.open(store).split("train"), 3, 8).batch(8, 4, 4)
    listed = " ".join(f"{index}/{view}" for index, view in zip(batch.indices_B, batch.views_B, strict=True))
    assert f"epoch 0: {listed}" in said


def infinity(folder: Path) -> TrainConfig:
    engine = ["engine.ds_config=ds_configs/zero_infinity.json", f"engine.offload_folder={folder}"]
    return load(TrainConfig, RECIPES / "d32.yaml", ["run=r", "data.store=s", *engine])


def test_a_disk_too_small_for_offloading_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = infinity(tmp_path)
    zero = resolve(config, BatchSplit.of(1024, 8, 32))["zero_optimization"]
    model = config.model.model_copy(update={"num_classes": 1000})
    need = 16 * 3_658_707_968
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(0.99 * need)))
    with pytest.raises(ConfigError, match=r"GiB are free, 54\.5 are needed"):
        require_room(config, model, zero, 8, 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.01 * need)))
    require_room(config, model, zero, 8, 8)


def test_fp16_without_loss_scaling_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "template.json"
    config = load(
        TrainConfig,
        RECIPES / "d12.yaml",
        ["run=r", "data.store=s", "engine.precision=fp16", f"engine.ds_config={template}"],
    )
    template.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"loss_scale": 1}}))
    with pytest.raises(ConfigError, match="without loss scaling"):
        resolve(config, BatchSplit.of(768, 8, 48))
    template.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"loss_scale": 0}}))
    assert resolve(config, BatchSplit.of(768, 8, 48))["fp16"]["enabled"]
