"""A start in which ranks are busy for unequal times: whoever waits lives as long as somebody gets on."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

from torch.distributed import distributed_c10d

from mvar import headway
from mvar.run.stopping import Watchdog
from mvar.run.world import World, be_patient

COUNT = "mvar/headway"
"""In the store of the process group: how often some rank has told of headway."""
EVERY_S = 10.0
"""So often a rank tells and asks (at most a tenth of the watchdog's limit)."""


class Heartbeat:
    """While entered, headway (`mvar.headway`) of any rank feeds the watchdogs of all ranks, for the phase `start`, and
    collectives wait as long as these allow.

    A thread tells and asks through a connection of its own, because a rank that waits may be waiting in the store. If
    no rank makes headway, or the store is gone, the watchdog is on its own.
    """

    def __init__(self, watchdog: Watchdog, world: World) -> None:
        self._watchdog, limit_s = watchdog, watchdog.limits_s["start"]
        self._every_s = min(EVERY_S, limit_s / 10)
        self._store: Any = None
        if world.size > 1 and limit_s:
            shared: Any = distributed_c10d._get_default_store()
            self._store = shared.clone()
        self._made = False
        self._ended = threading.Event()
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._beat, name="mvar-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._stack.enter_context(headway.heard_by(self._note))
        be_patient([0])
        if self._every_s:
            self._thread.start()
        return self

    def _note(self) -> None:
        self._made = True

    def _beat(self) -> None:
        known = self._count(own=False)
        while not self._ended.wait(self._every_s):
            own, self._made = self._made, False
            count = self._count(own)
            if (own or count > known) and not self._ended.is_set():
                self._watchdog.feed("start")
            known = count

    def _count(self, own: bool) -> int:
        """Of all ranks; 0 without a store that answers."""
        try:
            return 0 if self._store is None else int(self._store.add(COUNT, int(own)))
        except RuntimeError:
            self._store = None
            return 0

    def end(self) -> None:
        """The start is over; may be called again."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._stack.close()
        if self._thread.is_alive():
            self._thread.join(EVERY_S)  # Not for ever: the store may not answer.
        be_patient(self._watchdog.limits_s.values())

    def __exit__(self, *_: object) -> None:
        self.end()
