"""How a process ends: what is queued is stored first, as far as that is quick, and nothing hangs."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Drainable(Protocol):
    """What has something queued, and threads."""

    def abandon(self, timeout: float, why: str) -> None:
        """End the threads; store what is queued if that takes less than `timeout` seconds. Raises nothing."""


_open: weakref.WeakSet[Drainable] = weakref.WeakSet()
_SECONDS_AT_EXIT = 10.0


def opened(writer: Drainable) -> None:
    """Drain it when the process ends, unless it is closed before."""
    _open.add(writer)


def closed(writer: Drainable) -> None:
    """It has ended by itself."""
    _open.discard(writer)


def _drain_at_exit() -> None:
    for writer in list(_open):
        writer.abandon(_SECONDS_AT_EXIT, "the program ends and PostHocEMA was not closed")


# Private, but there is no other moment: when atexit runs, storage clients can no longer start the threads they need.
threading._register_atexit(_drain_at_exit)  # type: ignore[attr-defined]  # noqa: SLF001
os.register_at_fork(after_in_child=_open.clear)  # a DataLoader's worker has no thread to wait for
