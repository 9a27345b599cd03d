"""What goes wrong around a training: a hung or raising rank, unreadable data, a full disk, a folder that somebody took.

Each case runs real processes. `entry` functions below run in them, spoil one thing on one rank, and call `mvar train`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mvar.checkpoint.choosing import verify
from mvar.checkpoint.record import CheckpointRecord
from mvar.run.history import History
from mvar.run.names import folder_of, steps_in
from mvar.status import status_of
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import REPOSITORY, Ranks, command
from mvar.testing.tiny_runs import losses, records, wait_for_step, write_config

STEPS = 25
CANNOT_MOUNT = 77


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("faults") / "store")


@pytest.fixture(scope="module")
def calm(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run that nothing happens to, on two ranks."""
    folder = tmp_path_factory.mktemp("calm")
    job = start("none", folder, write_config(folder, store, "calm"), 2)
    assert job.wait() == [0, 0], job.output()
    return losses(folder / "calm")


def start(
    entry: str, folder: Path, config: Path, ranks: int, *arguments: str, environ: dict[str, str] | None = None
) -> Ranks:
    where = f"tests.integration.test_train_faults:{entry}"
    return Ranks(where, [["--config", str(config), *arguments]], ranks, folder / "logs", environ)


def none(argv: list[str]) -> int:
    return command("mvar.train", argv)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


# ---- ranks that hang or raise


def hanging(argv: list[str]) -> int:
    """Rank 1 never ends its fifth step."""
    on_step(4, lambda: threading.Event().wait())
    return command("mvar.train", argv)


def raising(argv: list[str]) -> int:
    """Rank 1 fails in its fifth step, as a bug would."""

    def fail() -> None:
        raise ZeroDivisionError("a bug on one rank")

    on_step(4, fail)
    return command("mvar.train", argv)


def on_step(number: int, action: Callable[[], object]) -> None:
    from mvar.training.engine import Engine

    original: Any = Engine._update

    def update(self: Engine) -> Any:
        if rank() == 1 and self.partition.adam_steps == number:
            action()
        return original(self)

    Engine._update = update  # type: ignore[method-assign]


def test_a_hung_rank_ends_the_job_with_the_stacks_of_all_ranks(tmp_path: Path, store: Path, calm: list[float]) -> None:
    config = write_config(tmp_path, store, "run", engine__watchdog_s=15)
    job = start("hanging", tmp_path, config, 2)
    assert job.wait() == [1, 1], job.output()
    for log, where in zip(job.logs, ("train.py", "in hanging"), strict=True):
        text = log.read_text()
        assert "Timeout (0:00:15)!" in text and where in text
    finish(tmp_path, config, calm)
    assert [start.code for start in History(tmp_path / "run").starts()] == [None, 0]


def test_an_exception_on_one_rank_ends_all(tmp_path: Path, store: Path, calm: list[float]) -> None:
    config = write_config(tmp_path, store, "run")
    job = start("raising", tmp_path, config, 2)
    assert job.wait() == [1, 1], job.output()
    assert "a bug on one rank" in job.logs[1].read_text()
    finish(tmp_path, config, calm)


def finish(folder: Path, config: Path, calm: list[float], *arguments: str) -> None:
    job = start("none", folder, config, 2, *arguments)
    assert job.wait() == [0, 0], job.output()
    assert losses(folder / "run") == calm


# ---- data


def unreadable(argv: list[str]) -> int:
    """Rank 1 cannot read what it needs for the tenth step."""
    from mvar.data import stream as data
    from mvar.errors import StoreError

    original: Any = data.TrainStream.batch

    def batch(self: data.TrainStream, samples_seen: int, start: int, count: int) -> Any:
        if rank() == 1 and samples_seen >= 9 * self.global_batch:
            raise StoreError("shard train-000000.tar: damaged")
        return original(self, samples_seen, start, count)

    data.TrainStream.batch = batch  # type: ignore[method-assign]
    return command("mvar.train", argv)


def test_unreadable_data_on_one_rank_saves_and_ends_all_with_its_message(
    tmp_path: Path, store: Path, calm: list[float]
) -> None:
    config = write_config(tmp_path, store, "run")
    job = start("unreadable", tmp_path, config, 2)
    assert job.wait() == [2, 2], job.output()
    assert "shard train-000000.tar: damaged" in job.logs[1].read_text()
    assert steps_in(tmp_path / "run" / "checkpoints") == [7, 9]
    assert History(tmp_path / "run").starts()[0].code == 2
    finish(tmp_path, config, calm)


# ---- data that spoils the training


def poisoned(argv: list[str]) -> int:
    """Images 80 to 119 of the order of data give NaN on rank 1; with POISON=all, everything from image 80 on."""
    from mvar.training.engine import Engine

    original: Any = Engine._losses

    def losses_of(self: Engine, step: int, batch: Any) -> Any:
        found = original(self, step, batch)
        last = 120 if os.environ["POISON"] == "some" else 10**9
        if rank() == 1 and 80 <= batch.samples_seen < last:
            found.loss.data.fill_(float("nan"))
            found.loss_BS.fill_(float("nan"))
        return type(found)(found.loss * float(found.loss), found.loss_BS, found.correct_BS)

    Engine._losses = losses_of  # type: ignore[method-assign]
    return command("mvar.train", argv)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_diverges_goes_back_and_skips_the_data_that_did_it(tmp_path: Path, store: Path, stage: int) -> None:
    config = write_config(tmp_path, store, "run", stage=stage, engine__max_bad_steps=3, checkpoint__every_steps=4)
    run = tmp_path / "run"
    job = start("poisoned", tmp_path, config, 2, environ={"POISON": "some"})
    assert job.wait() == [0, 0], job.output()
    assert "Went back to step-000000008; the 40 images after it are skipped." in job.output()
    train = records(run)
    # 8 steps of 8 images; 5 steps (64 to 103) skipped; two bad steps are left, which are fewer than three in a row.
    assert [r["samples"] for r in train] == [8 * n for n in (*range(1, 9), *range(14, 26))]
    assert [r["step"] for r in train if r["skipped"]] == [9, 10]
    assert all(len(r["bad_samples"]) == 4 for r in train if r["skipped"])
    assert [r["step"] for r in records(run, "resume")] == [0, 8]
    assert (run / "checkpoints" / "step-000000012.diverged").is_dir()
    found = status_of(run).troubles  # metrics.jsonl was cut back to step 8; the third bad step has its record, too.
    bad = [(t.event, t.step, len(t.samples)) for t in found]
    assert bad[:4] == [("skipped", 11, 4), ("skipped", 12, 4), ("skipped", 13, 4), ("went_back", 8, 0)]
    assert bad[4:] == [("skipped", 9, 4), ("skipped", 10, 4)]
    assert "steps 10 to 12 were bad; 40 images are left out" in found[3].reason
    assert json.loads((run / "FINISHED").read_text()) == {"step": 20, "samples": 200}


def test_a_run_that_cannot_be_helped_ends_with_the_reason(tmp_path: Path, store: Path) -> None:
    config = write_config(tmp_path, store, "run", engine__max_bad_steps=3)
    job = start("poisoned", tmp_path, config, 2, environ={"POISON": "all"})
    assert job.wait() == [2, 2], job.output()
    assert "loss or gradient is not finite, 3 steps in a row (engine.max_bad_steps), after going back 1" in job.output()
    assert "history.jsonl names the samples" in job.output()
    assert all(len(t.samples) == 4 for t in status_of(tmp_path / "run").troubles if t.event == "skipped")
    assert steps_in(tmp_path / "run" / "checkpoints") == [7]


# ---- full disks


def full_disk_on_one_rank(argv: list[str]) -> int:
    """Rank 1's disk is full when the second checkpoint is written."""
    from mvar.checkpoint import tensors

    original: Any = tensors._chunks
    calls = [0]

    def chunks(*arguments: Any) -> Any:
        calls[0] += 1
        for number, chunk in enumerate(original(*arguments)):
            if rank() == 1 and calls[0] == 2 and number == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield chunk

    tensors._chunks = chunks
    return command("mvar.train", argv)


@pytest.mark.parametrize("background", ["auto", "off"])
@pytest.mark.parametrize("policy", ["go_on", "stop"])
def test_a_save_that_fails_on_one_rank_ends_the_run_only_if_asked_to(
    tmp_path: Path, store: Path, calm: list[float], policy: str, background: str
) -> None:
    settings = {"checkpoint__on_failure": policy, "checkpoint__background": background}
    config, run = write_config(tmp_path, store, "run", **settings), tmp_path / "run"
    job = start("full_disk_on_one_rank", tmp_path, config, 2)
    codes = job.wait()
    assert "No space left on device" in job.output()
    if policy == "stop":
        assert codes == [2, 2], job.output()
        assert steps_in(run / "checkpoints") == [7]
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000007"]
        finish(tmp_path, config, calm)
    else:
        assert codes == [0, 0], job.output()
        assert [record["step"] for record in records(run, "not_saved")] == [14]
        assert losses(run) == calm
    steps = steps_in(run / "checkpoints")
    assert steps == ([14, 21, 25] if policy == "stop" else [7, 21, 25])
    assert len(list((run / "checkpoints").iterdir())) == len(steps)


def on_a_small_disk(argv: list[str]) -> int:
    """The run folder is a tmpfs with room for two checkpoints; it is filled up for some time in the middle."""
    from mvar.training.engine import Engine

    run = Path(next(word for word in argv if word.startswith("run=")).removeprefix("run="))
    if ctypes.CDLL(None, use_errno=True).unshare(0x20000):  # CLONE_NEWNS
        return CANNOT_MOUNT
    run.mkdir()
    quiet: dict[str, Any] = {"check": False, "capture_output": True}
    subprocess.run(["mount", "--make-rprivate", "/"], **quiet)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(run)], **quiet).returncode:
        return CANNOT_MOUNT
    ballast, original, usage = run / "ballast", Engine._update, shutil.disk_usage

    def update(self: Engine) -> Any:
        if self.partition.adam_steps == 12:
            ballast.write_bytes(b"x" * (usage(run).free - 300_000))
        elif self.partition.adam_steps == 16:
            ballast.unlink()
        return original(self)

    Engine._update = update  # type: ignore[method-assign]
    # The free space looks sufficient, and is gone when it is needed.
    shutil.disk_usage = lambda path: usage(path)._replace(free=2**40)  # type: ignore[assignment]
    code = command("mvar.train", argv)
    shutil.copytree(run, run.with_name("kept"))
    return code


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path: Path, store: Path) -> None:
    settings = {"checkpoint__on_failure": "go_on", "checkpoint__keep_last": 1}
    config = write_config(tmp_path, store, "run", **settings)
    job = start("on_a_small_disk", tmp_path, config, 1, f"run={tmp_path / 'small'}")
    code = job.wait()[0]
    if code == CANNOT_MOUNT:
        pytest.skip("a tmpfs cannot be mounted here (no CAP_SYS_ADMIN)")
    assert code == 0, job.output()
    kept = tmp_path / "kept"
    assert "step 14 was not saved" in job.output() and "No space left on device" in job.output()
    assert [record["step"] for record in records(kept, "not_saved")] == [14]
    assert [record["step"] for record in records(kept, "checkpoint")] == [7, 21, 25]
    assert len(losses(kept)) == STEPS
    assert [path.name for path in (kept / "checkpoints").iterdir()] == ["step-000000025"]
    verify(folder_of(kept / "checkpoints", 25))


# ---- whose folder it is


def test_a_run_that_was_taken_over_ends_and_touches_nothing(tmp_path: Path, store: Path) -> None:
    """As a process that slept for long, or was cut off, finds it when it comes back."""
    config, run = write_config(tmp_path, store, "run", epochs=1000), tmp_path / "run"
    job = start("none", tmp_path, config, 2)
    wait_for_step(job, run, 9)
    other = run / "other"
    other.write_text("another-host\nprocess 7 on another-host")
    os.replace(other, run / ".run.claim")
    assert job.wait() == [2, 2], job.output()
    assert "another process took it over" in job.logs[0].read_text()
    assert (run / ".run.claim").read_text().startswith("another-host")
    assert not (run / "FINISHED").exists()


def test_a_silent_holder_on_another_host_is_replaced_and_a_living_one_is_not(tmp_path: Path, store: Path) -> None:
    config, run = write_config(tmp_path, store, "run", checkpoint__takeover_s=3), tmp_path / "run"
    run.mkdir()
    claim = run / ".run.claim"
    claim.write_text("another-host\nprocess 7 on another-host")
    job = start("none", tmp_path, config, 1)
    while job.alive():
        os.utime(claim)  # A heartbeat.
        time.sleep(0.3)
    assert job.wait() == [2]
    assert "process 7 on another-host is training in it" in job.output()
    job = start("none", tmp_path, config, 1)
    assert job.wait() == [0], job.output()
    assert len(losses(run)) == STEPS


# ---- reasons to stop


@pytest.mark.parametrize("reason", ["SIGTERM", "SIGUSR1", "deadline", "STOP"])
def test_one_rank_that_is_asked_to_stop_makes_all_save_the_same_step(
    tmp_path: Path, store: Path, calm: list[float], reason: str
) -> None:
    config, run = write_config(tmp_path, store, "run"), tmp_path / "run"
    job = start("deadline_on_one_rank" if reason == "deadline" else "slow_steps", tmp_path, config, 2)
    if reason != "deadline":
        wait_for_step(job, run, 9)
        if reason == "STOP":
            (run / "STOP").touch()
        else:
            job.send(signal.Signals[reason], rank=1)
    assert job.wait() == [75, 75], job.output()
    done = len(losses(run))
    assert 9 <= done < STEPS
    assert steps_in(run / "checkpoints")[-1] == done
    ending = History(run).starts()[-1]
    assert (ending.code, ending.end_step) == (75, done) and ending.reason
    assert CheckpointRecord.read(folder_of(run / "checkpoints", done)).progress.step == done
    finish(tmp_path, config, calm)


def slow_steps(argv: list[str]) -> int:
    """Slow enough for a test to act between two steps."""
    from mvar.training.engine import Engine

    original: Any = Engine._update

    def update(self: Engine) -> Any:
        time.sleep(0.05)
        return original(self)

    Engine._update = update  # type: ignore[method-assign]
    return command("mvar.train", argv)


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # Whoever adopted it may leave it so.
    except psutil.NoSuchProcess:
        return False


def test_processes_whose_torchrun_was_killed_save_and_give_the_folder_back(tmp_path: Path, store: Path) -> None:
    """torchrun dies of SIGUSR1, Slurm's early warning, unless it is told to pass it on; and leaves its processes."""
    config, run = write_config(tmp_path, store, "run", epochs=100_000, max_steps=400), tmp_path / "run"
    words = ["--nproc-per-node=2", "--standalone", "-m", "mvar.train", "--config", str(config)]
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words], cwd=REPOSITORY, stdout=log, stderr=log
        )
    ranks: list[psutil.Process] = []
    try:
        while torchrun.poll() is None and not steps_in(run / "checkpoints"):
            time.sleep(0.05)
        ranks = [one for one in psutil.Process(torchrun.pid).children() if "mvar.train" in one.cmdline()]
        torchrun.send_signal(signal.SIGUSR1)
        assert torchrun.wait() == -signal.SIGUSR1
        while any(alive(one) for one in ranks):
            time.sleep(0.05)
    finally:
        for left in [torchrun, *ranks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    ending = History(run).starts()[-1]
    assert len(ranks) == 2 and ending.code == 75 and "launcher" in ending.reason, (tmp_path / "log").read_text()
    assert steps_in(run / "checkpoints")[-1] == ending.end_step == len(losses(run))
    assert not (run / ".run.claim").exists()


def deadline_on_one_rank(argv: list[str]) -> int:
    """Rank 1's job ends soon after the ninth step."""
    from mvar.run.stopping import StopRequests
    from mvar.training.engine import Engine

    original: Any = Engine._update
    stops: list[StopRequests] = []
    enter: Any = StopRequests.__enter__

    def entered(self: StopRequests) -> Any:
        stops.append(self)
        return enter(self)

    def update(self: Engine) -> Any:
        if rank() == 1 and self.partition.adam_steps == 9:
            stops[0]._deadline = time.time()
        return original(self)

    StopRequests.__enter__ = entered  # type: ignore[method-assign]
    Engine._update = update  # type: ignore[method-assign]
    return command("mvar.train", argv)


# ---- looks at the model


def undrawable(argv: list[str]) -> int:
    """Drawing fails after 5 steps on rank 1 alone (not under ZeRO 3), after 10 when rank 0 writes the picture, after 15
    inside the model of all ranks."""
    import mvar.train as module
    from mvar.model.block import Block
    from mvar.training import drawing as pictures

    generate, save_png, forward = pictures.generate_codes, pictures.save_png, Block.forward
    draw: Any = module.TransformerTraining.draw
    now, alone = [0], rank() == 1 and os.environ["STAGE"] != "3"

    def drawing(self: module.TransformerTraining, done: int) -> None:
        now[0] = done
        draw(self, done)
        now[0] = 0

    def fail(when: bool, action: Any, *arguments: Any, **named: Any) -> Any:
        if when:
            raise RuntimeError(f"nothing to see after {now[0]} steps")
        return action(*arguments, **named)

    def forwards(self: Any, *arguments: Any, **named: Any) -> Any:
        return fail(now[0] == 15, forward, self, *arguments, **named)

    setattr(pictures, "generate_codes", lambda *a, **n: fail(alone and now[0] == 5, generate, *a, **n))  # noqa: B010
    setattr(pictures, "save_png", lambda *a, **n: fail(now[0] == 10, save_png, *a, **n))  # noqa: B010
    module.TransformerTraining.draw = drawing  # type: ignore[method-assign]
    Block.forward = forwards  # type: ignore[method-assign]
    return command("mvar.train", argv)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_draw_that_fails_costs_the_picture_and_not_the_run(
    tmp_path: Path, store: Path, calm: list[float], stage: int
) -> None:
    settings = {"data__tokenizer": str(store / "tokenizer.safetensors"), "tracking__sample_every": 5}
    settings |= {"tracking__sample_classes": 2, "tracking__sample_per_class": 3}
    settings |= {"checkpoint__every_steps": 5, "checkpoint__background": "off"}
    config, run = write_config(tmp_path, store, "run", stage=stage, **settings), tmp_path / "run"
    job = start("undrawable", tmp_path, config, 2, environ={"STAGE": str(stage)})
    codes, said = job.wait(), job.logs[0].read_text()
    if stage == 3:  # Ranks need each other while they draw: a failure there ends the run, but no later start.
        assert codes == [1, 1], job.output()
        assert "nothing to see after 15 steps" in said and steps_in(run / "checkpoints")[-1] == 15
        job = start("none", tmp_path, config, 2)
        codes = job.wait()
    assert codes == [0, 0], job.output()
    drawn = [record["step"] for record in records(run, "sample")]
    assert drawn == ([20, 25] if stage == 2 else [5, 20, 25])
    for number, step in ((1, 5), (0, 10), (0, 15)) if stage == 2 else ((0, 10),):
        told = f"step {step}: no samples were drawn: rank {number}: RuntimeError: nothing to see after {step} steps"
        assert said.count(told) == 1, said
    grids = [f"step-{step:09d}.png" for step in drawn]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["film.webp", *grids]
    assert losses(run) == (calm if stage == 2 else pytest.approx(calm, abs=1e-5))


def asked_in_validation(argv: list[str]) -> int:
    """Rank 1 is asked to stop in the middle of the validation after 10 steps; all die in that after the last step."""
    from mvar.train import TransformerTraining

    original: Any = TransformerTraining.require_leisure

    def leisure(self: TransformerTraining) -> None:
        steps = self.engine.partition.adam_steps
        if os.environ["LOOK"] == "stop" and steps == 10 and rank() == 1:
            self.session.stops._note(signal.SIGTERM, None)
        if os.environ["LOOK"] == "die" and steps == STEPS:
            os._exit(1)
        original(self)

    TransformerTraining.require_leisure = leisure  # type: ignore[method-assign]
    return command("mvar.train", argv)


@pytest.mark.parametrize("every", [5, 7])
def test_a_validation_that_is_cut_short_is_made_up_for_after_the_save(
    tmp_path: Path, store: Path, calm: list[float], every: int
) -> None:
    """It is the checkpoint that must not be lost. Saved and validated after the same steps, and after others."""
    settings = {"checkpoint__every_steps": every, "checkpoint__keep_last": 9}
    config, run = write_config(tmp_path, store, "run", **settings), tmp_path / "run"
    job = start("asked_in_validation", tmp_path, config, 2, environ={"LOOK": "stop"})
    assert job.wait() == [75, 75], job.output()
    assert steps_in(run / "checkpoints")[-1] == 10 and records(run, "val") == []
    assert History(run).starts()[-1].reason == "another rank was asked to"
    job = start("asked_in_validation", tmp_path, config, 2, environ={"LOOK": "die"})
    assert job.wait() == [1, 1], job.output()
    assert steps_in(run / "checkpoints")[-1] == STEPS and not (run / "FINISHED").exists()
    finish(tmp_path, config, calm)
    assert (run / "FINISHED").exists()
    validated = {record["step"]: record["loss"] for record in records(run, "val")}
    assert list(validated) == [10, 20, STEPS]
    noted = {
        step: CheckpointRecord.read(folder_of(run / "checkpoints", step)) for step in steps_in(run / "checkpoints")
    }
    assert {step: record.progress.validation_loss for step, record in noted.items()} == {
        step: validated.get(step) for step in noted
    }
    for step in noted:
        verify(folder_of(run / "checkpoints", step))


# ---- wrong sizes


def test_more_ranks_than_a_batch_has_images_is_refused_before_anything_starts(tmp_path: Path, store: Path) -> None:
    config = write_config(tmp_path, store, "run", global_batch=3)
    job = start("none", tmp_path, config, 4)
    assert job.wait() == [2, 2, 2, 2], job.output()
    assert "global_batch" in job.logs[0].read_text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
