"""Which snapshots are taken, which are kept, and which get an index.

What to take, ranks decide each for itself, from what they all count alike; the rest rank 0 does alone, on its storage
thread. Nobody talks to anybody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phema_dist.errors import StorageError, SupersededError
from phema_dist.storage import run as runs
from phema_dist.storage.completeness import manifest_names
from phema_dist.storage.gc import dead_puts, left_behind, not_kept, partials
from phema_dist.storage.manifest import Attempt, attempt_key, snapshot_folder
from phema_dist.storage.pins import delete_unpinned

if TYPE_CHECKING:
    from phema_dist.storage.store import Store

_log = logging.getLogger("phema_dist")
_QUICK = 0.75  # a put that takes up to this share of the time between snapshots keeps up with them
_LARGEST_EVERY = 1024
_SECONDS_FOR_OTHERS = 30.0  # to store what this rank has stored


@dataclass(frozen=True)
class Place:
    """Where this rank writes, and what it writes of itself."""

    store: Store
    attempt: Attempt
    rank: int
    sigma_rels: tuple[float, ...]
    origin: int
    max_checkpoints: int
    checkpoint_every: int
    retention: str = "best"

    def warn(self, t: int, text: str) -> None:
        """Log what went wrong at t."""
        _log.warning("%s, rank %d, t=%d: %s", self.store.url, self.rank, t, text)

    def tell(self, t: int, text: str) -> None:
        """Log what happened at t, and happens alike on all ranks: rank 0 says it for those who want to know."""
        level = logging.DEBUG if self.rank else logging.INFO
        _log.log(level, "%s, rank %d, t=%d: %s", self.store.url, self.rank, t, text)


@dataclass
class Grid:
    """Of the snapshots that are due, one in `every` is taken: fewer while storage is slow.

    Which ones follows from the number of calls and `every`, a power of two: what a slower rank takes is on the grid of
    a faster one, without talking. What only the faster ones take stays incomplete.
    """

    every: int = 1
    put_seconds: float = 0.0  # how long the last one took
    due_at: float = 0.0  # when the last one was due
    interval: float = 0.0  # ... after the one before

    def holds(self, number: int) -> bool:
        """Whether the due snapshot of this number, due now, is to be taken."""
        now = time.monotonic()
        self.interval, self.due_at = now - self.due_at, now
        return number % self.every == 0

    def widen(self) -> None:
        """Storage was busy: take every other one of them."""
        self.every = min(2 * self.every, _LARGEST_EVERY)

    def narrow(self) -> bool:
        """One is taken: take as many as storage keeps up with. Returns whether that is more than before."""
        before = self.every
        while self.every > 1 and self.put_seconds < _QUICK * self.interval * (self.every // 2):
            self.every //= 2
        return self.every < before


def wait_until_complete(place: Place, t: int, seconds: float = _SECONDS_FOR_OTHERS) -> bool:
    """Wait until all ranks have stored their parts of this attempt's snapshot at t; False after `seconds`."""
    folder = snapshot_folder(t, place.attempt.number)
    manifests = {f"{folder}/{name}" for name in manifest_names(place.attempt.world_size)}
    end, pause = time.monotonic() + seconds, 0.02
    while not manifests <= place.store.list(folder).keys():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
    return True


def check_not_superseded(place: Place, run: runs.Run | None = None) -> None:
    """Raise SupersededError if the newest attempt is not ours, StorageError if ours is not recorded any more.

    `run` is a look at the run, if there has just been one.
    """
    recorded = runs.newest_attempt(place.store) if run is None else next(iter(run.attempts[-1:]), None)
    newest = -1 if recorded is None else recorded.number
    if recorded is not None and newest == place.attempt.number and recorded.token != place.attempt.token:
        raise SupersededError(
            f"{place.store.url} has become the run of another job, which began where this one's was removed. Stop one "
            "of them, or give each its own folder."
        )
    if newest > place.attempt.number:
        raise SupersededError(
            f"attempt {place.attempt.number} of {place.store.url} is superseded by attempt {newest}: another job "
            "continues this run. Stop one of them, or give each its own folder."
        )
    if newest < place.attempt.number:
        raise StorageError(
            f"{place.store.describe(attempt_key(place.attempt.number))} is gone; somebody removed it. Nothing is "
            "written or deleted while it is missing."
        )


def tidy(place: Place, t: int, known: runs.Known, told: set[int], swept: set[int]) -> None:
    """On rank 0: delete what retention no longer needs, counting the snapshot at t, which may not be whole yet.

    Also what nobody will finish and, once in an attempt, what the puts of earlier ones have left. What stays, and is
    older than the newest complete snapshot, gets an index.

    Args:
        place: where.
        t: of the snapshot that this rank has just written.
        known: what was read of the run before, brought up to date.
        told: t of incomplete snapshots that were reported, brought up to date.
        swept: attempts in which dead puts were removed, brought up to date.
    """
    run = runs.open_run(place.store, known)
    check_not_superseded(place, run)
    _tell_incomplete(place, run, t, told)
    unwanted = {s.folder: (s, "nobody will finish it") for s in partials(run)}
    unwanted |= {s.folder: (s, "the run went on from before it") for s in left_behind(run)}
    surplus = not_kept(run, place.max_checkpoints, t, place.retention)
    unwanted |= {s.folder: (s, f"not one of the {place.max_checkpoints} to keep") for s in surplus}
    for number, (snapshot, why) in enumerate(unwanted.values()):
        if number:  # the others took their time
            check_not_superseded(place)
        if delete_unpinned(place.store, snapshot):
            place.tell(snapshot.t, f"the snapshot is deleted: {why}")
    newest = run.newest()
    if newest is not None:
        kept = (s for s in run.complete if s.t < newest.t and s.folder not in unwanted)
        _write_indexes(place, (s for s in kept if s.folder not in run.indexed))
    if place.attempt.number not in swept:  # to list them costs a request
        place.store.discard(dead_puts(run, place.store.unfinished()))
        swept.add(place.attempt.number)


def _write_indexes(place: Place, snapshots: Iterable[runs.Snapshot]) -> None:
    """Join manifests so that a big run opens quickly; what fails costs nothing, and comes again."""
    for snapshot in snapshots:
        try:
            runs.write_index(place.store, snapshot)
        except StorageError as error:
            _log.debug("%s has no index yet: %s", snapshot.folder, error)
            return  # the next one would not fare better, and storage has other things to do


def _tell_incomplete(place: Place, run: runs.Run, t: int, told: set[int]) -> None:
    """Warn of snapshots of this attempt that should be complete by now: older than the two newest up to t."""
    mine = [s for s in run.snapshots if s.attempt == place.attempt.number and s.t <= t]
    for snapshot in mine[:-2]:
        if snapshot.problem and snapshot.t not in told:
            told.add(snapshot.t)
            ask = ". Is update_ called on every rank?" if snapshot.unfinished else ""
            place.warn(snapshot.t, f"incomplete snapshot: {snapshot.problem}{ask}")
