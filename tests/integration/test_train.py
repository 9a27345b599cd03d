"""What `mvar train` does besides training: refuse, skip bad steps, validate, draw, run in half precision."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mvar.checkpoint.record import CheckpointRecord
from mvar.checkpoint.saving import save
from mvar.cli import main as cli
from mvar.config import TrainConfig
from mvar.data.stream import Batch, eval_batches
from mvar.model.mamba2 import DECAYS
from mvar.run.folder import RunFolder
from mvar.run.loop import Votes
from mvar.run.names import folder_of
from mvar.run.world import World
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import REPOSITORY, Ranks, run_ranks
from mvar.testing.tiny_runs import config, losses, records, write_config
from mvar.training.engine import Engine
from mvar.training.job import TrainingJob, prepare
from mvar.training.objective import Losses, Objective


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("train") / "store")


def trees(folder: Path, store: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        name: config(folder / name, store, name, **{"engine__micro_batch": 2, **overrides}).model_dump(mode="json")
        for name, overrides in cases.items()
    }


def build(world: World, tree: dict[str, Any]) -> tuple[Engine, TrainingJob]:
    job = prepare(TrainConfig.model_validate(tree), world.size)
    engine = Engine(job.config, job.model, job.plan, job.split, Objective(job.store.quantizer(), world.device), world)
    return engine, job


def batches_of(job: TrainingJob, world: World, step: int) -> list[Batch]:
    """This rank's micro-batches of a step, read here and now."""
    micro, share = job.split.micro_batch, job.config.global_batch // world.size
    starts = range(world.rank * share, (world.rank + 1) * share, micro)
    return [job.stream.batch(step * job.config.global_batch, start, micro) for start in starts]


def run_steps(engine: Engine, job: TrainingJob, world: World, first: int, last: int) -> list[float]:
    return [engine.step(step, batches_of(job, world, step)).averages.loss for step in range(first, last)]


def weights_of(engine: Engine) -> list[bytes]:
    return [values.numpy().tobytes() for _, _, values in engine.partition.blocks()]


class Spoiled:
    """An objective that gives NaN for one sample, or for every sample of a rank."""

    def __init__(self, inner: Objective) -> None:
        self.inner, self.pyramid, self.sample, self.always = inner, inner.pyramid, -1, False
        self.current: Batch | None = None

    def __call__(self, model: Any, codes_BL: torch.Tensor, labels_B: torch.Tensor, *rest: Any) -> Losses:
        found = self.inner(model, codes_BL, labels_B, *rest)
        assert self.current is not None
        bad_B = torch.tensor([self.always or index == self.sample for index in self.current.indices_B.tolist()])
        if not bad_B.any():
            return found
        loss_BS = found.loss_BS.masked_fill(bad_B.unsqueeze(1), float("nan"))
        return Losses(found.loss * float("nan"), loss_BS, found.correct_BS)


def spoil(engine: Engine) -> Spoiled:
    spoiled = Spoiled(engine.objective)
    engine.objective = spoiled  # type: ignore[assignment]
    original = engine._losses

    def with_batch(step: int, batch: Batch) -> Losses:
        spoiled.current = batch
        return original(step, batch)

    engine._losses = with_batch  # type: ignore[method-assign]
    return spoiled


def skip_bad_steps(world: World, trees: dict[str, Any]) -> list[str]:
    """On every stage: a NaN in one sample of one rank changes nothing anywhere, and too many in a row end it."""
    for tree in trees.values():
        engine, job = build(world, tree)
        engine.initialise()
        spoiled = spoil(engine)
        run_steps(engine, job, world, 0, 2)
        before = weights_of(engine)
        batches = batches_of(job, world, 2)
        spoiled.sample = world.gather(int(batches[1].indices_B[0]))[1]
        result = engine.step(2, batches)
        assert result.skipped and result.bad_samples == [spoiled.sample] and result.grad_norm is None
        assert engine.skipped_steps == 1
        assert weights_of(engine) == before
        assert engine.partition.adam_steps == 2
        spoiled.sample = -1
        good = engine.step(3, batches_of(job, world, 3))
        assert not good.skipped and good.averages.loss < 10 and weights_of(engine) != before
        spoiled.always = world.rank == 1
        assert len(engine.step(4, batches_of(job, world, 4)).bad_samples) == 4
    return ["ok"]


def read_late(world: World, trees: dict[str, Any]) -> list[str]:
    """On every stage: steps that are read while later ones are under way tell what they would have told at once."""
    for tree in trees.values():
        told = []
        for late in (False, True):
            engine, job = build(world, tree)
            engine.initialise()
            spoiled = spoil(engine)
            results, worst, underway = [], [], []
            for step in range(5):
                spoiled.always = step == 2 and world.rank == 1
                own = Votes(stop=int(world.rank == step), lost=1)
                underway.append(engine.launch(step, batches_of(job, world, step), own))
                while underway and (len(underway) > 1 or step == 4 or not late):
                    results.append(engine.result(underway.pop(0)))
                    worst.append(engine.worst_samples(3))
            results = [replace(result, forward_s=[]) for result in results]
            told.append((repr(results), worst, weights_of(engine)))
        assert told[0] == told[1]
        assert [result.skipped for result in results] == [False, False, True, False, False]
        assert [result.votes for result in results] == [Votes(stop=int(step < 2), lost=2) for step in range(5)]
    return ["ok"]


def test_steps_that_are_read_late_tell_the_same(tmp_path: Path, store: Path) -> None:
    for stages in ((0, 2), (3,)):
        cases = {f"stage{stage}": {"stage": stage} for stage in stages}
        run_ranks(read_late, 2, tmp_path / str(stages[0]), trees=trees(tmp_path, store, cases))


def test_a_bad_sample_on_one_rank_makes_all_skip_the_step(tmp_path: Path, store: Path) -> None:
    for stages in ((0, 1, 2), (3,)):
        cases = {f"stage{stage}": {"stage": stage} for stage in stages}
        run_ranks(skip_bad_steps, 2, tmp_path / str(stages[0]), trees=trees(tmp_path, store, cases))


def run_variants(world: World, trees: dict[str, Any]) -> dict[str, Any]:
    """Losses of ten steps, and the validation after them, of every variant; half-way through a checkpoint."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed asks whether the processor is fast in fp16. Ours computes it anyway.
    get_accelerator().is_fp16_supported = lambda: True
    found: dict[str, Any] = {}
    for name, tree in trees.items():
        engine, job = build(world, tree)
        engine.initialise()
        head = run_steps(engine, job, world, 0, 5)
        folder = save(Path(tree["run"]), engine.partition, world, engine.progress(5), job.identity)
        tail = run_steps(engine, job, world, 5, 10)
        split = job.store.split("val")
        validation = engine.evaluate(eval_batches(split, 10, 2, world.rank, world.size))
        assert validation.images == 10
        again, job = build(world, tree)
        again.restore(folder)
        assert run_steps(again, job, world, 5, 10) == tail, f"{name}: going on is not bit-exact"
        if tree["engine"]["precision"] in ("bf16", "fp16"):
            check_decays(again)
        scale = vars(again._scaler) if again._scaler is not None else None
        assert scale is None or scale == vars(engine._scaler)
        found[name] = {"losses": head + tail, "validation": validation.loss, "skipped": engine.skipped_steps}
    return found


def check_decays(engine: Engine) -> None:
    """The blocks compute with the fp32 master values of Mamba's decays, which 16 bits could not hold."""
    names = [f"blocks.1.mamba.{part}" for part in DECAYS]
    masters = torch.stack(list(engine.partition.gather(names, engine.world.device).values()))
    exact = engine._engine.module.blocks[1].mamba.exact_3H
    assert exact.dtype == torch.float32 and torch.equal(exact, masters)
    assert not torch.equal(exact[:2], exact[:2].bfloat16().float())


def test_precisions_checkpointing_and_ranks_agree(tmp_path: Path, store: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "fp32": {"stage": 2},
        "recomputed": {"stage": 2, "engine__activation_checkpointing": "every"},
        "bf16-1": {"stage": 1, "engine__precision": "bf16"},
        "bf16-2": {"stage": 2, "engine__precision": "bf16"},
        "autocast-0": {"stage": 0, "engine__precision": "bf16_autocast"},
        "fp16-2": {"stage": 2, "engine__precision": "fp16"},
    }
    sharded: dict[str, dict[str, Any]] = {
        "fp32-3": {"stage": 3},
        "recomputed-3": {"stage": 3, "engine__activation_checkpointing": 2},
        "bf16-3": {"stage": 3, "engine__precision": "bf16"},
    }
    found: dict[str, Any] = {}
    for name, cases in (("job", variants), ("job3", sharded)):
        found |= run_ranks(run_variants, 2, tmp_path / name, trees=trees(tmp_path, store, cases))[0]
    alone = run_ranks(run_variants, 1, tmp_path / "alone", trees=trees(tmp_path, store, {"one": {"stage": 2}}))[0]
    reference = found["fp32"]
    assert reference["losses"][-1] < reference["losses"][0] - 0.2
    assert found["recomputed"]["losses"] == reference["losses"], "recomputing must not change a bit"
    assert found["recomputed-3"]["losses"] == found["fp32-3"]["losses"], "recomputing must not change a bit"
    for other in (alone["one"], found["fp32-3"]):
        assert other["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert other["validation"] == pytest.approx(reference["validation"], abs=1e-5)
    for name in ("bf16-1", "bf16-2", "bf16-3", "autocast-0"):
        assert found[name]["losses"] == pytest.approx(reference["losses"], abs=0.03), name
        assert found[name]["losses"] != reference["losses"]
    fp16 = found["fp16-2"]
    assert fp16["skipped"] < 5
    assert fp16["losses"][-1] < fp16["losses"][0] - 0.1


def train_each(world: World, trees: dict[str, Any]) -> dict[str, list[float]]:
    found = {}
    for name, tree in trees.items():
        engine, job = build(world, tree)
        engine.initialise()
        found[name] = run_steps(engine, job, world, 0, 10)
    return found


@pytest.mark.slow
def test_deepspeeds_own_adams_follow_torchs(tmp_path: Path, store: Path) -> None:
    """Compiles DeepSpeed's extensions where that was not done before: minutes."""
    cases = {impl: {"stage": 1, "optim__impl": impl} for impl in ("torch", "deepspeed_cpu", "deepspeed_fused")}
    found = run_ranks(train_each, 1, tmp_path / "job", trees=trees(tmp_path, store, cases))[0]
    if torch.cuda.is_available() and importlib.util.find_spec("apex"):
        cases = {"apex": {"stage": 1, "optim__impl": "apex"}}
        found |= run_ranks(train_each, 1, tmp_path / "apex", trees=trees(tmp_path, store, cases))[0]
    for impl in found.keys() - {"torch"}:
        assert found[impl] == pytest.approx(found["torch"], abs=1e-5), impl


class ApexLikeAdam(torch.optim.Optimizer):
    """AdamW that keeps its books as NVIDIA apex's FusedAdam does: no step in a tensor's state, but in the group."""

    def __init__(self, groups: Any, **settings: Any) -> None:
        assert settings.pop("adam_w_mode")
        super().__init__(groups, settings | {"weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                assert state.keys() == {"exp_avg", "exp_avg_sq"}
                adamw = torch.optim._functional.adamw  # type: ignore[attr-defined]
                count = torch.tensor(float(group["step"] - 1))
                b1, b2 = group["betas"]
                rates = {"beta1": b1, "beta2": b2, "lr": group["lr"], "eps": group["eps"]}
                books = ([weight], [weight.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [count])
                adamw(*books, amsgrad=False, maximize=False, weight_decay=group["weight_decay"], **rates)


def with_apex_like(world: World, trees: dict[str, Any]) -> dict[str, Any]:
    import types

    ApexLikeAdam.__module__ = "apex.optimizers"
    fake = types.ModuleType("apex.optimizers")
    fake.FusedAdam = ApexLikeAdam  # type: ignore[attr-defined]
    sys.modules |= {"apex": types.ModuleType("apex"), "apex.optimizers": fake}
    found = run_variants(world, trees)
    for tree in trees.values():
        assert CheckpointRecord.read(folder_of(Path(tree["run"]), 5)).progress.adam_steps == 5
    return found


def test_apex_counts_its_steps_elsewhere_and_resumes_exactly(tmp_path: Path, store: Path) -> None:
    plain = run_ranks(run_variants, 2, tmp_path / "plain", trees=trees(tmp_path, store, {"torch": {"stage": 2}}))[0]
    cases = {f"apex{stage}": {"stage": stage, "optim__impl": "apex"} for stage in (0, 2)}
    found = run_ranks(with_apex_like, 2, tmp_path / "job", trees=trees(tmp_path, store, cases))[0]
    for case in found.values():
        assert case["losses"] == pytest.approx(plain["torch"]["losses"], abs=1e-5)


def test_apex_that_is_not_installed_is_named(tmp_path: Path, store: Path) -> None:
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("an apex is installed here")
    path = write_config(tmp_path, store, optim__impl="apex")
    job = Ranks("mvar.testing.ranks:command", ["mvar.train", ["--config", str(path)]], 1, tmp_path / "logs")
    assert job.wait() == [2] and "NVIDIA apex is not installed" in job.output()


def test_pictures_and_validation_are_recorded_from_sharded_weights(tmp_path: Path, store: Path) -> None:
    path = write_config(
        tmp_path,
        store,
        stage=3,
        engine__precision="bf16_autocast",
        engine__micro_batch=4,
        data__tokenizer=str(store / "tokenizer.safetensors"),
        data__reader="ram",
        tracking__sample_every=2,
        tracking__sample_classes=2,
        tracking__sample_per_class=3,
        tracking__validate_every=0,
        tracking__tensorboard=True,
        checkpoint__every_steps=2,
        checkpoint__keep_last=2,
    )
    job = Ranks(
        "mvar.testing.ranks:command", ["mvar.train", ["--config", str(path), "max_steps=5"]], 2, tmp_path / "logs"
    )
    assert job.wait() == [0, 0], job.output()
    run = RunFolder(tmp_path / "run")
    assert [record["step"] for record in records(run.path, "val")] == [5]
    drawn = [record["file"] for record in records(run.path, "sample")]
    assert drawn == [f"samples/step-{step:09d}.png" for step in (2, 4, 5)]
    with Image.open(run.path / drawn[-1]) as picture:
        assert picture.size == (3 * 6 + 2 * 2, 2 * 6 + 2)
        assert len(picture.getcolors(10_000) or []) > 10
    with Image.open(run.samples / "film.webp") as film:
        assert getattr(film, "n_frames", 1) == 3, "the grids, as one film"
    assert len(losses(run.path)) == 5
    assert "FutureWarning" not in job.output()
    named = ["--weights", str(run.path), "--tokenizer", str(store / "tokenizer.safetensors"), "--device", "cpu"]
    assert cli(["filmstrip", "--over", "checkpoints", *named, "--out", str(tmp_path / "strip")]) == 0
    with Image.open(tmp_path / "strip.png") as strip:
        factor, apart = 64 // 6, 6 + 2
        assert strip.size == ((2 * apart - 2) * factor, (3 * apart - 2) * factor), "two checkpoints of three classes"
        columns = [strip.crop((left, 0, left + 6 * factor, strip.height)) for left in (0, apart * factor)]
        assert columns[0].tobytes() != columns[1].tobytes()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.vocab_size=64", ["vocab_size", "32", "64"]),
        ("model.num_classes=2", ["model.num_classes 2", "3 classes"]),
        ("global_batch=9 engine.micro_batch=2", ["engine.micro_batch 2", "9"]),
        ("data.store=/nowhere", ["/nowhere"]),
        ("tracking.sample_every=5", ["data.tokenizer"]),
        ("tracking.sample_every=5 data.tokenizer=/nowhere", ["/nowhere"]),
        ("optim.base_lr=fast", ["optim.base_lr", "fast"]),
        ("optim.schedule=linear", ["optim.schedule", "linear"]),
        ("modle.depth=3", ["modle", "model."]),
        ("engine.ds_config=zero9.json", ["zero9.json"]),
        ("engine.precision=bf16 engine.ds_config=ds_configs/zero0.json", ["zero1.json"]),
    ],
)
def test_wrong_use_is_one_message_and_leaves_nothing(
    tmp_path: Path, store: Path, override: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, store)
    assert cli(["train", "--config", str(path), "--dry-run", *override.split()]) == 2
    message = capsys.readouterr().err
    assert message.count("mvar: error:") == 1
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_than_the_stores_is_refused(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_store(tmp_path / "other", seed=1) / "tokenizer.safetensors"
    path = write_config(tmp_path, store, tracking__sample_every=5, data__tokenizer=str(other))
    assert cli(["train", "--config", str(path), "--dry-run"]) == 2
    assert "did not make the code store" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_run(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, store, engine__micro_batch=2)
    assert cli(["train", "--config", str(path), "--dry-run", "max_steps=7"]) == 0
    text = capsys.readouterr().out
    assert "255,216 parameters, 3 classes, 50 training and 10 validation images" in text
    assert "7 steps of 8 images = 1 ranks x 2 x 4 accumulated" in text
    assert not (tmp_path / "run").exists()


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for key in ("optim.base_lr", "engine.ds_config", "checkpoint.every_steps", "--from-scratch", "--dry-run"):
        assert key in text


def test_torchrun_starts_it_for_real(tmp_path: Path, store: Path) -> None:
    path = write_config(tmp_path, store)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "mvar.train", "--config", str(path), "max_steps=2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 2
    assert "finished after 2 steps" in done.stdout
    assert "Warning" not in done.stdout + done.stderr.replace("OMP_NUM_THREADS", "")
