"""What a training chain writes down, and what it does, with a Slurm that answers from a table."""

import json
from pathlib import Path

import pytest

from mvar.cluster.chain import (
    BEGIN,
    Logs,
    Slurm,
    begin,
    close_lost,
    end,
    exclude_repeaters,
    heed_others,
    newest_saved,
    own_words,
    parse_begin,
)
from mvar.cluster.decisions import Blame, Limits
from mvar.errors import ConfigError
from mvar.run import strikes
from mvar.run.history import History
from tests.unit.cluster.test_decisions import JOB, KILLED, LIMITS, attempt, job

# ---- the record


class Calls(Slurm):
    """Writes down what Slurm is asked, and answers from a table."""

    def __init__(self, **answers):
        self.asked, self.answers = [], answers

    def call(self, *words):
        self.asked.append(" ".join(words))
        return self.answers.get("_".join(words[:2]), "")

    def avoid_later(self, job, avoided):
        pass


def checkpoint(run, step):
    (run / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)


def srun_log(run, text, restarts=0):
    folder = run / "logs" / JOB.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"srun-{restarts}.log").write_text(text)


def test_newest_checkpoint_by_name(tmp_path):
    assert newest_saved(tmp_path) == 0
    for name in ("step-000000040", "step-000000100", "step-000000300.damaged", ".step-000000400.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_saved(tmp_path) == 100


def test_an_end_belongs_to_its_own_start_and_torn_lines_are_passed_over(tmp_path):
    logs = Logs(tmp_path)
    logs.begin(JOB, 0)
    logs.begin(job(name="9", chain="9"), 5)
    logs.end("7_2", 0, 30, 1, "requeue", Blame(("n1",), ("line",)), "why")
    with logs.record.open("a") as file:
        file.write('{"event": "begin", "jo')
    first, second = Logs(tmp_path).attempts()
    assert (first.job, first.saved, first.code, first.blamed) == ("7_2", 30, 1, ("n1",))
    assert (second.job, second.ended) == ("9", False)


def test_a_start_that_was_killed_is_closed_by_the_next_with_the_nodes_that_slurm_lost(tmp_path):
    logs = Logs(tmp_path)
    logs.begin(JOB, 0)
    checkpoint(tmp_path, 15)
    shown = "NodeName=n1 State=IDLE SlurmdStartTime=2001-01-01T00:00:00\nNodeName=n2 State=DOWN* SlurmdStartTime=None\n"
    (closed,) = close_lost(logs, Calls(**{"scontrol_-o": shown}), tmp_path, LIMITS)
    assert (closed.action, closed.code, closed.saved, closed.blamed) == ("lost", None, 15, ("n2",))
    assert not closed.fruitless


def test_a_node_that_came_up_after_the_start_is_to_blame(tmp_path):
    logs = Logs(tmp_path)
    logs.begin(JOB, 0)
    shown = "NodeName=n1 State=IDLE SlurmdStartTime=2001-01-01T00:00:00\n"
    shown += "NodeName=n2 State=IDLE SlurmdStartTime=2901-01-01T00:00:00\n"
    (closed,) = close_lost(logs, Calls(**{"scontrol_-o": shown}), tmp_path, LIMITS)
    assert closed.blamed == ("n2",)


def test_a_node_is_excluded_when_it_failed_too_often_with_the_evidence(tmp_path, voice, capsys):
    logs = Logs(tmp_path)
    logs.folder.mkdir()
    found = Blame(("n2",), ("srun: error: n2: task 1: Killed",))
    once = attempt(saved=10, code=137, blamed=("n2",))
    exclude_repeaters(logs, tmp_path, [once], LIMITS, found)
    assert logs.avoided() == []
    exclude_repeaters(logs, tmp_path, [once, once], LIMITS, found)
    exclude_repeaters(logs, tmp_path, [once, once, once], LIMITS, found)
    assert logs.avoided() == ["n2"]
    text = logs.excluded.read_text()
    assert "failed 2 times" in text and "task 1: Killed" in text
    assert "n2 is excluded" in capsys.readouterr().out


# ---- both together


def started(run, restarts=0):
    Logs(run).begin(job(restarts=restarts), newest_saved(run))


def test_a_fault_is_requeued_without_the_nodes_to_avoid(tmp_path):
    slurm = Calls()
    for restarts in range(2):
        started(tmp_path, restarts)
        srun_log(tmp_path, KILLED, restarts)
        assert end(job(restarts=restarts), slurm, LIMITS, tmp_path, 137) == 137
    assert [line for line in slurm.asked if "show" not in line] == [
        "scontrol requeue 7_2",
        "scontrol requeue 7_2",
        "scontrol update JobId=7_2 ExcNodeList=n2",
    ]


def test_a_requeue_that_slurm_refuses_leaves_the_run_to_the_next_task(tmp_path, voice, capsys):
    started(tmp_path)
    assert end(JOB, Calls(scontrol_requeue=None), LIMITS, tmp_path, 1) == 1
    assert "left to the next task" in capsys.readouterr().out


def test_the_reason_of_a_stop_is_that_of_the_runs_history(tmp_path):
    started(tmp_path)
    history, slurm = History(tmp_path), Calls()
    environ = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "8"}
    history.start(2, environ)
    history.end(75, 20, f"{tmp_path}/STOP exists")
    srun_log(tmp_path, KILLED)  # Rank 0 ended with 75, and srun killed the other on its way out.
    assert end(JOB, slurm, LIMITS, tmp_path, 143) == 0
    assert slurm.asked[-1] == "scancel --state=PENDING 7"
    (last,) = Logs(tmp_path).attempts()
    assert (last.action, last.code, last.blamed) == ("stop", 75, ())


def test_how_another_start_ended_says_nothing_of_this_one(tmp_path):
    environ = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "8"}
    history = History(tmp_path)
    history.start(2, environ)
    history.end(75, 20, "got SIGUSR1")
    assert own_words(tmp_path, job(restarts=1), 137) == (137, "")
    history.start(2, environ | {"SLURM_RESTART_COUNT": "1"})
    assert own_words(tmp_path, job(restarts=1), 137) == (137, "")


@pytest.mark.parametrize("action", ["finished", "stop"])
def test_a_task_left_over_ends_at_once(tmp_path, action):
    started(tmp_path)
    Logs(tmp_path).end("7_2", 0, 30, 0, action, Blame(), "")
    slurm = Calls()
    assert begin(job(name="7_3"), slurm, LIMITS, tmp_path, []) == BEGIN["leave"]
    assert slurm.asked == ["scancel --state=PENDING 7"]


def test_a_job_on_a_node_to_avoid_is_requeued_elsewhere(tmp_path):
    logs = Logs(tmp_path)
    logs.folder.mkdir()
    logs.avoid("n2", "failed")
    slurm = Calls()
    assert begin(JOB, slurm, LIMITS, tmp_path, []) == BEGIN["leave"]
    assert slurm.asked == ["scontrol requeue 7_2", "scontrol update JobId=7_2 ExcNodeList=n2"]


def test_a_job_that_is_killed_again_and_again_ends(tmp_path):
    for restarts in range(2):
        started(tmp_path, restarts)
        Logs(tmp_path).end("7_2", restarts, 0, None, "lost", Blame(), "")
    started(tmp_path, 2)
    slurm = Calls()
    assert begin(job(restarts=3), slurm, LIMITS, tmp_path, []) == BEGIN["leave"]
    assert slurm.asked[-1] == "scancel --state=PENDING 7"
    assert [json.loads(line)["action"] for line in Logs(tmp_path).record.read_text().splitlines() if '"end"' in line][
        -1
    ] == "stop"


def test_arguments_of_a_training_job():
    run, words = parse_begin(["--config", "a.yaml", "run=runs/a", "--change-batch", "x.y=1", "--resnapshot"])
    assert run == Path("runs/a")
    assert words == ["--config", "a.yaml", "--resnapshot", "x.y=1"]
    with pytest.raises(ConfigError, match="needs run=FOLDER"):
        parse_begin(["--config", "a.yaml"])
    with pytest.raises(ConfigError, match="--dry-run is not one"):
        parse_begin(["--dry-run", "run=a"])
    with pytest.raises(ConfigError, match="a chain would do it at each start"):
        parse_begin(["--config", "a.yaml", "run=a", "--from-scratch"])


# ---- what the ranks themselves found


def found_by_ranks(run, node, out=False, restarts=0):
    environ = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": str(restarts)}
    case = {"step": 4, "rank": 1, "device": "cuda:1", "what": "self-check" if out else "stays behind"}
    strikes.note(run, node=node, evidence="2 rows are wrong", out=out, environ=environ, **case)


def test_a_node_that_proved_to_be_bad_is_left_out_at_once_with_the_proof(tmp_path):
    slurm = Calls()
    started(tmp_path)
    found_by_ranks(tmp_path, "n2", out=True)
    assert end(JOB, slurm, LIMITS, tmp_path, 1) == 1
    assert slurm.asked[-2:] == ["scontrol requeue 7_2", "scontrol update JobId=7_2 ExcNodeList=n2"]
    assert Logs(tmp_path).excluded.read_text().startswith("n2  n2: rank 1 (cuda:1)")
    assert "2 rows are wrong" in Logs(tmp_path).excluded.read_text()


def test_what_counts_against_a_node_counts_once_for_each_start_also_where_nothing_failed(tmp_path):
    for restarts in range(2):
        assert Logs(tmp_path).avoided() == []
        started(tmp_path, restarts)
        for _ in range(3):
            found_by_ranks(tmp_path, "n2", restarts=restarts)
        assert end(job(restarts=restarts), Calls(), LIMITS, tmp_path, 75) == 0
    assert Logs(tmp_path).avoided() == ["n2"]
    assert [attempt.blamed for attempt in Logs(tmp_path).attempts()] == [("n2",), ("n2",)]
    assert "stays behind" in Logs(tmp_path).excluded.read_text()


def test_proof_against_all_nodes_at_once_and_of_other_starts_leaves_out_none(tmp_path):
    started(tmp_path)
    for node in ("n1", "n2"):
        found_by_ranks(tmp_path, node, out=True)
    found_by_ranks(tmp_path, "n9", out=True)
    end(JOB, Calls(), LIMITS, tmp_path, 1)
    started(tmp_path, 1)
    end(job(restarts=1), Calls(), Limits(strikes=9), tmp_path, 1)
    assert Logs(tmp_path).avoided() == []


def test_what_another_job_found_since_the_last_start_is_heeded_at_the_next_and_not_again(tmp_path):
    started(tmp_path)
    Logs(tmp_path).end("7_2", 0, 30, 75, "next", Blame(("n2",)), "")
    case = {"step": 4, "rank": 1, "node": "n2", "device": "cuda:1", "what": "computes differently twice"}
    strikes.note(tmp_path, evidence="the loss", environ={"SLURM_JOB_ID": "99"}, **case)
    slurm = Calls()
    assert begin(job(restarts=1), slurm, LIMITS, tmp_path, []) == BEGIN["leave"]  # It got n2, and leaves it.
    assert slurm.asked == ["scontrol requeue 7_2", "scontrol update JobId=7_2 ExcNodeList=n2"]
    assert "the loss" in Logs(tmp_path).excluded.read_text()
    started(tmp_path, 1)
    Logs(tmp_path).end("7_2", 1, 30, 75, "next", Blame(), "")
    Logs(tmp_path).excluded.unlink()
    heed_others(Logs(tmp_path), tmp_path, Logs(tmp_path).attempts(), LIMITS)
    assert Logs(tmp_path).avoided() == []


def test_proof_that_a_killed_start_left_is_heeded_by_the_next(tmp_path):
    Logs(tmp_path).begin(JOB, 0)
    found_by_ranks(tmp_path, "n2", out=True)
    (closed,) = close_lost(Logs(tmp_path), Calls(), tmp_path, LIMITS)
    assert closed.blamed == ("n2",) and Logs(tmp_path).avoided() == ["n2"]
