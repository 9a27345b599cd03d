"""The address on which gloo, which CPUs talk through, listens for the other ranks, and whether they can reach it.

gloo listens on what the host's own name stands for. Where /etc/hosts says 127.0.1.1, as Debian writes it, that is an
address that no other machine reaches, and ranks wait for each other until they give up, half an hour later.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from mvar.errors import ConfigError
from mvar.log import log
from mvar.run.launcher import Place

VARIABLE = "GLOO_SOCKET_IFNAME"
REMEDY = (
    f"Set {VARIABLE} to the network interface that the machines share, such as eth0 or ib0 (`ip -brief address` lists"
    " them; for Slurm jobs in slurm/site.env), or mend /etc/hosts."
)


def require_reachable(place: Place, environ: Mapping[str, str]) -> None:
    """Before ranks of several machines meet through gloo. Raises ConfigError if the others cannot reach this one.

    Where the ranks meet on this very machine, all of them may be here: then it is only said.
    """
    if place.address is None or place.size == place.local_size or environ.get(VARIABLE):
        return
    own = listening_address()
    if not ipaddress.ip_address(own).is_loopback:
        return
    problem = f"gloo listens on {own}, which is what this host's name, {socket.gethostname()}, stands for here"
    if _is_own(_addresses(place.address)):
        log.warning("%s: if other machines take part, they cannot reach it. %s", problem, REMEDY)
        return
    raise ConfigError(f"{place.launcher}: {problem}: the other machines' processes cannot reach it. {REMEDY}")


def listening_address() -> str:
    """What gloo chooses: the first address of this host's name that is this host's, else that of the loopback."""
    return next((address for address in _addresses(socket.gethostname()) if _is_own([address])), "127.0.0.1")


@contextmanager
def explaining(place: Place, environ: Mapping[str, str]) -> Iterator[None]:
    """What gloo says when ranks do not reach each other, with what to do. Raises ConfigError."""
    try:
        yield
    except RuntimeError as error:
        said = next(iter(str(error).splitlines()), "")
        if "gloo" not in said.lower():
            raise
        told = environ.get(VARIABLE)
        where = f"{VARIABLE} is {told!r}" if told else f"{VARIABLE} is not set, so this one is at {listening_address()}"
        raise ConfigError(
            f"{place.launcher}: rank {place.rank} of {place.size} on {socket.gethostname()} does not reach the others"
            f" through gloo ({said}). {where}. {REMEDY}"
        ) from error


def _addresses(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(address[0]).partition("%")[0] for *_, address in found]


def _is_own(addresses: Iterable[str]) -> bool:
    """Whether one of them is this machine's."""
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((address, 0))
                return True
        except OSError:
            continue
    return False
