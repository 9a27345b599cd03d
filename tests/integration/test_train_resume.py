"""Real processes of `mvar train`, killed and stopped for real: what they record is what nobody disturbed records."""

from __future__ import annotations

import ctypes.util
import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvar.checkpoint.choosing import choose
from mvar.checkpoint.loading import CheckpointReader
from mvar.checkpoint.weights import load_weights
from mvar.cli import main as mvar
from mvar.run.launcher import Place
from mvar.run.names import folder_of, steps_in
from mvar.run.world import World
from mvar.status import status_of
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import Ranks, command
from mvar.testing.tiny_runs import losses, records, template, wait_for_step, write_config

STEPS = 25


def start(folder: Path, config: Path, ranks: int, *arguments: str) -> Ranks:
    return Ranks(
        "mvar.testing.ranks:command", ["mvar.train", ["--config", str(config), *arguments]], ranks, folder / "logs"
    )


def finish(folder: Path, config: Path, ranks: int, *arguments: str, expected: int = 0) -> str:
    """Run to the end; returns what was printed."""
    job = start(folder, config, ranks, *arguments)
    codes = job.wait()
    assert codes == [expected] * ranks, f"exit codes {codes}\n{job.output()}"
    return job.output()


def when(job: Ranks, run: Path, step: int, action: Callable[[], None]) -> None:
    """Do it as soon as the run has recorded `step`."""
    wait_for_step(job, run, step)
    action()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("resume") / "store")


def undisturbed(folder: Path, store: Path, ranks: int, **overrides: Any) -> list[float]:
    finish(folder, write_config(folder, store, "undisturbed", **overrides), ranks)
    found = losses(folder / "undisturbed")
    assert len(found) == STEPS
    return found


def test_one_rank_killed_twice_ends_with_the_bits_of_the_undisturbed_run(tmp_path: Path, store: Path) -> None:
    expected = undisturbed(tmp_path, store, 1, stage=1)
    config, run = write_config(tmp_path, store, "killed", stage=1), tmp_path / "killed"
    job = start(tmp_path, config, 1)
    when(job, run, 3, job.kill)  # Before the first checkpoint: everything is done again.
    job = start(tmp_path, config, 1)
    when(job, run, 17, job.kill)
    assert steps_in(run / "checkpoints") == [7, 14]
    finish(tmp_path, config, 1)
    assert losses(run) == expected
    assert [record["step"] for record in records(run, "resume")] == [0, 0, 14]
    assert [record["step"] for record in records(run, "val")] == [10, 20, 25]
    assert [(r["loss"], r["step"]) for r in records(run, "val")] == [
        (r["loss"], r["step"]) for r in records(tmp_path / "undisturbed", "val")
    ]
    _same_weights(run, tmp_path / "undisturbed")
    assert "nothing is left to do" in finish(tmp_path, config, 1)


def _same_weights(run: Path, other: Path) -> None:
    (config, state), (config_other, state_other) = load_weights(run), load_weights(other)
    assert config == config_other
    assert all(state[name].equal(state_other[name]) for name in state)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_killed_and_stopped_in_every_way_end_with_the_same_bits(
    tmp_path: Path, store: Path, stage: int
) -> None:
    expected = undisturbed(tmp_path, store, 2, stage=stage, engine__micro_batch=2)
    config = write_config(tmp_path, store, "stopped", stage=stage, engine__micro_batch=2)
    run = tmp_path / "stopped"
    job = start(tmp_path, config, 2)
    when(job, run, 9, job.kill)
    if stage == 3:
        job = start(tmp_path, config, 2)
        when(job, run, 16, lambda: job.processes[1].kill())  # One rank dies alone: the other must not hang.
        assert job.wait() == [1, -signal.SIGKILL], job.output()
    else:
        job = start(tmp_path, config, 2)
        when(job, run, 11, lambda: job.send(signal.SIGTERM, rank=1))  # Only one rank is told; both save and stop.
        assert job.wait() == [75, 75], job.output()
        job = start(tmp_path, config, 2)
        when(job, run, 16, lambda: (run / "STOP").touch())
        assert job.wait() == [75, 75], job.output()
        assert not (run / "STOP").exists()
        assert steps_in(run / "checkpoints")[-1] == len(losses(run)) < STEPS
    finish(tmp_path, config, 2)
    assert losses(run) == expected
    _same_weights(run, tmp_path / "undisturbed")


def test_a_run_may_change_ranks_stage_and_micro_batch_on_its_way(tmp_path: Path, store: Path) -> None:
    """1 -> 2 -> 4 -> 3 ranks over all ZeRO stages, with a moving average of the weights."""
    whole = {"global_batch": 12, "epochs": 6, "optim__ema_decay": 0.9}
    expected = undisturbed(tmp_path, store, 1, **whole)
    shapes = [(1, 1, 12, 5), (2, 3, 1, 10), (4, 2, 3, 15), (3, 3, 2, 20), (1, 0, 4, 25)]
    for ranks, stage, micro_batch, until in shapes:
        changed = [f"engine.ds_config={template(tmp_path, stage)}", f"engine.micro_batch={micro_batch}"]
        finish(tmp_path, write_config(tmp_path, store, "elastic", **whole), ranks, f"max_steps={until}", *changed)
    assert losses(tmp_path / "elastic") == pytest.approx(expected, rel=1e-5)
    resumes = [(r["step"], r["world"], r["zero_stage"]) for r in records(tmp_path / "elastic", "resume")]
    assert resumes == [(0, 1, 1), (5, 2, 3), (10, 4, 2), (15, 3, 3), (20, 1, 0)]
    ours, calm = (CheckpointReader(folder_of(tmp_path / run / "checkpoints", 25)) for run in ("elastic", "undisturbed"))
    for name, shape in calm.record.shapes.items():
        pair = [reader.read(name, "ema", 0, math.prod(shape)) for reader in (ours, calm)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5)


def test_a_moving_average_may_begin_and_end_on_the_way(tmp_path: Path, store: Path) -> None:
    """Training itself does not notice; an average that begins late begins at the weights."""
    expected = undisturbed(tmp_path, store, 1)
    config = write_config(tmp_path, store, "run")
    for until, decay in ((5, 0), (8, 0.5), (12, 0.5), (25, 0)):
        finish(tmp_path, config, 1, f"max_steps={until}", f"optim.ema_decay={decay}", "checkpoint.keep_last=9")
    assert losses(tmp_path / "run") == expected
    saved = {step: CheckpointReader(folder_of(tmp_path / "run" / "checkpoints", step)) for step in (5, 8, 12, 25)}
    assert ["ema" in saved[step].record.kinds for step in saved] == [False, True, True, False]
    begin, end, average = (
        saved[step].read("head.weight", kind, 0, 64) for step, kind in ((5, "weight"), (8, "weight"), (8, "ema"))
    )
    assert (begin - average).abs().max() > 0 and (end - average).abs().max() > 0
    assert ((average - begin).abs() <= (end - begin).abs() + 0.01).all()
    drawing = [
        "--weights",
        str(tmp_path / "run"),
        "--tokenizer",
        str(store / "tokenizer.safetensors"),
        "--per-class",
        "1",
    ]
    for step, code in ((12, 0), (25, 2)):  # There is one at step 12 and none at step 25.
        out = ["--step", str(step), "--ema", "--out", str(tmp_path / "drawn"), "--device", "cpu"]
        assert mvar(["sample", *drawing, *out]) == code
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 3


def test_a_young_average_has_a_short_memory_also_over_a_restart(tmp_path: Path, store: Path) -> None:
    """One that an older mvar began goes on as it was."""
    decay, every = 0.99, ("checkpoint.every_steps=1", "checkpoint.keep_last=9", "tracking.validate_every=0")
    config = write_config(tmp_path, store, "run", optim__ema_decay=decay)
    for until in (3, 5):
        finish(tmp_path, config, 1, f"max_steps={until}", *every)
    checkpoints = tmp_path / "run" / "checkpoints"
    record = CheckpointReader(folder_of(checkpoints, 5)).record
    assert record.progress.ema_updates == 5
    old = record.model_copy(update={"progress": replace(record.progress, ema_updates=None)})
    (folder_of(checkpoints, 5) / "checkpoint.json").write_text(old.text())
    finish(tmp_path, config, 1, "max_steps=6", *every)
    saved = {step: CheckpointReader(folder_of(checkpoints, step)) for step in range(1, 7)}

    def read(step: int, kind: str) -> torch.Tensor:
        return saved[step].read("head.weight", kind, 0, 64)

    for step in range(2, 7):
        expected = decay if step == 6 else step / (9 + step)  # Its n-th update: (1 + n - 1) / (10 + n - 1).
        average = expected * read(step - 1, "ema") + (1 - expected) * read(step, "weight")
        torch.testing.assert_close(read(step, "ema"), average, rtol=1e-5, atol=1e-7)
    finish(tmp_path, write_config(tmp_path, store, "off", optim__ema_decay=decay, optim__ema_warmup=False), 1, *every)
    saved = {step: CheckpointReader(folder_of(tmp_path / "off" / "checkpoints", step)) for step in (24, 25)}
    average = decay * read(24, "ema") + (1 - decay) * read(25, "weight")
    torch.testing.assert_close(read(25, "ema"), average, rtol=1e-5, atol=1e-7)


def test_a_spike_right_after_a_restart_is_seen(tmp_path: Path, store: Path) -> None:
    """The steps that are usual come with the checkpoint."""
    config = write_config(tmp_path, store, "run", epochs=8, engine__spike_sigmas=20)  # 50 steps.
    finish(tmp_path, config, 1, "max_steps=42")
    where = f"{__name__}:spiking"
    job = Ranks(where, [["--config", str(config)]], 1, tmp_path / "spiking")
    assert job.wait() == [0], job.output()
    spikes = [(record["step"], record["reason"][:4]) for record in records(tmp_path / "run", "spike")]
    assert spikes == [(44, "loss")]
    assert [(trouble.event, trouble.step) for trouble in status_of(tmp_path / "run").troubles] == [("spike", 44)]


def spiking(argv: list[str]) -> int:
    """What is told of step 44's loss is 100 times what it was."""
    from mvar.training.engine import Engine

    original: Any = Engine.result

    def result(self: Engine, launched: Any) -> Any:
        found = original(self, launched)
        if self.plan.lr(43) == launched.lr:
            found = replace(found, averages=replace(found.averages, loss=100 * found.averages.loss))
        return found

    Engine.result = result  # type: ignore[method-assign]
    return command("mvar.train", argv)


def test_a_deliberate_change_of_the_global_batch_keeps_the_place_in_data_and_schedule(
    tmp_path: Path, store: Path
) -> None:
    config, run = write_config(tmp_path, store, epochs=8), tmp_path / "run"  # 400 images
    finish(tmp_path, config, 2, "max_steps=20")
    assert "--change-batch" in finish(tmp_path, config, 2, "global_batch=16", expected=2)
    text = finish(tmp_path, config, 2, "global_batch=16", "--change-batch", "max_steps=24")
    assert "global batch by first step: [(0, 8), (20, 16)]" in text
    finish(tmp_path, config, 1, "global_batch=16")  # Known from the checkpoint by now.
    found = records(run)
    assert [r["samples"] for r in found] == [8 * n for n in range(1, 21)] + [160 + 16 * n for n in range(1, 16)]
    twice = write_config(tmp_path, store, "twice", epochs=8, global_batch=16)
    finish(tmp_path, twice, 1)
    schedule = {r["samples"]: (r["lr"], r["weight_decay"]) for r in records(tmp_path / "twice")}
    assert [(r["lr"], r["weight_decay"]) for r in found[20:]] == [schedule[r["samples"]] for r in found[20:]]
    assert [(r["step"], r["global_batch"]) for r in records(run, "resume")] == [(0, 8), (20, 16), (24, 16)]
    assert "nothing is left to do" in finish(tmp_path, config, 1, "global_batch=16")


def test_scales_may_join_one_by_one_also_over_a_kill(tmp_path: Path, store: Path) -> None:
    grows = {"optim__progressive": 0.8, "optim__progressive_scales": 1, "optim__progressive_warmup_epochs": 0.5}
    expected = undisturbed(tmp_path, store, 1, **grows)
    seen = [sum(x is not None for x in r["loss_per_scale"]) for r in records(tmp_path / "undisturbed")]
    assert seen == sorted(seen) and set(seen) == {1, 2, 3} and seen[:3] == [1, 1, 1] and seen[-5:] == [3] * 5
    assert [r["kind"] for r in records(tmp_path / "undisturbed", "spike")] == []
    config, run = write_config(tmp_path, store, "killed", stage=3, engine__micro_batch=2, **grows), tmp_path / "killed"
    job = start(tmp_path, config, 2)
    when(job, run, 12, job.kill)
    finish(tmp_path, config, 2)
    assert losses(run) == pytest.approx(expected, rel=1e-5)


def test_data_that_nothing_divides_is_used_to_the_last_image(tmp_path: Path) -> None:
    """23 images, batches of 6 over 3 ranks, 2.5 epochs: batches reach over the ends of epochs, nothing is dropped."""
    odd = make_store(tmp_path / "odd", train=23, val=5)
    whole = {"global_batch": 6, "epochs": 2.5, "engine__micro_batch": 2}
    found = {}
    for ranks in (1, 3):
        config = write_config(tmp_path, odd, f"on{ranks}", **whole)
        finish(tmp_path, config, ranks, "max_steps=4")
        finish(tmp_path, config, ranks)
        found[ranks] = losses(tmp_path / f"on{ranks}")
    assert len(found[1]) == math.ceil(2.5 * 23 / 6)
    assert found[3] == pytest.approx(found[1], rel=1e-5)
    assert [r["images"] for r in records(tmp_path / "on3", "val")] == [5, 5]
    assert "global_batch 6" in finish(tmp_path, config, 4, "run=" + str(tmp_path / "four"), expected=2)


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.safetensors", "checkpoint.json", "config.yaml"])
def test_whatever_happens_to_a_file_of_a_checkpoint_it_is_never_believed(
    tmp_path: Path, short_run: Path, file: str
) -> None:
    """Cut, longer, emptied, a bit flipped, removed, that of another step: the one before is used."""
    checkpoints = short_run / "checkpoints"
    data = (folder_of(checkpoints, 14) / file).read_bytes()
    flips = [bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]]) for at in (0, 9, len(data) // 2, len(data) - 2)]
    other = (folder_of(checkpoints, 7) / file).read_bytes()
    cuts = [data[:-1], data[: len(data) // 2], b"", data + b"}"]
    tried = [*flips, *cuts, None, *([other] if other != data else [])]
    for number, damaged in enumerate(tried):
        copy = tmp_path / str(number)
        shutil.copytree(checkpoints, copy)
        victim = folder_of(copy, 14) / file
        victim.unlink() if damaged is None else victim.write_bytes(damaged)
        assert choose(copy, World(Place("alone"), torch.device("cpu"))) == folder_of(copy, 7)
        assert (copy / "step-000000014.damaged").is_dir()
        shutil.rmtree(copy)


@pytest.fixture(scope="module")
def short_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, saved at steps 7 and 14."""
    folder = tmp_path_factory.mktemp("short")
    finish(folder, write_config(folder, store), 2, "max_steps=14")
    return folder / "run"


def test_refusals_and_damage(tmp_path: Path, store: Path) -> None:
    """One short run, then everything that can be wrong with going on from it."""
    config, run = write_config(tmp_path, store, stage=0), tmp_path / "run"
    finish(tmp_path, config, 1, "max_steps=14")
    assert steps_in(run / "checkpoints") == [7, 14]

    for override, key in (
        ("seed=4", "seed: was 3, is 4"),
        ("global_batch=10", "global_batch: was 8, is 10"),
        ("model.depth=3", "model.depth: was 2, is 3"),
        ("model.label_drop=0.2", "model.label_drop: was 0.1, is 0.2"),
    ):
        text = finish(tmp_path, config, 1, override, expected=2)
        assert key in text
    other = make_store(tmp_path / "other-store", seed=1)
    assert "data.store (its manifest)" in finish(tmp_path, config, 1, f"data.store={other}", expected=2)

    weights = folder_of(run / "checkpoints", 14) / "rank-00000.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    weights.write_bytes(flipped)
    text = finish(tmp_path, config, 1, "max_steps=15")
    assert "WARNING: damaged checkpoint set aside as step-000000014.damaged" in text
    assert "going on from step-000000007" in text
    assert len(losses(run)) == 15

    shutil.rmtree(run / "checkpoints")
    assert "--from-scratch" in finish(tmp_path, config, 1, expected=2)
    finish(tmp_path, config, 1, "--from-scratch", "max_steps=8")
    assert len(losses(run)) == 8
    assert (run / "before-from-scratch-1" / "metrics.jsonl").exists()


def test_only_one_process_trains_in_a_folder(tmp_path: Path, store: Path) -> None:
    config, run = write_config(tmp_path, store, epochs=1000), tmp_path / "run"
    job = start(tmp_path, config, 1)
    when(job, run, 1, lambda: None)
    text = finish(tmp_path / "second", config, 1, expected=2)
    assert f"process {job.processes[0].pid} on " in text
    job.send(signal.SIGUSR1, rank=0)
    assert job.wait() == [75]
    assert json.loads((folder_of(run / "checkpoints", len(losses(run))) / "checkpoint.json").read_text())


@pytest.mark.slow
def test_moments_on_disk_resume_and_move_to_another_template(tmp_path: Path, store: Path) -> None:
    """Compiles DeepSpeed's file access where that was not done before: minutes, and libaio's headers."""
    if "libaio" not in (ctypes.util.find_library("aio") or ""):
        pytest.skip("libaio is not installed (Debian: libaio-dev)")
    wide = {"model__width": 256, "model__heads": 4}  # Smaller tensors would stay in memory.
    expected = undisturbed(tmp_path, store, 1, **wide)
    disk = tmp_path / "disk.json"
    offload = {"device": "nvme", "nvme_path": "auto", "buffer_count": 4, "pin_memory": False}
    zero = {
        "stage": 3,
        "sub_group_size": 500_000,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": offload,
    }
    disk.write_text(json.dumps({"zero_optimization": zero, "aio": {"block_size": 1048576}}))
    config = write_config(tmp_path, store, "disk", **wide, engine__offload_folder=str(tmp_path))
    for until in (5, 12):
        finish(tmp_path, config, 1, f"engine.ds_config={disk}", f"max_steps={until}")
    assert list(tmp_path.rglob("*.tensor.swp")), "nothing was kept on disk"
    finish(tmp_path, config, 1)
    assert losses(tmp_path / "disk") == pytest.approx(expected, abs=1e-5)
