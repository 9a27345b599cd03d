"""How processes come together and how long they wait for each other."""

from __future__ import annotations

import importlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mvar.run import world as worlds
from mvar.run.launcher import Place
from mvar.run.world import World, be_patient, on_device, write_flight_record
from mvar.testing.ranks import run_ranks

CPU = torch.device("cpu")


def patience_of_all_groups(world: World) -> list[list[float]]:
    """Seconds that collectives of the world's group and of one made later wait."""
    group = dist.new_group([0, 1])
    assert group is not None
    found = []
    for limits in ([], [5.0, 70.0], [0.0, 70.0]):
        if limits:
            be_patient(limits)
        groups: list[Any] = [dist.group.WORLD, group]
        found.append([one._get_backend(CPU).options._timeout.total_seconds() for one in groups])
    world.gather(None)  # Rank 0 keeps the store that the other still needs for its new group.
    return found


def cores_when_bound(world: World) -> list[int]:
    """Each rank's own cores: bound to eight that no other has, as by srun, and on the same sixteen, as by torchrun."""
    found = []
    for mask in ({*range(8 * world.rank, 8 * world.rank + 8)}, {*range(16)}):
        worlds.affinity = lambda mask=mask: mask  # type: ignore[assignment]
        found.append(worlds._meet(world.place, world.device).own_cores)
    return found


def test_a_rank_that_is_bound_to_cores_has_them_for_itself(tmp_path: Path) -> None:
    assert run_ranks(cores_when_bound, 2, tmp_path) == [[8, 8], [8, 8]]


def test_collectives_wait_longer_than_any_watchdog(tmp_path: Path) -> None:
    for found in run_ranks(patience_of_all_groups, 2, tmp_path):
        assert found[0] == [1800.0, 1800.0]  # gloo's own; NCCL's is 600 s.
        assert found[1] == [130.0, 130.0]
        assert found[2] == [30 * 86400.0, 30 * 86400.0]


@pytest.mark.parametrize("place", [Place("alone"), Place("torchrun", 0, 1, 0, 1, "host", 1234)])
@pytest.mark.parametrize(("limit_s", "expected_s"), [(7200.0, 7200), (15.0, 1800), (0.0, 1800)])
def test_a_group_on_gpus_is_bound_to_its_device_and_waits_for_latecomers_as_long_as_the_start_may_take(
    monkeypatch: pytest.MonkeyPatch, place: Place, limit_s: float, expected_s: int
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda **named: given.update(named))
    gpu = torch.device("cuda", 2)
    worlds._join(place, gpu, {}, limit_s)
    assert given["backend"] == "nccl" and given["device_id"] == gpu
    assert given["timeout"] == timedelta(seconds=expected_s)
    worlds._join(place, CPU, {}, limit_s)
    assert given["backend"] == "gloo" and given["device_id"] is None


def test_numbers_that_are_equal_everywhere_come_behind_the_sums() -> None:
    world = World(Place("alone"), CPU)
    later = world.sum_later(torch.tensor([1, 2]), also=torch.tensor([0.1]))
    assert later.get().tolist() == [1.0, 2.0, float(torch.tensor(0.1))] and later.values.dtype == torch.float64
    assert on_device(torch.tensor([3]), CPU).tolist() == [3]


def test_nccls_last_collectives_are_written_where_it_would_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    c10d = importlib.import_module("torch._C._distributed_c10d")
    monkeypatch.delattr(c10d, "_dump_nccl_trace", raising=False)
    write_flight_record(tmp_path, 3, {})
    assert list(tmp_path.iterdir()) == []  # A torch without NCCL.
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: b"trace", raising=False)
    write_flight_record(tmp_path / "logs", 3, {})
    write_flight_record(tmp_path / "logs", 3, {"TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "job" / "trace_")})
    for path in (tmp_path / "logs" / "nccl_trace_rank_3", tmp_path / "job" / "trace_3"):
        assert path.read_bytes() == b"trace" and str(path) in caplog.text
    (tmp_path / "file").touch()
    write_flight_record(tmp_path / "file", 3, {})
    assert "cannot be written" in caplog.text
