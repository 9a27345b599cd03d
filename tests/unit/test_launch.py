"""Who we are, read from each launcher's variables, and clear errors where they make no sense."""

import pytest

from mvar.errors import ConfigError
from mvar.launch import Place, detect, first_host, rank_hint

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
    assert detect({**SRUN, "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}).local_size == 1
    assert rank_hint(SRUN) == 3


@pytest.mark.parametrize("step", ["", "4294967290", "4294967291"])
def test_a_batch_or_interactive_shell_of_slurm_is_no_launch(step: str) -> None:
    assert detect({**SRUN, "SLURM_STEP_ID": step}) == Place("alone")


def test_torchrun_inside_a_slurm_step_wins() -> None:
    assert detect({**SRUN, **TORCHRUN}).launcher == "torchrun"


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
