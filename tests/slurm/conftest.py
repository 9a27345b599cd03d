from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.harness import Cluster, missing


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "c")
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """Four nodes of 64 CPUs and 8 GPUs, all of them idle; jobs of `low` give way to those of `main`."""
    yield started
    started.start()
    started.idle()
