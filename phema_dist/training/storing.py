"""The work of the storage thread: one rank's part of a snapshot into the run, and rank 0's care of older ones.

Whatever a store, or our own code, raises meanwhile costs that snapshot and no more. Only two things end the thread:
that another job has taken over the run, where going on would mix two trainings, and what no thread survives (no
memory, SystemExit).
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from phema_dist.errors import RunError, StorageError, SupersededError
from phema_dist.storage.manifest import Manifest, shard_name
from phema_dist.storage.snapshot import write_snapshot
from phema_dist.training.policy import Place, check_not_superseded, tidy

if TYPE_CHECKING:
    from phema_dist.storage.run import Known
    from phema_dist.training.buffers import SnapshotBuffers
    from phema_dist.training.status import Counts

_log = logging.getLogger("phema_dist")


class Storing:
    """Stores what is in the snapshot buffers, at `place`, and counts what became of it.

    If it `raises`, a lost snapshot is also an error for the training thread, which asks with `check`.
    """

    place: Place

    def __init__(self, buffers: SnapshotBuffers, counts: Counts, *, raises: bool) -> None:
        self.unstored: Exception | str | None = None  # why the newest snapshot is not in storage
        self._buffers, self._counts, self._raises = buffers, counts, raises
        self._lost: deque[StorageError] = deque(maxlen=1)  # not told yet
        self._known: Known = {}  # what rank 0 has read of the run
        self._told: set[int] = set()  # t of incomplete snapshots that were reported
        self._swept: set[int] = set()  # attempts in which dead puts were removed

    def check(self) -> None:
        """Raise StorageError if a snapshot was lost and that was not told yet; on the training thread."""
        try:
            lost = self._lost.pop()
        except IndexError:  # perhaps taken a moment ago, by the one who drains at SIGTERM
            return
        raise lost

    def store(self, manifest: Manifest) -> None:
        """Store this rank's part of a snapshot. Raises SupersededError if another job has taken over the run."""
        counts = self._counts
        try:
            counts.num_bytes += self._put(manifest)
        except (SupersededError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  the training goes on without this snapshot
            self._lose(manifest.t, error)
            return
        if manifest.refused is None:
            _log.debug("%s, rank %d, t=%d: its part is stored", self.place.store.url, self.place.rank, manifest.t)
            counts.written += 1
            counts.last_written, self.unstored = manifest.t, None
        else:
            counts.failed += 1
            counts.last_error = self.unstored = f"t={manifest.t}: {manifest.refused}"
        if self.place.rank == 0:
            self._tidy(manifest.t)

    def _put(self, manifest: Manifest) -> int:
        place = self.place
        if place.rank == 0:
            check_not_superseded(place)
        images = [] if manifest.refused else [
            (shard_name(sigma_rel, place.rank, number), sigma_rel, image)
            for sigma_rel, files in zip(place.sigma_rels, self._buffers.files, strict=True)
            for number, image in enumerate(files)
        ]  # fmt: skip
        return write_snapshot(place.store, manifest, images)

    def _lose(self, t: int, error: Exception) -> None:
        self._counts.failed += 1
        self.unstored = error
        text = self._tell(t, "the snapshot is lost, training goes on", error)
        if self._raises:
            lost = StorageError(
                f"rank {self.place.rank} could not store its part of the snapshot at t={t}: {text.removesuffix('.')}. "
                "Nothing else is lost: catch this to go on without that snapshot."
            )
            lost.__cause__ = error
            self._lost.append(lost)

    def _tidy(self, t: int) -> None:
        """On rank 0: what fails here comes again after the next snapshot, unless this job is superseded."""
        place = self.place
        try:
            tidy(place, t, self._known, self._told, self._swept)
        except (SupersededError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  the training goes on with what is there
            self._tell(t, "older snapshots could not be deleted", error)
        mine = (s.t for _, s in self._known.values() if s.manifests and s.manifests[0].token == place.attempt.token)
        before = self._counts.last_complete
        for complete in sorted(s for s in mine if before is None or s > before):
            place.tell(complete, "the snapshot is complete, of all ranks")
            self._counts.last_complete = complete

    def _tell(self, t: int, what: str, error: Exception) -> str:
        """Note and log an error of storage; with its way through the code if it is none of those that we expect."""
        odd = not isinstance(error, StorageError | RunError)
        text = f"{type(error).__name__}: {error}" if odd else str(error)
        self._counts.last_error = f"t={t}: {what}: {text}"
        _log.warning(
            "%s, rank %d, t=%d: %s: %s",
            self.place.store.url, self.place.rank, t, what, text, exc_info=error if odd else None,
        )  # fmt: skip
        return text
