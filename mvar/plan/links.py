"""Links between GPUs, and the time that collectives take on them.

A collective of N ranks on n nodes costs latency for every hop and bandwidth for every byte that a rank sends:

    ring, all-reduce          2 H + 2 (N-1)/N S / B
    ring, reduce-scatter        H +   (N-1)/N S / B
    ring, all-gather            H +   (N-1)   s / B          s: a rank's part
    tree, all-reduce          2 T + 2         S / B          the faster of both is taken, as NCCL does

H is the latency of a way round the ring, n hops between nodes and N - n inside; T that of a way up the tree, log2(n)
hops between nodes and N/n - 1 inside. B is the slowest link that a ring crosses. NCCL lays as many rings as a node has
adapters, so between nodes B is what all adapters of a node carry together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mvar.errors import ConfigError
from mvar.plan.gpus import Gpu

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]
INSIDE_US, BETWEEN_US = 3.0, 10.0
"""Of a hop: NVLink or PCIe with its kernel's hand-over; InfiniBand or RoCE with the adapter's."""
SHARE = 0.8
"""Of a link's bandwidth that large collectives reach."""


@dataclass(frozen=True)
class Network:
    """What connects nodes. `gb_s`: of an adapter, one direction."""

    name: str
    gb_s: float
    per_gpu: bool
    """An adapter for each GPU, or one for the node."""

    def of_node(self, gpus: int) -> float:
        """GB/s out of a node, one direction."""
        return self.gb_s * (gpus if self.per_gpu else 1)


NETWORKS = {
    network.name: network
    for network in (
        Network("ib-xdr", 100, True),  # InfiniBand, 800 Gb/s a GPU
        Network("ib-ndr", 50, True),
        Network("ib-hdr", 25, True),
        Network("ib-edr", 12.5, True),
        Network("eth-400", 50, False),  # one adapter of 400 Gb/s a node
        Network("eth-200", 25, False),
        Network("eth-100", 12.5, False),
        Network("eth-25", 3.125, False),
    )
}
DEFAULT_NETWORK = "ib-ndr"


def find_network(name: str) -> Network:
    """Raises ConfigError with the known names."""
    if name.lower() not in NETWORKS:
        raise ConfigError(f"--network {name}: unknown. Known: {', '.join(NETWORKS)}. Or give --link-gb-s.")
    return NETWORKS[name.lower()]


@dataclass(frozen=True)
class Links:
    """Of a cluster of nodes with equally many GPUs. Bandwidths are bytes a second, one direction; latencies seconds."""

    inside_bytes_s: float
    """Of a GPU, to its neighbours of a node."""
    between_bytes_s: float
    """Of a node, all adapters together."""
    inside_hop_s: float = INSIDE_US * 1e-6
    between_hop_s: float = BETWEEN_US * 1e-6
    share: float = SHARE

    @classmethod
    def of(cls, gpu: Gpu, network: Network, gpus: int) -> Links:
        """As the makers say."""
        return cls(gpu.link_gb_s * 1e9, network.of_node(gpus) * 1e9)

    def bandwidth(self, nodes: int) -> float:
        """Bytes a second of the slowest link that a ring crosses."""
        return self.share * (self.inside_bytes_s if nodes == 1 else min(self.inside_bytes_s, self.between_bytes_s))

    def collective_s(self, kind: Kind, handed: float, nodes: int, gpus: int, messages: int = 1) -> float:
        """Seconds of so many messages, which a rank hands `handed` bytes to, all together."""
        world = nodes * gpus
        if world == 1 or not handed:
            return 0.0
        between, bandwidth = nodes if nodes > 1 else 0, self.bandwidth(nodes)
        round_s = between * self.between_hop_s + (world - between) * self.inside_hop_s
        if kind == "all_gather":
            return messages * round_s + (world - 1) * handed / bandwidth
        once_s = (world - 1) / world * handed / bandwidth
        if kind == "reduce_scatter":
            return messages * round_s + once_s
        up_s = math.log2(nodes) * self.between_hop_s + (gpus - 1) * self.inside_hop_s
        ring_s, tree_s = messages * 2 * round_s + 2 * once_s, messages * 2 * up_s + 2 * handed / bandwidth
        return min(ring_s, tree_s)


class Timed(NamedTuple):
    """A measured all-reduce of one node."""

    world: int
    handed: int
    """Bytes."""
    seconds: float


def fit(measured: Sequence[Timed]) -> Links:
    """Latency and bandwidth of a node's links that explain measured all-reduces best: least squares of relative errors.

    Raises ConfigError where fewer than two sizes were measured.
    """
    if len({one.handed for one in measured}) < 2:
        raise ConfigError("links: two constants need all-reduces of two sizes at least.")
    # seconds = hops x latency + sent / bandwidth, both divided by seconds: a 2 x 2 system.
    rows = [(2 * t.world / t.seconds, 2 * (t.world - 1) / t.world * t.handed / t.seconds) for t in measured]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = (sum(row[i] for row in rows) for i in (0, 1))
    det = aa * bb - ab * ab
    hop_s, byte_s = (bb * a1 - ab * b1) / det, (aa * b1 - ab * a1) / det
    hop_s, byte_s = max(hop_s, 0.0), max(byte_s, 1e-15)
    return Links(1 / byte_s, 1 / byte_s, inside_hop_s=hop_s, between_hop_s=hop_s, share=1.0)
