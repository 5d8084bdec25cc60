"""The two background threads: one takes parameters into the averages, one puts snapshots into storage.

    training thread --staged slot--> averages thread --filled images--> storage thread --> store

A slow store can delay or skip the next snapshot, never an update. What is queued is bounded by the buffers, which are
made once: at most two updates, each in its slot of staging, and one snapshot. So storage that stalls costs no memory,
however long. No thread enters a collective: a snapshot is complete when all ranks have written, which nobody needs to
wait for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from phema_dist.errors import BackgroundError
from phema_dist.storage.manifest import BLOCK_BYTES, FORMAT, Manifest
from phema_dist.storage.snapshot import DTYPE_NAMES
from phema_dist.training import ends
from phema_dist.training.buffers import SnapshotBuffers
from phema_dist.training.policy import Grid, Place, wait_until_complete
from phema_dist.training.staging import NUM_SLOTS, Staging
from phema_dist.training.status import Counts, Status, describe, footprint, measured, outcome
from phema_dist.training.storing import Storing
from phema_dist.training.worker import Worker

if TYPE_CHECKING:
    from phema_dist.training.layout import Piece
    from phema_dist.training.staging import Segment
    from phema_dist.training.tracker import Tracker

_log = logging.getLogger("phema_dist")
_SECONDS_AFTER_ERROR = 10.0  # for a snapshot on its way, when the averages thread has stopped


@dataclass(frozen=True)
class Update:
    """A filled slot on its way into the averages; `snapshot` asks for one at exactly this t, if storage is free.

    The `last` update comes again when training ends, for a snapshot that is not skipped.
    """

    slot: int
    t: int  # as the user counts it
    calls: int
    snapshot: bool
    counted: bool  # t is the number of rounds of `attach`, also of those that proved to be no steps
    last: bool = False


class Writer:
    """The background path of one rank, from staged parameters to stored snapshots.

    Its methods are called by the training thread, `drain` and `abandon` by any; none communicates with other ranks. If
    it `raises`, a lost snapshot is an error at the next call, else only logged.
    """

    def __init__(
        self, segments: Sequence[Segment], tracker: Tracker, checkpoint_dtype: torch.dtype | None, *, raises: bool
    ) -> None:
        self.counts = Counts()
        self._segments, self._tracker = tuple(segments), tracker
        self._staging = Staging(segments)
        self._dtype = DTYPE_NAMES[checkpoint_dtype or torch.float32]
        self._buffers = SnapshotBuffers(segments, tracker, checkpoint_dtype)
        self._storing = Storing(self._buffers, self.counts, raises=raises)
        self._num_updates = self._snapshot_t = 0
        self._num_refused = 0  # in a row
        self._last: Update | None = None
        self._slot: int | None = None  # of what the averages took in last; None if they refused it
        self._in_vain: int | None = None  # t of the snapshot that other ranks did not store in time
        self._grid = Grid()
        self._hurried = False  # training waits for the averages
        self._ended: str | None = None  # why there are no more updates
        self._changed = threading.Condition()

    def start(self, place: Place) -> None:
        """Start the threads."""
        self._place = self._storing.place = place
        self._averages: Worker[Update] = Worker("phema-averages", self._apply, self._changed)
        self._storage: Worker[Manifest] = Worker("phema-storage", self._store, self._changed)
        taken = footprint(self._segments, len(place.sigma_rels), self._dtype)
        _log.log(logging.DEBUG if place.rank else logging.INFO, "%s averages %s", self.name, taken)
        ends.opened(self)

    @property
    def name(self) -> str:
        """The run, and this rank."""
        return f"{self._place.store.url}, rank {self._place.rank}"

    @property
    def has_ended(self) -> bool:
        """Whether it was closed or abandoned."""
        return self._ended is not None

    @property
    def is_busy(self) -> bool:
        """Whether an update would have to wait: the last two are still being taken in."""
        return self._averages.works and self._averages.num_pending >= NUM_SLOTS

    def has_taken(self, t: int, num_skipped: int) -> bool:
        """Whether a snapshot at t is on its way, or the last one whose part this rank has stored.

        Such a one is not deleted: none after it is complete. One on its way may still be skipped, or lost, which is
        told then. `num_skipped` are the rounds of `attach`, of those that t counts, that were none by now.
        """
        if self._ended is None:  # else its queue is dropped
            for update in self._averages.pending:
                if update.snapshot and update.t - num_skipped * update.counted <= t <= update.t:
                    return True
        return 0 < t == self._snapshot_t and bool(self._storage.num_pending or self._storing.unstored is None)

    def status(self, t: int) -> Status:
        """How it fares, at this t of the clock; never waits."""
        return describe(self.counts, t, self._averages.num_pending, self._averages.problem or self._storage.problem)

    def check(self) -> None:
        """Raise what the training thread has to know.

        Raises:
            BackgroundError: a thread has stopped, again at each call.
            StorageError: a snapshot was lost and the writer `raises`, once for each.
        """
        self._storage.check()
        self._averages.check()
        self._storing.check()

    def update(
        self,
        pieces: Sequence[Sequence[Piece]],
        t: int,
        calls: int,
        *,
        snapshot: bool,
        counted: bool,
        skips: torch.Tensor | None,
        timeout: float | None = None,
    ) -> None:
        """Begin to copy the model and queue an update at t; waits only while both slots are still being taken in.

        Parameters must not change before the copy is there: see `fence`. Nothing happens if no slot is free after
        `timeout` seconds.
        """
        if self._ended is not None:
            raise BackgroundError(f"there are no more updates: {self._ended}. Make a new PostHocEMA with resume=True.")
        self._storage.check()
        begin = time.monotonic()
        try:
            if not self._averages.wait_until_fewer(NUM_SLOTS, timeout):
                return
        finally:
            self.counts.stall_seconds += time.monotonic() - begin
        slot = self._num_updates % NUM_SLOTS
        self._staging.fill(slot, pieces, skips)
        self._last = Update(slot, t, calls, snapshot, counted)
        self._num_updates += 1
        self._averages.submit(self._last)

    def fence(self) -> None:
        """Let what the training thread asks of an accelerator from now on wait for the copies; returns at once."""
        self._staging.fence()

    def settle(self) -> None:
        """Wait until everything queued is in the averages; not for storage, so a snapshot may be skipped."""
        self._hurry(hurried=True)
        try:
            self._averages.wait_until_fewer(1)
        finally:
            self._hurry(hurried=False)

    def go_on(self, place: Place) -> None:
        """Write as another attempt from now on; nothing may be queued."""
        self._place = self._storing.place = place
        self._last, self._snapshot_t, self._storing.unstored, self._slot, self._in_vain = None, 0, None, None, None
        self.counts.no_steps, self.counts.last_complete, self.counts.last_written = 0, None, None

    @property
    def staged(self) -> list[torch.Tensor] | None:
        """What the averages took in last, a flat tensor for each segment, until the next update; after `settle`.

        None before the first update of this job, and if they refused the last one.
        """
        return None if self._slot is None else self._staging.slots[self._slot]

    def wait_for_others(self) -> None:
        """Wait until the newest snapshot of this rank is complete: until the others have stored their parts, too.

        Not collective: it looks in storage. For a while only, then it is logged: they may have lost theirs.
        """
        t = self.counts.last_written
        if t not in {None, self._in_vain} and not wait_until_complete(self._place, t):
            self._in_vain = t
            text = "other ranks have not stored their parts so far; an older snapshot is used where this one is needed"
            self._place.warn(t, text)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything queued is in the averages and in storage; False after `timeout` seconds.

        Raises as `check`.
        """
        done = self._wait(timeout)
        self.check()
        return done

    def close(self, timeout: float | None = None) -> None:
        """Write a last snapshot, at the last update, and end the threads, whatever they are at after `timeout` seconds.

        Raises:
            BackgroundError: a thread has stopped, `timeout` was too short, or that snapshot could not be stored.
            StorageError: an earlier snapshot was lost, and the writer `raises`; all others are stored.
        """
        if self._ended is not None:
            raise BackgroundError(f"there is no last snapshot: {self._ended}.")
        end = _end(timeout)
        try:
            done = self._wait_for_averages(timeout)
            if done and self._last is not None and self._snapshot_t < self._last.t:
                self._averages.submit(replace(self._last, snapshot=True, last=True))
            if not (done and self._wait(_left(end))):
                busy = "storage is" if done else "the averages are"
                raise BackgroundError(
                    f"{busy} still busy after {timeout:.3g} s; what is not stored by now is lost. Give close() more "
                    "time, or look at the storage."
                )
        finally:
            self._end("it is closed")
        if (reason := self._storing.unstored) is not None:
            cause = reason if isinstance(reason, Exception) else None
            raise BackgroundError(f"the last snapshot could not be stored: {reason}") from cause
        self.check()
        self._place.tell(0 if self._last is None else self._last.t, outcome(self.counts))

    def abandon(self, timeout: float, why: str = "given up") -> None:
        """End the threads without a last snapshot: store what is queued if that is quick, and raise nothing."""
        if self._ended is not None:
            return
        try:
            self._storage.check()  # not in a forked child
            t = 0 if self._last is None else self._last.t
            self._place.warn(t, f"{why}: storing what is queued, no last snapshot")
            if not self._wait(timeout):
                self._place.warn(t, f"still busy after {timeout:.3g} s; what is not stored by now is lost")
        except BackgroundError as error:
            _log.warning("%s", error)
        finally:
            self._end(why)

    def _end(self, why: str) -> None:
        ends.closed(self)
        self._ended = self._ended or why
        self._averages.stop()
        self._storage.stop()

    def _hurry(self, *, hurried: bool) -> None:
        self._hurried = hurried
        if self._averages.works:  # else the lock may be one that a fork left taken
            with self._changed:
                self._changed.notify_all()

    def _wait(self, timeout: float | None) -> bool:
        """Wait until nothing is queued; False after `timeout` seconds."""
        end = _end(timeout)
        return self._wait_for_averages(timeout) and self._storage.wait_until_fewer(1, _left(end))

    def _wait_for_averages(self, timeout: float | None) -> bool:
        end = _end(timeout)
        try:
            return self._averages.wait_until_fewer(1, timeout)
        except BackgroundError:  # what was filled before that is whole, and worth storing
            left = _left(end)
            self._storage.wait_until_fewer(1, _SECONDS_AFTER_ERROR if left is None else min(left, _SECONDS_AFTER_ERROR))
            raise

    def _apply(self, update: Update) -> None:
        """On the averages thread."""
        self._staging.wait(update.slot)
        staged = self._staging.slots[update.slot]
        num_skipped, was_no_step = self._staging.skips(update.slot)
        if update.counted:
            self.counts.no_steps = num_skipped
            update = replace(update, t=update.t - num_skipped)
        t = update.t - self._place.origin
        averaged = [flat for segment, flat in zip(self._segments, staged, strict=True) if segment.averaged]
        unchanged = was_no_step and not update.counted  # the user's t grew all the same: only a snapshot needs it
        due = update.snapshot if unchanged else not update.last
        applied = True
        if due and t > self._tracker.t:
            applied = self._tracker.update(averaged, t)
            self.counts.updates += applied
            self._tell_refused(update.t, refused=not applied)
        self._slot = update.slot if applied else None
        if update.snapshot and update.t > self._snapshot_t:
            self._snapshot(update, staged, None if self._tracker.t == t else "its parameters are not finite")

    def _tell_refused(self, t: int, *, refused: bool) -> None:
        """Warn at the beginning and at the end of a time in which parameters are not finite."""
        self.counts.updates_refused += refused
        if refused and not self._num_refused:
            self._place.warn(t, "parameters are not finite and do not enter the averages")
        if not refused and self._num_refused:
            self._place.warn(t, f"parameters are finite again; {self._num_refused} updates were left out")
        self._num_refused = self._num_refused + 1 if refused else 0

    def _snapshot(self, update: Update, staged: Sequence[torch.Tensor], refused: str | None) -> None:
        on_grid = self._grid.holds(update.calls // self._place.checkpoint_every)
        if not (on_grid or update.last):
            self.counts.skipped += 1
            return
        if not self._wait_for_buffers():
            if self._storage.works and self._ended is None:
                self._skip(update.t)
            return
        self._snapshot_t = update.t
        if self._grid.narrow():
            every = f"one snapshot in {self._grid.every}" if self._grid.every > 1 else "every snapshot"
            self._place.tell(update.t, f"storage is quicker now; {every} is taken")
        sums = (0, 0.0, 0.0, 0.0, 0.0)
        if refused is None:
            for fqn in self._buffers.fill(staged):
                self._place.warn(
                    update.t, f"{fqn}: its averages exceed the range of {self._dtype}; stored as F32 from now on"
                )
            sums = self._buffers.measure()
        place = self._place
        manifest = Manifest(
            FORMAT, update.t, place.attempt.number, place.attempt.token, place.rank, place.attempt.world_size,
            update.calls, self._tracker.history.knots if place.rank == 0 else (), self._dtype, BLOCK_BYTES,
            files=(), refused=refused,
            measured=measured(self.counts, self._averages.num_pending, *sums),
        )  # fmt: skip
        self._storage.submit(manifest)

    def _wait_for_buffers(self) -> bool:
        """Wait until the snapshot before is stored, and its buffers free; False as soon as training would wait too."""
        with self._changed:
            while (
                self._storage.num_pending
                and self._storage.works
                and not (self._hurried or self._ended or self._averages.num_pending >= NUM_SLOTS)
            ):
                self._changed.wait()
        return self._storage.works and not self._storage.num_pending

    def _skip(self, t: int) -> None:
        self.counts.skipped += 1
        self._grid.widen()
        text = f"no snapshot, storage is busy with the one before; one in {self._grid.every} until it is quicker"
        self._place.warn(t, text)

    def _store(self, manifest: Manifest) -> None:
        """On the storage thread."""
        begin = time.monotonic()
        self._storing.store(manifest)
        self._grid.put_seconds = time.monotonic() - begin


def _end(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())
