"""Pins: the t of snapshots that no retention deletes, each an empty object beside them.

Anybody who may write in the run may pin: a person, a rank that trains, a program that watches the loss. Nobody waits
for anybody. Who pins looks for the snapshot afterwards; who deletes takes its manifests away, looks for pins, and puts
them back if there is one. So a pin comes in time, or who pinned sees that the snapshot is gone, and is told. Only a
deleter that is killed between the two leaves a pinned snapshot without manifests, its data in place.
"""

from __future__ import annotations

import contextlib
from bisect import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING

from phema_dist.errors import KeyExistsError, RunError, SnapshotError
from phema_dist.storage import run as runs
from phema_dist.storage.manifest import INDEX_NAME, manifest_name, pin_key, to_json
from phema_dist.storage.run import open_run, pins_among

if TYPE_CHECKING:
    from phema_dist.storage.run import Run, Snapshot
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


def delete_unpinned(store: Store, snapshot: Snapshot) -> bool:
    """Remove a snapshot, unless its t is pinned before it is gone; returns whether it was removed."""
    if snapshot.t in pinned(store):
        return False
    if snapshot.problem is None:  # the others cannot be pinned
        manifests = {
            f"{snapshot.folder}/{manifest_name(manifest.rank, manifest.world_size)}": manifest
            for manifest in snapshot.manifests
        }
        # Who does not find all of them leaves them to somebody else, who deletes too and may have removed data.
        is_whole = manifests.keys() <= store.list(snapshot.folder).keys()
        store.delete([f"{snapshot.folder}/{INDEX_NAME}"])
        store.delete(sorted(manifests))
        if is_whole and snapshot.t in pinned(store):
            for key, manifest in manifests.items():
                with contextlib.suppress(KeyExistsError):
                    store.put(key, to_json(manifest))
            return False
    runs.delete_snapshot(store, snapshot.folder)
    return True


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
