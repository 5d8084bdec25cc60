"""Pins: the t of snapshots that no retention deletes, each an empty object beside them.

Anybody who may write in the run may pin: a person, a rank that trains, a program that watches the loss. Nobody waits
for anybody. Who deletes looks for pins before each deletion, and who pins looks for the snapshot afterwards: one that
was already being deleted when its pin came is gone, and the one who pinned is told.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING

from phema_dist.errors import KeyExistsError, RunError, SnapshotError
from phema_dist.storage.manifest import pin_key
from phema_dist.storage.run import open_run, pins_among

if TYPE_CHECKING:
    from phema_dist.storage.run import Run
    from phema_dist.storage.store import Store

_MOST_NAMED = 8


def pinned(store: Store) -> frozenset[int]:
    """Each t that is pinned now."""
    return pins_among(store.list("pins"))


def pin(store: Store, t: int, is_coming: Callable[[], bool] = lambda: False) -> None:
    """Keep the snapshots at t for ever, hidden ones too; to pin twice is fine.

    Args:
        store: where the run lives.
        t: of a complete snapshot.
        is_coming: asked whether the caller has taken a snapshot at t that may not be whole yet.

    Raises:
        RunError: there is no run.
        SnapshotError: there is no complete snapshot at t, or it was being deleted; names the nearest. Nothing is
            pinned.
    """
    comes = is_coming()
    if not comes:
        _require(open_run(store), t, "cannot be pinned: there is no complete snapshot")
    is_new = True
    try:
        store.put(pin_key(t), b"")
    except KeyExistsError:
        is_new = False
    if is_coming():  # nothing is deleted before its successor is complete
        return
    try:
        _require(open_run(store), t, "was deleted while it was being pinned, and is gone", unfinished_too=comes)
    except SnapshotError:
        if is_new:
            store.delete([pin_key(t)])
        raise


def unpin(store: Store, t: int) -> None:
    """Let retention have the snapshots at t again. Raises RunError if t is not pinned."""
    pins = open_run(store).pins
    if t not in pins:
        some = ", ".join(f"t={u}" for u in sorted(pins)[:_MOST_NAMED]) + ", …" * (len(pins) > _MOST_NAMED)
        raise RunError(f"{store.url}: t={t} must be pinned to be unpinned; pinned is {some or 'nothing'}.")
    store.delete([key for key in store.list("pins") if t in pins_among([key])])


def _require(run: Run, t: int, problem: str, *, unfinished_too: bool = False) -> None:
    """Raise SnapshotError unless there is a snapshot at t, with this problem and what else there is."""
    found = (*run.snapshots, *run.abandoned)
    ts = sorted({s.t for s in found if s.problem is None})
    if t in ts or (unfinished_too and any(s.t == t and s.unfinished for s in found)):
        return
    why = "".join(f" ({s.problem})" for s in found if s.t == t)
    after = bisect(ts, t)
    near = " and ".join(f"t={u}" for u in ts[max(after - 1, 0) : after + 1])
    raise SnapshotError(
        f"{run.store.url}: t={t} {problem}{why}. " + (f"The nearest are {near}." if near else "There is none so far.")
    )
