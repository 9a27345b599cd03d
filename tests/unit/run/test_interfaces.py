"""Where gloo listens, and what is said when the other ranks cannot reach it."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mvar.errors import ConfigError
from mvar.run import world as worlds
from mvar.run.interfaces import listening_address, require_reachable
from mvar.run.launcher import Place

HOSTS = {"node1": ["127.0.0.1"], "node2": ["192.0.2.7", "127.0.0.1"], "node3": [], "first": ["192.0.2.1"]}
"""Addresses of documentation, 192.0.2.0/24, are no machine's."""


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        if not HOSTS.get(host):
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in HOSTS[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")


def place(address: str, size: int = 4, local_size: int = 2) -> Place:
    return Place("srun", size - 2, size, 0, local_size, address, 29400)


@pytest.mark.parametrize("own", ["node1", "node2", "node3"])
def test_a_host_whose_name_stands_for_itself_only_is_refused_with_the_variable_to_set(
    monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    """Also where its name has an address of another machine, or none: gloo falls back."""
    monkeypatch.setattr(socket, "gethostname", lambda: own)
    assert listening_address() == "127.0.0.1"
    with pytest.raises(ConfigError, match=rf"gloo listens on 127\.0\.0\.1.*{own}.*Set GLOO_SOCKET_IFNAME.*site\.env"):
        require_reachable(place("first"), {})


def test_what_can_be_reached_or_was_chosen_is_let_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    require_reachable(place("first"), {"GLOO_SOCKET_IFNAME": "eth0"})
    require_reachable(place("first", 2), {})  # One machine.
    require_reachable(Place("alone"), {})
    monkeypatch.setattr("mvar.run.interfaces._is_own", lambda addresses: True)
    monkeypatch.setattr(socket, "gethostname", lambda: "node2")
    require_reachable(place("first"), {})


def test_where_the_ranks_meet_here_it_is_only_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mvar"):
        require_reachable(place("node1"), {})
    assert "GLOO_SOCKET_IFNAME" in caplog.text


def test_a_start_of_several_machines_looks_before_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "init_process_group", lambda **_: pytest.fail("it would wait for half an hour"))
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME"):
        worlds._join(place("first"), torch.device("cpu"), {}, 0)


@pytest.mark.parametrize(
    ("said", "environ", "words"),
    [
        ("Gloo connectFullMesh failed with Connection refused, remote=[127.0.1.1]:9\nstack", {}, "not set, so.*127.0"),
        ("[enforce fail at gloo/device.cc:84] Unable to find address for: x7", {"GLOO_SOCKET_IFNAME": "x7"}, "is 'x7'"),
    ],
)
def test_ranks_that_do_not_reach_each_other_are_told_the_variable(
    monkeypatch: pytest.MonkeyPatch, said: str, environ: dict[str, str], words: str
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(ConfigError, match=f"rank 2 of 4 on node1.*{words}.*Set GLOO_SOCKET_IFNAME") as raised:
        worlds._join(place("first", local_size=4), torch.device("cpu"), environ, 0)
    assert "stack" not in str(raised.value)
    with pytest.raises(RuntimeError, match=r"Unable to find|connectFullMesh"):  # Not of NCCL.
        worlds._join(place("first"), torch.device("cuda", 0), dict(environ), 0)


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gloo itself says of it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch7")
    with pytest.raises(ConfigError, match=r"nosuch7\). GLOO_SOCKET_IFNAME is 'nosuch7'"):
        worlds._join(Place("alone"), torch.device("cpu"), {"GLOO_SOCKET_IFNAME": "nosuch7"}, 0)
