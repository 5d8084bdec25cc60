"""The two background threads: one takes parameters into the averages, one puts snapshots into storage.

    training thread --staged slot--> averages thread --filled images--> storage thread --> store

A slow store can delay or skip the next snapshot, never an update. All queues are bounded. No thread enters a
collective: a snapshot is complete when all ranks have written, which nobody needs to wait for.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from phema_dist.errors import BackgroundError, StorageError
from phema_dist.storage.manifest import BLOCK_BYTES, FORMAT, Manifest, shard_name
from phema_dist.storage.run import Known, newest_attempt
from phema_dist.storage.snapshot import DTYPE_NAMES, write_snapshot
from phema_dist.training import ends
from phema_dist.training.buffers import SnapshotBuffers
from phema_dist.training.policy import Grid, Place, check_not_superseded, tidy
from phema_dist.training.staging import NUM_SLOTS, Staging

if TYPE_CHECKING:
    from phema_dist.training.layout import Piece
    from phema_dist.training.staging import Segment
    from phema_dist.training.tracker import Tracker

Job = TypeVar("Job")
_log = logging.getLogger("phema_dist")
_POLL_SECONDS = 0.01


class Worker(Generic[Job]):
    """A thread that handles jobs in order; if one raises the thread ends, and the next call here says so."""

    def __init__(self, name: str, handle: Callable[[Job], None]) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._handle = handle
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._num_pending = 0
        # A daemon, so that a store that hangs cannot keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        """Jobs that are queued or being handled."""
        return self._num_pending

    def wait_until_fewer(self, num_pending: int, timeout: float | None = None) -> bool:
        """Wait until fewer jobs are pending; False after `timeout` seconds, BackgroundError if the thread failed."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._error or self._num_pending < num_pending, timeout)
        self.check()
        return bool(done)

    def check(self) -> None:
        """Raise BackgroundError if the thread failed; if it failed because another one had, that one's error."""
        if isinstance(self._error, BackgroundError):
            raise self._error
        if self._error is not None:
            raise BackgroundError(f"{self._thread.name} stopped: {self._error}") from self._error

    def submit(self, job: Job) -> None:
        """Queue a job. Queues stay short because callers wait for the buffers that a job carries."""
        with self._changed:
            self._num_pending += 1
        self._jobs.put(job)

    def stop(self) -> None:
        """Let the thread end after the jobs that are queued."""
        self._jobs.put(None)

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self._handle(job)
                with self._changed:
                    self._num_pending -= 1
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  kept for the training thread, which raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()


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


@dataclass
class Counts:
    """What became of the snapshots of this rank."""

    written: int = 0
    skipped: int = 0
    failed: int = 0
    last_error: str | None = None


class Writer:
    """The background path of one rank, from staged parameters to stored snapshots.

    `update` and `close` are called by the training thread; neither communicates with other ranks.
    """

    def __init__(self, segments: Sequence[Segment], tracker: Tracker, checkpoint_dtype: torch.dtype | None) -> None:
        self.counts = Counts()
        self._segments, self._tracker = tuple(segments), tracker
        self._staging = Staging(segments)
        self._dtype = DTYPE_NAMES[checkpoint_dtype or torch.float32]
        self._buffers = SnapshotBuffers(segments, tracker, checkpoint_dtype)
        self._known: Known = {}  # what rank 0 has read of the run
        self._told: set[int] = set()  # t of incomplete snapshots that were reported
        self._num_updates = self._snapshot_t = 0
        self._num_refused = 0  # in a row
        self._last: Update | None = None
        self._unstored: str | None = None  # why the newest snapshot is not in storage
        self._grid = Grid()
        self._hurried = False  # training waits for the averages

    def start(self, place: Place) -> None:
        """Start the threads."""
        self._place = place
        self._averages: Worker[Update] = Worker("phema-averages", self._apply)
        self._storage: Worker[Manifest] = Worker("phema-storage", self._store)
        ends.opened(self)

    def update(
        self,
        pieces: Sequence[Sequence[Piece]],
        t: int,
        calls: int,
        *,
        snapshot: bool,
        counted: bool,
        skips: torch.Tensor | None,
    ) -> None:
        """Begin to copy the model and queue an update at t; waits only while both slots are still being taken in.

        Parameters must not change before the copy is there: see `fence`.
        """
        self._storage.check()
        self._averages.wait_until_fewer(NUM_SLOTS)
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
        self._hurried = True
        try:
            self._averages.wait_until_fewer(1)
        finally:
            self._hurried = False

    def go_on(self, place: Place) -> None:
        """Write as another attempt from now on; nothing may be queued."""
        self._place, self._last, self._snapshot_t, self._unstored = place, None, 0, None

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything queued is in the averages and in storage; False after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        if not self._averages.wait_until_fewer(1, timeout):
            return False
        return self._storage.wait_until_fewer(1, None if end is None else max(0.0, end - time.monotonic()))

    def close(self, timeout: float | None = None) -> None:
        """Write a last snapshot, at the last update, and end the threads.

        Raises:
            BackgroundError: a thread has stopped, `timeout` was too short, or that snapshot could not be stored.
        """
        end = None if timeout is None else time.monotonic() + timeout
        try:
            stored = self._averages.wait_until_fewer(1, timeout)
            if stored and self._last is not None and self._snapshot_t < self._last.t:
                self._averages.submit(replace(self._last, snapshot=True, last=True))
            if not (stored and self.drain(None if end is None else max(0.0, end - time.monotonic()))):
                raise BackgroundError(f"storage is still busy after {timeout} s; what it has not stored is lost.")
        finally:
            self._stop()
        if self._unstored is not None:
            raise BackgroundError(f"the last snapshot could not be stored: {self._unstored}")

    def abandon(self, timeout: float, why: str = "given up") -> None:
        """End the threads without a last snapshot: store what is queued if that is quick, and raise nothing."""
        self._place.warn(0 if self._last is None else self._last.t, f"{why}: storing what is queued, no last snapshot")
        try:
            self.drain(timeout)
        except BackgroundError as error:
            _log.warning("%s", error)
        self._stop()

    def _stop(self) -> None:
        ends.closed(self)
        self._averages.stop()
        self._storage.stop()

    def _apply(self, update: Update) -> None:
        """On the averages thread."""
        self._staging.wait(update.slot)
        staged = self._staging.slots[update.slot]
        num_skipped, was_no_step = self._staging.skips(update.slot)
        if update.counted:
            update = replace(update, t=update.t - num_skipped)
        t = update.t - self._place.origin
        averaged = [flat for segment, flat in zip(self._segments, staged, strict=True) if segment.averaged]
        unchanged = was_no_step and not update.counted  # the user's t grew all the same: only a snapshot needs it
        due = update.snapshot if unchanged else not update.last
        if due and t > self._tracker.t:
            self._tell_refused(update.t, refused=not self._tracker.update(averaged, t))
        if update.snapshot and update.t > self._snapshot_t:
            self._snapshot(update, staged, None if self._tracker.t == t else "its parameters are not finite")

    def _tell_refused(self, t: int, *, refused: bool) -> None:
        """Warn at the beginning and at the end of a time in which parameters are not finite."""
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
        # The buffers of the snapshot before may still be on their way. Wait for them, but never let training wait.
        while self._storage.num_pending:
            if self._hurried or self._averages.num_pending >= NUM_SLOTS:
                self._skip(update.t)
                return
            self._storage.wait_until_fewer(1, _POLL_SECONDS)
        self._snapshot_t = update.t
        self._grid.narrow()
        if refused is None:
            for fqn in self._buffers.fill(staged):
                self._place.warn(
                    update.t, f"{fqn}: its averages exceed the range of {self._dtype}; stored as F32 from now on"
                )
        place = self._place
        manifest = Manifest(
            FORMAT, update.t, place.attempt.number, place.attempt.token, place.rank, place.attempt.world_size,
            update.calls, self._tracker.history.knots if place.rank == 0 else (), self._dtype, BLOCK_BYTES,
            files=(), refused=refused,
        )  # fmt: skip
        self._storage.submit(manifest)

    def _skip(self, t: int) -> None:
        self.counts.skipped += 1
        self._grid.widen()
        text = f"no snapshot, storage is busy with the one before; one in {self._grid.every} until it is quicker"
        self._place.warn(t, text)

    def _store(self, manifest: Manifest) -> None:
        """On the storage thread."""
        begin = time.monotonic()
        self._put(manifest)
        self._grid.put_seconds = time.monotonic() - begin

    def _put(self, manifest: Manifest) -> None:
        place = self._place
        try:
            if place.rank == 0:
                check_not_superseded(place, newest_attempt(place.store))
            images = [] if manifest.refused else [
                (shard_name(sigma_rel, place.rank, number), sigma_rel, image)
                for sigma_rel, files in zip(place.sigma_rels, self._buffers.files, strict=True)
                for number, image in enumerate(files)
            ]  # fmt: skip
            write_snapshot(place.store, manifest, images)
        except StorageError as error:
            self.counts.failed += 1
            self._unstored = self.counts.last_error = str(error)
            self._place.warn(manifest.t, f"the snapshot is lost, training goes on: {error}")
            return
        self.counts.written += 1
        self._unstored = None if manifest.refused is None else f"t={manifest.t}: {manifest.refused}"
        if place.rank == 0:
            try:
                tidy(place, manifest.t, self._known, self._told)
            except StorageError as error:
                self.counts.last_error = str(error)
                self._place.warn(manifest.t, f"older snapshots could not be deleted: {error}")
