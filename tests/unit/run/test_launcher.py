"""Who we are, read from each launcher's variables, and clear errors where they make no sense."""

import pytest

from mvar.errors import ConfigError
from mvar.log import rank_hint
from mvar.run.launcher import Place, detect, first_host, require_address, require_one_task_per_gpu

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "x",
}
SRUN = {
    "SLURM_JOB_ID": "40123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_NTASKS": "99",
}


def test_torchrun() -> None:
    assert detect(TORCHRUN) == Place("torchrun", 5, 8, 1, 4, "host", 29400)
    assert rank_hint(TORCHRUN) == 5


def test_deepspeed_launcher_names_the_local_size_differently() -> None:
    environ = {**TORCHRUN, "LOCAL_SIZE": "4"}
    del environ["LOCAL_WORLD_SIZE"], environ["TORCHELASTIC_RUN_ID"]
    assert detect(environ) == Place("environment", 5, 8, 1, 4, "host", 29400)


def test_srun_meets_at_the_first_host_on_a_port_of_its_job() -> None:
    assert detect(SRUN) == Place("srun", 3, 5, 1, 2, "gpu007", 20000 + 123)
    assert detect({**SRUN, "MASTER_ADDR": "me", "MASTER_PORT": "1234"}).port == 1234
    assert detect({**SRUN, "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_PROCID": "4"}).local_size == 1
    assert rank_hint(SRUN) == 3


@pytest.mark.parametrize("step", ["", "4294967290", "4294967291"])
def test_a_batch_or_interactive_shell_of_slurm_is_no_launch(step: str) -> None:
    assert detect({**SRUN, "SLURM_STEP_ID": step}) == Place("alone")


ONE_TORCHRUN_A_NODE = {
    **TORCHRUN,
    "GROUP_WORLD_SIZE": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


def test_torchrun_started_by_srun_once_a_node_wins() -> None:
    assert detect(ONE_TORCHRUN_A_NODE) == Place("torchrun", 5, 8, 1, 4, "host", 29400)


@pytest.mark.parametrize(
    "changes",
    [
        {"GROUP_WORLD_SIZE": "1"},  # Each task of srun started a torchrun with a whole world of its own.
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"},  # srun in a worker.
        {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"},  # Two launchers on one node.
    ],
)
def test_torchrun_and_srun_that_make_several_worlds(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"torchrun and srun are mixed.*--ntasks-per-node=1 torchrun"):
        detect({**ONE_TORCHRUN_A_NODE, **changes})


def test_variables_set_by_hand_must_be_what_srun_says() -> None:
    by_hand = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu007", "MASTER_PORT": "1"}
    assert detect({**SRUN, **by_hand}).rank == 3
    for wrong in ({"RANK": "0"}, {"WORLD_SIZE": "4"}):  # The same for every task: nobody would ever meet.
        with pytest.raises(ConfigError, match=r"srun says 3 of 5.*srun alone is enough"):
            detect({**SRUN, **by_hand, **wrong})


@pytest.mark.parametrize(
    ("tasks", "gpus", "words"),
    [
        ("4", {"SLURM_GPUS_ON_NODE": "4"}, None),
        ("4", {}, None),  # No GPUs: one task per CPU process, as many as one likes.
        ("2", {"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_GPUS": "1,3"}, None),  # This step got two of the job's four.
        ("2", {"SLURM_GPUS_ON_NODE": "4"}, "2 tasks .* 4 GPUs .*idle.* --ntasks-per-node=4"),
        ("8", {"SLURM_GPUS_ON_NODE": "4"}, "8 tasks .* 4 GPUs .*more tasks than GPUs.* --ntasks-per-node=4"),
        ("1", {"SLURM_STEP_GPUS": "0,1"}, "1 tasks .* 2 GPUs"),
    ],
)
def test_one_task_per_gpu(tasks: str, gpus: dict[str, str], words: str | None) -> None:
    step = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": tasks}
    environ = {**SRUN, **step, "SLURM_STEP_TASKS_PER_NODE": tasks, **gpus}
    place = detect(environ)
    if words is None:
        require_one_task_per_gpu(place, environ)
    else:
        with pytest.raises(ConfigError, match=words):
            require_one_task_per_gpu(place, environ)


def test_torchrun_may_use_some_of_the_gpus() -> None:
    require_one_task_per_gpu(detect(TORCHRUN), {"SLURM_GPUS_ON_NODE": "8"})


def test_an_address_that_leads_nowhere_is_an_error_at_once() -> None:
    require_address(Place("srun", 0, 2, 0, 1, "127.0.0.1", 29400))
    with pytest.raises(ConfigError, match=r"host 'no-such\.invalid'.*Set MASTER_ADDR"):
        require_address(Place("srun", 0, 2, 0, 1, "no-such.invalid", 29400), tries=1)


def test_alone() -> None:
    assert detect({}) == Place("alone", 0, 1, 0, 1, None, None)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, ["RANK", "WORLD_SIZE", "torchrun"]),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["WORLD_SIZE and LOCAL_RANK"]),
        ({**TORCHRUN, "RANK": "8"}, ["rank 8 of 8"]),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, ["LOCAL_RANK", "'x'"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["MASTER_ADDR"]),
        ({**TORCHRUN, "RANK": "0"}, ["RANK 0 of 8 with LOCAL_RANK 1 of 4", "follow each other"]),
        ({**TORCHRUN, "RANK": "6"}, ["RANK 6 of 8 with LOCAL_RANK 1 of 4", "follow each other"]),
        ({**SRUN, "SLURM_PROCID": "1"}, ["task 1 is number 1 of node 1", "--distribution=block"]),
    ],
)
def test_misuse_says_what_is_wrong(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        detect(environ)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[003-007,9]-ib,login1", "gpu003-ib"),
        ("rack2-n[10,12]", "rack2-n10"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
