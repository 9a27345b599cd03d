"""What unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mvar.log import speaking


@pytest.fixture
def voice() -> Iterator[None]:
    """mvar's log is heard, as in a command on rank 0."""
    with speaking({}):
        yield
