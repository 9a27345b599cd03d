"""What a training chain does after each start, and which nodes are to blame, decided without Slurm."""

import pytest

from mvar.cluster.decisions import Attempt, Limits, SlurmJob, blame, decide, expand, strikes
from mvar.errors import ConfigError

JOB = SlurmJob("7_2", "7", restarts=0, nodes=("n1", "n2"), is_array=True, is_last=False)
LIMITS = Limits(restarts=4, fruitless=3, strikes=2)


def attempt(saved=None, code=None, step=10, blamed=(), **others):
    made = {"job": "7_2", "chain": "7", "restarts": 0, "nodes": ("n1", "n2"), "time": 0.0} | others
    return Attempt(step=step, saved=saved, code=code, blamed=blamed, **made)


def after(code, *, job=JOB, attempts=(), preempted=False, reason=""):
    attempts = [*attempts, attempt(saved=20, code=code)] if not attempts else list(attempts)
    return decide(code, job, attempts, LIMITS, preempted=preempted, reason=reason)


def job(**changes):
    return SlurmJob(**(vars(JOB) | changes))


# ---- after a start


def test_a_finished_run_ends_its_chain():
    decision = after(0)
    assert (decision.action, decision.code) == ("finished", 0)


def test_wrong_use_ends_the_chain_with_its_code():
    decision = after(2)
    assert (decision.action, decision.code) == ("stop", 2)
    assert "Mend it" in decision.message


def test_the_next_task_goes_on_after_a_time_limit():
    decision = after(75, reason="the job's time is nearly over")
    assert (decision.action, decision.code) == ("next", 0)
    assert "nearly over" in decision.message and "next task" in decision.message


@pytest.mark.parametrize("last", [job(is_last=True), job(is_array=False)])
def test_a_chain_that_was_too_short_says_so(last):
    assert "Submit again" in after(75, job=last, reason="got SIGUSR1").message


def test_the_stop_file_stops_the_chain_even_while_preempted():
    decision = after(75, preempted=True, reason="runs/a/STOP exists")
    assert (decision.action, decision.code) == ("stop", 0)


def test_a_preempted_job_is_requeued_within_its_cap():
    assert after(75, preempted=True, reason="got SIGUSR1").action == "requeue"
    assert after(75, job=job(restarts=4), preempted=True, reason="got SIGUSR1").action == "next"


@pytest.mark.parametrize("code", [1, 134, 137, None])
def test_a_fault_is_requeued_within_the_cap_then_left_to_the_next_task(code):
    decision = after(code)
    assert (decision.action, decision.code) == ("requeue", code or 1)
    assert after(code, job=job(restarts=4)).action == "next"


def test_starts_without_a_new_checkpoint_stop_the_chain():
    fruitless = attempt(saved=10, code=1)
    assert after(1, attempts=[fruitless] * 2).action == "requeue"
    decision = after(1, attempts=[fruitless] * 3)
    assert (decision.action, decision.code) == ("stop", 1)
    assert "3 starts in a row" in decision.message


@pytest.mark.parametrize("between", [attempt(saved=20, code=1), attempt(saved=10, code=75), attempt(saved=20)])
def test_progress_and_stops_on_purpose_begin_the_count_anew(between):
    fruitless = attempt(saved=10, code=None)
    assert after(1, attempts=[fruitless, fruitless, between, fruitless, fruitless]).action == "requeue"


# ---- who is to blame

KILLED = """\
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=8.0
srun: error: n1: task 0: Terminated
"""
OWN_CODE = KILLED.replace("n2: task 1: Killed", "n2: task 1: Exited with exit code 1")
ALIKE = """\
srun: error: n2: tasks 2-3: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=8.0
srun: error: n1: tasks 0-1: Exited with exit code 1
"""
LOST = """\
slurmstepd-n1: error: *** STEP 8.0 ON n1 CANCELLED AT 2030-01-01T00:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***
srun: error: Node failure on n2
srun: error: n1: task 0: Killed
"""


@pytest.mark.parametrize(
    ("log", "code", "nodes"),
    [
        (KILLED, 137, ("n2",)),
        (OWN_CODE, 1, ("n2",)),
        (ALIKE, 1, ()),  # The program's fault: all of them failed in the same way.
        (LOST, None, ("n2",)),
        (OWN_CODE, 2, ()),
        (KILLED, 75, ()),
        ("", 1, ()),
        ("srun: error: n[1-2]: tasks 0-1: Killed\n", 137, ()),
    ],
)
def test_the_node_that_failed_first_or_was_lost_is_to_blame(log, code, nodes):
    found = blame(log, ("n1", "n2"), code)
    assert found.nodes == nodes
    assert all(any(node in line for line in found.evidence) for node in nodes)


def test_the_only_node_of_a_job_is_to_blame_for_its_faults():
    assert blame("srun: error: n1: tasks 0-7: Exited with exit code 1\n", ("n1",), 1).nodes == ("n1",)


def test_nodes_are_struck_once_for_each_start():
    assert strikes([attempt(blamed=("n1",)), attempt(blamed=("n1", "n2")), attempt()]) == {"n1": 2, "n2": 1}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("n1", ("n1",)),
        ("n[1-3]", ("n1", "n2", "n3")),
        ("gpu[008-010,12]-ib,login", ("gpu008-ib", "gpu009-ib", "gpu010-ib", "gpu12-ib", "login")),
        ("", ()),
    ],
)
def test_host_lists(names, expected):
    assert expand(names) == expected


def test_limits_and_job_come_from_the_environment():
    environ = {"MVAR_MAX_RESTARTS": "9", "MVAR_NODE_STRIKES": "1"}
    assert Limits.of(environ) == Limits(restarts=9, strikes=1)
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "2"}
    assert SlurmJob.of(array, ["n1"]) == SlurmJob("10_2", "10", 0, ("n1",), is_array=True, is_last=True)
    assert SlurmJob.of({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}, []).restarts == 3
    with pytest.raises(ConfigError, match="no SLURM_JOB_ID"):
        SlurmJob.of({}, [])
