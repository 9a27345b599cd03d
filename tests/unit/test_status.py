"""`mvar status`: what it says follows from the files of a run, with and without Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvar import status
from mvar.errors import MvarError
from mvar.run import history as histories
from mvar.run.claims import Claims
from mvar.run.history import History
from mvar.run.tracking import JsonLines
from mvar.status import Status, main, show, status_of

BEGAN = 1_700_000_000.0


@pytest.fixture(autouse=True)
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    yield


class Life:
    """Writes a run's files as a training does, at times of its own."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.now = run, BEGAN
        run.mkdir()
        monkeypatch.setattr(histories.time, "time", lambda: self.now)
        self.history = History(run)

    def start(self, world: int, step: int, *, job: str | None = None, waited_s: float = 0.0, last: int = 100) -> None:
        slurm = {"SLURM_JOB_ID": job, "SLURM_JOB_START_TIME": str(int(self.now - waited_s))} if job else {}
        self.history.start(world, slurm)
        self.now += 10  # Starting is no useful work.
        self.history.going_on(step)
        self.lines = JsonLines(self.run / "metrics.jsonl", step)
        self.step = step
        self.lines.write({"kind": "resume", "step": step, "samples": 8 * step, "world": world, "last_step": last})

    def steps(self, count: int, step_s: float = 2.0) -> None:
        for _ in range(count):
            self.step += 1
            self.now += step_s
            record = {"kind": "train", "step": self.step, "samples": 8 * self.step, "loss": 10.0 - self.step / 100}
            self.lines.write(record | {"loss_per_scale": [1.0, None], "imgs_per_s": 8 / step_s, "step_s": step_s})
        os.utime(self.run / "metrics.jsonl", (self.now, self.now))

    def saved(self) -> None:
        folder = self.run / "checkpoints" / f"step-{self.step:09d}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").touch()
        os.utime(folder / "checkpoint.json", (self.now, self.now))


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Life:
    return Life(tmp_path / "run", monkeypatch)


def test_a_run_with_a_kill_a_stop_and_another_number_of_ranks(life: Life) -> None:
    life.start(2, 0, job="40", waited_s=30)  # Allocated 30 s before the process began.
    life.steps(60)
    life.saved()
    life.steps(5)  # Lost: done again by the next start.
    life.now += 1000  # Killed; nobody had the machines until the requeued job began.
    life.start(2, 60, job="41")
    life.steps(20)
    life.saved()
    life.history.end(75, 80, "the job's time is nearly over")
    life.now += 500
    life.start(1, 80)
    life.steps(10, step_s=4.0)
    (life.run / "checkpoints" / "step-000000085.damaged").mkdir()

    found = status_of(life.run, life.now + 60)
    assert found.state == "killed"  # No claim is held.
    assert found.measured is not None and found.saved is not None
    assert (found.measured.step, found.measured.samples, found.measured.last_step) == (90, 720, 100)
    assert found.measured.loss == 9.1
    assert found.measured.mean_loss == pytest.approx(sum(10 - step / 100 for step in range(41, 91)) / 50)
    assert found.measured.step_s == pytest.approx((40 * 2 + 10 * 4) / 50)
    assert found.measured.imgs_per_s == pytest.approx(8 * 50 / (40 * 2 + 10 * 4))
    assert found.eta_s == pytest.approx(10 * (40 * 2 + 10 * 4) / 50)
    assert (found.saved.step, found.saved.age_s, found.saved.damaged) == (80, 10 + 40 + 60 + 500, 1)

    spans = [period.end - period.begin for period in found.periods]
    assert spans == [30 + 10 + 65 * 2, 10 + 20 * 2, 10 + 10 * 4]
    useful = 60 * 2 * 2 + 20 * 2 * 2 + 10 * 4 * 1
    assert found.goodput == pytest.approx(useful / (170 * 2 + 50 * 2 + 50 * 1))
    assert [period.why for period in found.periods] == [
        "killed",
        "the job's time is nearly over (exit code 75)",
        "killed",
    ]
    text = show(found)
    assert "step        90 of 100 (90.0 %), 720 images seen" in text
    assert "job 41 on " in text and "from step 60" in text and "1 damaged set aside" in text
    assert "no Slurm on this machine" in text


def test_starts_of_one_job_share_its_allocation(life: Life) -> None:
    life.start(1, 0, job="7")
    allocated = life.now - 10
    life.steps(5)
    life.history.end(1, None, "RuntimeError: boom" + " and so on" * 50)
    life.now += 3
    life.start(1, 0, job="7", waited_s=life.now - allocated)
    life.steps(5)
    life.history.end(0, 5, "finished")
    (life.run / "FINISHED").write_text("{}")
    found = status_of(life.run)
    assert found.state == "finished"
    assert found.allocated_rank_s == life.now - allocated  # No second counts twice.
    assert "RuntimeError: boom and so on" in show(found) and "... (exit code 1)" in show(found)
    assert max(map(len, show(found).splitlines()[1:])) < 200  # One screen; history.jsonl has it all.


def test_a_living_process_is_seen_and_a_dead_one_is_not(life: Life) -> None:
    life.start(1, 0)
    life.steps(3)
    with Claims(life.run) as claims:
        assert claims.take("run")
        found = status_of(life.run)
        assert found.state == "training" and f"process {os.getpid()} on " in show(found)
        assert found.periods[-1].why == "running"
    assert status_of(life.run).state == "killed"
    (life.run / ".run.claim").write_text("elsewhere\nprocess 1 on elsewhere")  # Of another host: its age decides.
    assert status_of(life.run).state == "training"
    os.utime(life.run / ".run.claim", (life.now - 91, life.now - 91))
    assert status_of(life.run).state == "killed"


def test_a_torn_last_line_is_passed_over(life: Life) -> None:
    life.start(1, 0)
    life.steps(3)
    whole = status_of(life.run)
    with (life.run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "samples": 32, "loss": 1.0, "step_s": 50')
    os.utime(life.run / "metrics.jsonl", (life.now, life.now))
    torn = status_of(life.run)
    assert torn.measured == whole.measured
    assert torn.goodput == whole.goodput


def test_only_the_end_of_a_long_file_is_parsed(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    life.start(3, 0)
    life.steps(2000)
    expected = status_of(life.run)
    monkeypatch.setattr(status, "_BLOCK_BYTES", 97)  # Lines across blocks.
    assert status_of(life.run) == expected
    assert expected.measured is not None and expected.measured.step == 2000
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(status.json, "loads", lambda line: parsed.append(line) or loads(line))
    status.read_measured(life.run / "metrics.jsonl")
    assert len(parsed) == 50 + 1
    assert status.useful_rank_seconds(life.run / "metrics.jsonl") == 2000 * 2 * 3


def squeue(folder: Path, text: str) -> None:
    path = folder / "squeue"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_jobs_of_the_run_are_found_by_name_id_and_command(life: Life, tmp_path: Path) -> None:
    life.start(1, 0, job="7")
    lines = [
        "7|whatever|RUNNING|1:00|2:00|node1|7|7|/|/bin/x",
        "8_[2-9]|mvar-train-run|PENDING|0:00|2:00|(Dependency)|8|8|/|/bin/x",
        f"9|mvar-train|PENDING|0:00|2:00|(Priority)|9|9|{tmp_path}|slurm/train.sbatch --config c run=run",
        f"10|mvar-train|RUNNING|0:00|2:00|node2|10|10|{tmp_path}|slurm/train.sbatch run=other",
    ]
    squeue(tmp_path / "bin", "".join(f"echo '{line}'\n" for line in lines))
    found = status_of(life.run)
    assert [job.job for job in found.jobs] == ["7", "8_[2-9]", "9"]
    assert "8_[2-9] mvar-train-run PENDING 0:00 of 2:00 (Dependency)" in show(found)


def test_a_queue_that_does_not_answer_is_no_obstacle(
    life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.start(1, 0)
    squeue(tmp_path / "bin", "echo 'slurm_load_jobs error: down' >&2; exit 1")
    assert status_of(life.run).queue_problem == "slurm_load_jobs error: down"
    monkeypatch.setattr(status, "QUEUE_WITHIN_S", 0.2)
    squeue(tmp_path / "bin", "exec /bin/sleep 60")
    assert status_of(life.run).queue_problem == "squeue gave no answer in 0.2 s"


def test_json_has_everything(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    life.start(1, 0)
    life.steps(3)
    assert main([str(life.run), "--json"]) == 0
    tree: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert tree.keys() == Status.__dataclass_fields__.keys()
    assert tree["measured"]["step"] == 3 and tree["periods"][0]["why"] == "killed"


def test_what_is_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MvarError, match="not found"):
        status_of(tmp_path / "nowhere")
    with pytest.raises(MvarError, match=r"no run folder .* Give the folder that was run="):
        status_of(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert "not begun" in show(status_of(tmp_path))


def test_no_torch_is_needed() -> None:
    probe = "import sys, mvar.status; print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_troubles_outlive_the_rollback_that_undid_them(life: Life) -> None:
    life.start(2, 0)
    life.steps(20)
    life.history.spike(18, "loss 9, usually 6 +- 0.1", [40, 7, 12])
    life.history.skipped(19, "loss or gradient is not finite", list(range(100)))
    life.history.skipped(20, "loss or gradient is not finite", [])
    life.history.went_back(17, 19, 10, 80)
    life.lines = JsonLines(life.run / "metrics.jsonl", 10)  # As a rollback does: cut back to its checkpoint.
    life.history.end(0, 30, "finished")
    found = status_of(life.run, life.now)
    assert [(t.event, t.step) for t in found.troubles] == [
        ("spike", 18),
        ("skipped", 19),
        ("skipped", 20),
        ("went_back", 10),
    ]
    assert found.troubles[1].samples == tuple(range(64))
    assert found.periods[0].start.begin_step == 0 and found.periods[0].why == "finished (exit code 0)"
    text = show(found)
    assert "trouble     1 spikes, 2 steps skipped, 1 times gone back" in text
    assert "spike step 18: loss 9, usually 6 +- 0.1; samples 40 7 12" in text
    assert "skipped step 19: loss or gradient is not finite; samples 0 1 2 3 4 5 6 7, ..." in text
    assert "went back to step 10: steps 17 to 19 were bad; 80 images are left out" in text
    assert json.loads(json.dumps(status.to_json(found)))["troubles"][0]["samples"] == [40, 7, 12]


def test_a_run_without_trouble_has_no_line_of_it(life: Life) -> None:
    life.start(1, 0)
    life.steps(3)
    assert "\ntrouble" not in show(status_of(life.run, life.now))
