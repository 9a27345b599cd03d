"""Packages that may be missing: imported once, with the reason kept where that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mvar.errors import BackendError


@dataclass(frozen=True)
class Loaded:
    """What an import gave, or why it failed."""

    value: Any
    problem: str = ""

    def require(self, setting: str, advice: str) -> Any:
        """The value. Raises BackendError, which names the setting that asked for it, where there is none."""
        if self.problem:
            raise BackendError(f"{setting}: {self.problem}. {advice}")
        return self.value


@lru_cache(maxsize=32)
def load(importer: Callable[[], Any]) -> Loaded:
    """Call `importer`, the first time. A package may be absent, or built for another torch, or want a driver."""
    try:
        return Loaded(importer())
    except Exception as error:
        return Loaded(None, f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}")
