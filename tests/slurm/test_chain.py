"""Training chains on a real cluster, disturbed in every way a cluster has: the curve is that of an undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mvar.testing.code_stores import make_store
from mvar.testing.ranks import Ranks
from mvar.testing.tiny_runs import losses, records, write_config
from tests.slurm.harness import HERE, ROOT, Cluster, explained, steps_done, train_log, until

pytestmark = pytest.mark.slurm

STEPS, ALL_STEPS = 90, 330
SETTINGS: dict[str, Any] = {
    "stage": 1,
    "epochs": 52.8,  # ALL_STEPS of 8 of 50 images; max_steps cuts runs short, and their curves agree up to there.
    "checkpoint__every_steps": 20,
    "checkpoint__takeover_s": 9,
    "tracking__validate_every": 0,
    "tracking__log_every": 30,
}
TRAIN = ROOT / "slurm" / "train.sbatch"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "codes")


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory, store: Path) -> list[float]:
    """Losses of an undisturbed run of two ranks, without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder, store, **SETTINGS)
    job = Ranks("mvar.testing.ranks:command", ["mvar.train", ["--config", str(config)]], 2, folder / "logs")
    assert job.wait() == [0, 0], job.output()
    found = losses(folder / "run")
    assert len(found) == ALL_STEPS
    return found


class Chain:
    """A chain that trains a run in `folder`, by default on two nodes with one task each."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        store: Path,
        *options: str,
        run: str = "run",
        nodes: int = 2,
        per_node: int = 1,
        jobs: int = 3,
        environ: dict[str, str] | None = None,
        max_steps: int = STEPS,
        **settings: Any,
    ) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / run
        self.config = write_config(folder, store, run, **(SETTINGS | {"max_steps": max_steps} | settings))
        self.environ = {"MVAR_LAUNCH": str(HERE / "paced.sh")} | (environ or {})
        self.id = self.submit(*options, nodes=nodes, per_node=per_node, jobs=jobs)

    def submit(self, *options: str, nodes: int = 2, per_node: int = 1, jobs: int = 3, words: Sequence[str] = ()) -> str:
        shape = [f"--nodes={nodes}", f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}"]
        array = ["--cpus-per-task=1", "--time=10", f"--array=1-{jobs}%1", *options]
        arguments = ["--config", self.config, f"run={self.run.name}", *words]
        return self.cluster.sbatch(*shape, *array, TRAIN, *arguments, cwd=self.folder, **self.environ)

    def reach(self, step: int) -> None:
        """Wait until the run has recorded a step."""
        with explained(self.run):
            until(lambda: steps_done(self.run) >= step, explain=self.cluster.tail)

    def finish(self) -> dict[str, str]:
        """Wait for the end of the chain's jobs; the run must be finished. Returns their states."""
        with explained(self.run):
            states = self.cluster.wait(self.id)
            assert (self.run / "FINISHED").exists()
        return states

    def losses(self) -> list[float]:
        return losses(self.run)

    def starts(self) -> list[int]:
        """The steps at which training began or went on."""
        events = [json.loads(line) for line in (self.run / "history.jsonl").read_text().splitlines()]
        return [event["step"] for event in events if event["event"] == "going_on"]

    def actions(self) -> list[str]:
        lines = (self.run / "logs" / "chain.jsonl").read_text().splitlines()
        return [entry["action"] for entry in map(json.loads, lines) if entry["event"] == "end"]


def test_a_chain_of_six_jobs_with_a_time_limit_of_a_minute(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]
) -> None:
    chain = Chain(
        cluster,
        tmp_path,
        store,
        "--time=1",
        "--signal=CONT@1",  # No signal that asks to stop: the training has to know its own time.
        jobs=6,
        max_steps=ALL_STEPS,
        checkpoint__every_steps=100_000,  # Nothing is saved but by stopping in time.
        checkpoint__stop_before_end_s=20,
        environ={"TEST_PAUSE_S": "0.1"},
    )
    states = chain.finish()
    assert chain.losses() == curve
    *before, last = chain.actions()
    assert before == ["next"] * len(before) and last == "finished" and len(before) >= 1
    assert [r["step"] for r in records(chain.run, "checkpoint")][:-1] == chain.starts()[1:]  # No step was lost.
    trained = len(before) + 1
    for number in range(1, trained + 1):
        assert states[f"{chain.id}_{number}"] == "COMPLETED"
    rest = {state for name, state in states.items() if name not in {f"{chain.id}_{n}" for n in range(1, trained + 1)}}
    assert rest <= {"CANCELLED"}
    latest = chain.run / "logs" / "latest"
    assert latest.resolve().name == f"{chain.id}_{trained}"
    assert {path.name for path in latest.iterdir()} >= {"rank-000.log", "rank-001.log"}
    log = train_log(chain.run)
    assert log.count("the job's time is nearly over") >= len(before) and f"finished after {ALL_STEPS} steps" in log


def test_a_preempted_job_saves_and_is_requeued(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]
) -> None:
    chain = Chain(
        cluster, tmp_path, store, "--partition=low", "--exclusive", nodes=4, checkpoint__every_steps=100_000, jobs=2
    )
    chain.reach(30)
    cluster.run("srun", "--partition=main", "--nodes=4", "--exclusive", "sleep", "1")
    chain.finish()
    assert chain.losses() == pytest.approx(curve[:STEPS], abs=1e-5)
    assert chain.starts()[0] == 0 and chain.starts()[1] >= 30  # Saved inside the grace time: nothing was done twice.
    assert chain.actions() == ["requeue", "finished"]


def test_a_job_that_an_administrator_requeues_goes_on(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]
) -> None:
    chain = Chain(cluster, tmp_path, store, jobs=1, environ={"MVAR_DOCTOR": "on"})
    chain.reach(30)
    cluster.run("scontrol", "requeue", f"{chain.id}_1")
    states = chain.finish()
    assert chain.losses() == curve[:STEPS]
    assert len(chain.starts()) == 2 and chain.starts()[1] >= 20
    assert states == {f"{chain.id}_1": "COMPLETED"} and cluster.field(chain.id, "Restarts") == "1"
    assert train_log(chain.run).count("what is chosen") == 1, "the job says once what its node has"


@pytest.mark.parametrize("victim", ["batch node", "other node"])
def test_a_node_that_loses_power(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float], victim: str
) -> None:
    chain = Chain(cluster, tmp_path, store, jobs=2)
    chain.reach(30)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.field(f"{chain.id}_1", "NodeList")).split()
    dead = nodes[0] if victim == "batch node" else nodes[1]
    cluster.power_cut(dead)
    chain.finish()
    assert chain.losses() == curve[:STEPS]
    assert chain.starts()[0] == 0 and chain.starts()[-1] >= 20
    record = (chain.run / "logs" / "chain.jsonl").read_text().splitlines()
    assert json.loads(record[1])["blamed"] == [dead], record


def test_a_node_that_loses_power_and_is_back_before_anybody_looks(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]
) -> None:
    chain = Chain(cluster, tmp_path, store, jobs=2, engine__watchdog_s=30)
    chain.reach(30)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.field(f"{chain.id}_1", "NodeList")).split()
    cluster.power_cut(nodes[1])
    cluster.start()
    chain.finish()
    assert chain.losses() == curve[:STEPS]
    assert len(chain.starts()) == 2 and chain.starts()[1] >= 20


def test_a_restarted_controller_disturbs_nothing(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]
) -> None:
    chain = Chain(cluster, tmp_path, store, jobs=2)
    chain.reach(20)
    cluster.kill_controller()
    chain.reach(50)
    cluster.start()
    states = chain.finish()
    assert chain.losses() == curve[:STEPS]
    assert chain.starts() == [0] and states[f"{chain.id}_1"] == "COMPLETED"


def test_two_chains_on_the_same_nodes(cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]) -> None:
    chains = [Chain(cluster, tmp_path, store, "--nodelist=n1,n2", run=f"run{n}", max_steps=40) for n in (1, 2)]
    for chain in chains:
        chain.reach(10)
    assert all(cluster.states(chain.id)[f"{chain.id}_1"] == "RUNNING" for chain in chains)
    for chain in chains:
        chain.finish()
        assert chain.losses() == curve[:40]
        assert chain.starts() == [0]


def test_a_task_that_hangs_is_ended_by_the_watchdog(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]
) -> None:
    chain = Chain(
        cluster, tmp_path, store, jobs=1, engine__watchdog_s=25, environ={"TEST_HANG": f"1:30:{tmp_path}/hung"}
    )
    chain.finish()
    assert (tmp_path / "hung").exists()
    assert chain.losses() == curve[:STEPS]
    assert chain.starts() == [0, 20] and chain.actions() == ["requeue", "finished"]
    stacks = (chain.run / "logs" / f"{chain.id}_1" / "rank-001.log").read_text()
    assert "Timeout" in stacks and "tests/slurm/paced.py" in stacks  # It says where the rank hung.


def test_a_node_that_fails_three_times_is_left_out(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]
) -> None:
    environ = {"TEST_BAD_NODE": "n1", "TEST_DEATHS": str(tmp_path / "deaths")}
    chain = Chain(cluster, tmp_path, store, jobs=1, max_steps=40, environ=environ)
    chain.finish()
    assert len((tmp_path / "deaths").read_text().split()) == 3
    assert chain.losses() == curve[:40]
    assert chain.actions() == ["requeue"] * 3 + ["finished"]
    excluded = (chain.run / "logs" / "excluded-nodes").read_text()
    assert excluded.startswith("n1  failed 3 times") and "srun: error: n1: task 0: Killed" in excluded
    assert cluster.field(chain.id, "ExcNodeList") == "n1"


def test_a_node_that_multiplies_wrong_is_left_out_before_it_trains(
    cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]
) -> None:
    environ = {"MVAR_NODE_CHECK": "on", "TEST_WRONG_NODE": "n1"}
    chain = Chain(cluster, tmp_path, store, jobs=1, max_steps=20, environ=environ)
    chain.finish()
    assert chain.losses() == curve[:20]
    assert chain.starts() == [0] and chain.actions() == ["requeue", "finished"]
    excluded = (chain.run / "logs" / "excluded-nodes").read_text()
    assert excluded.startswith("n1  n1: rank 0 (cpu): self-check: a product of matrices in "), excluded
    assert cluster.field(chain.id, "ExcNodeList") == "n1"


def test_a_chain_without_progress_ends_instead_of_burning_the_allocation(
    cluster: Cluster, tmp_path: Path, store: Path
) -> None:
    broken = tmp_path / "broken.sh"
    broken.write_text("#!/bin/bash\necho started >>starts\nexit 7\n")
    broken.chmod(0o755)
    chain = Chain(cluster, tmp_path, store, jobs=4, environ={"MVAR_LAUNCH": str(broken), "MVAR_MAX_FRUITLESS": "3"})
    states = cluster.wait(chain.id)
    assert sorted(states.values()) == ["CANCELLED", "CANCELLED", "CANCELLED", "FAILED"] or len(states) < 4
    assert chain.actions() == ["requeue", "requeue", "stop"]
    assert "3 starts in a row brought no new checkpoint" in train_log(chain.run)
    assert not (chain.run / "FINISHED").exists()


def test_stop_file_then_one_node_then_four(cluster: Cluster, tmp_path: Path, store: Path, curve: list[float]) -> None:
    chain = Chain(cluster, tmp_path, store, nodes=2)
    chain.reach(25)
    (chain.run / "STOP").touch()
    states = cluster.wait(chain.id)
    assert chain.actions() == ["stop"] and states[f"{chain.id}_1"] == "COMPLETED"
    assert not (chain.run / "STOP").exists()

    chain.id = chain.submit(nodes=1, jobs=1)
    chain.reach(45)
    cluster.run("scancel", "--signal=USR1", f"{chain.id}_1.0")
    cluster.wait(chain.id)
    assert "got SIGUSR1" in train_log(chain.run) and "Submit again to go on" in train_log(chain.run)

    # A shorter time between checkpoints is a change of the configuration: only a new snapshot takes it up.
    chain.id = chain.submit(nodes=4, jobs=2, words=["checkpoint.every_steps=9", "--resnapshot"])
    chain.finish()
    kept = [(chain.run / name / "config.yaml").read_text() for name in ("snapshot-1", "snapshot")]
    assert "every_steps: 20" in kept[0] and "every_steps: 9" in kept[1]
    assert chain.losses() == pytest.approx(curve[:STEPS], abs=1e-5)
    assert [record["world"] for record in records(chain.run, "resume")] == [2, 1, 4]
    assert chain.actions() == ["stop", "next", "finished"]
