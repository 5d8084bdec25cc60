"""One rank's side of a training job: the clock, what is due, and the way from the model to the writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from time import monotonic
from typing import TYPE_CHECKING

from phema_dist import schedule
from phema_dist.errors import LayoutError, PhemaError, SettingsError
from phema_dist.profile import UpdateHistory
from phema_dist.storage.manifest import FORMAT, Attempt
from phema_dist.training import ends
from phema_dist.training.layout import Layout, Piece, read_layout, select
from phema_dist.training.ownership import Ownership, agree
from phema_dist.training.policy import Place
from phema_dist.training.settings import Settings, integer
from phema_dist.training.staging import segments
from phema_dist.training.start import Found, check_same_place, look, start, start_from
from phema_dist.training.swap import holds_average
from phema_dist.training.tracker import Tracker
from phema_dist.training.writer import Writer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from phema_dist.ranks import Ranks
    from phema_dist.shard import Box
    from phema_dist.storage.store import Store


def require_same_t(ts: Sequence[int]) -> None:
    """Raise SettingsError unless all ranks are at the same t; `ts` are theirs, by rank."""
    if len(set(ts)) > 1:
        raise SettingsError(
            f"update_ must be called on every rank with the same t; their last ones are {ts}. Snapshots of ranks that "
            "disagree are never complete."
        )


@dataclass(frozen=True)
class Clock:
    """Where the averages stand: time, cadence and history, and the attempt that brought them there."""

    format: int
    sigma_rels: tuple[float, ...]
    origin: int
    t: int
    calls: int
    last_update: int  # from the origin
    updates: tuple[tuple[int, int], ...]
    attempt: int
    token: str


class Session:
    """What one rank needs while training; made by `begin`.

    The averages start at zero and t = 0, or are filled by the caller from `parent`, followed by `restored`.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, ownership: Ownership, settings: Settings, found: Found
    ) -> None:
        self.info, self.parent, self.t = found.info, found.parent, 0
        self.assumed, self.shared = ownership.assumed, ownership.shared
        self._calls, self._settings, self._origin = 0, settings, found.info.origin
        self._model, self._layout = model, layout
        self._shapes = {fqn: info.shape for fqn, info in layout.infos.items()}
        self.segments = segments(ownership.pieces)
        self._pieces = [segment.pieces for segment in self.segments]
        self.tracker = Tracker(self.segments, found.info.sigma_rels)
        self._last_time = 0  # of the last update, from the origin; the averages may have refused it
        self._counted = True  # t is the number of calls
        self._skips: torch.Tensor | None = None  # rounds of `attach` that proved to be no steps, counted on the device
        self._called = False  # since the averages were made, or restored
        self.unseen = 0  # the time up to which the model was trained, and that the averages have not seen
        self._loaded = False  # the averages are those of a training checkpoint, and no update has followed
        self.writer = Writer(
            self.segments, self.tracker, settings.checkpoint_dtype, raises=settings.on_error == "raise"
        )

    @property
    def num_skipped(self) -> int:
        """Rounds of `attach` that `t` counts and that were no steps; waits for the device."""
        return int(self._skips[0]) if self._counted and self._skips is not None else 0

    @property
    def calls(self) -> int:
        """Calls of `update`, also those before a resume."""
        return self._calls

    @property
    def model(self) -> nn.Module:
        """What was passed last."""
        return self._model

    def has(self, fqn: str) -> bool:
        """Whether this rank's model has a tensor of this name."""
        return fqn in self._layout.infos

    def present_time(self, layout: Layout) -> int | None:
        """Time of the averages, if they are there now for a model that lies here as this layout; after `settle`.

        None before the first update of this job, unless a training checkpoint was loaded, and if the last one was
        refused.
        """
        mine, theirs = ({(tensor.info.fqn, tensor.box) for tensor in of.tensors} for of in (self._layout, layout))
        there = self._loaded or self.writer.staged is not None
        return self.tracker.t if there and mine == theirs else None

    def average(self, sigma_rel: float) -> dict[str, list[tuple[Box, torch.Tensor]]]:
        """What this rank owns of a tracked average as it is now, and of buffers; until the next update.

        By tensor, the boxes and their values in host memory, in `average_dtype`.
        """
        owned = self.tracker.boxes()[self.info.sigma_rels.index(sigma_rel)]
        staged = self.writer.staged or repeat(None, len(self.segments))  # else the model's own buffers, as loaded
        for segment, pieces, flat in zip(self.segments, self._pieces, staged, strict=True):
            if not segment.averaged:
                copies = [piece.local().cpu() for piece in pieces] if flat is None else segment.views(flat)
                for piece, values in zip(pieces, copies, strict=True):
                    owned.setdefault(piece.info.fqn, []).append((piece.box, values))
        return owned

    def start(self, place: Place) -> None:
        """Begin to average."""
        self.place = place
        if place.rank == 0 and self.parent is not None:
            self.writer.counts.last_complete = self.parent.t
        self.writer.start(place)

    def restored(self) -> None:
        """Go on from `parent`, whose averages are now in the tracker."""
        assert self.parent is not None  # noqa: S101
        manifest = self.parent.manifests[0]
        self.t, self._calls, self._last_time = manifest.t, manifest.calls, manifest.t - self._origin
        self.tracker.restore(UpdateHistory(manifest.updates))

    def settle(self) -> Clock:
        """Wait until all updates are in the averages, and say where they stand."""
        self._catch_up()
        self.writer.settle()
        attempt = self.place.attempt
        return Clock(
            FORMAT, self.info.sigma_rels, self._origin, self.t - self.num_skipped, self._calls, self._last_time,
            self.tracker.history.knots, attempt.number, attempt.token,
        )  # fmt: skip

    def begin_from(self, clock: Clock, ranks: Ranks) -> Attempt:
        """Collective: a new attempt, which goes on from a training checkpoint."""
        return ranks.on_first(lambda: start_from(self.place.store, clock.t, (clock.attempt, clock.token), ranks.size))

    def go_on_from(self, clock: Clock, attempt: Attempt) -> None:
        """Go on from averages that were put into the tracker, as this attempt."""
        self.t, self._calls, self._last_time, self._called = clock.t, clock.calls, clock.last_update, False
        self._loaded, self.unseen = True, 0
        if self._skips is not None:
            self._skips.zero_()
        self.tracker.restore(UpdateHistory(clock.updates))
        self.place = replace(self.place, attempt=attempt)
        self.writer.go_on(self.place)

    def update(self, model: nn.Module | None, t: int | None, skips: torch.Tensor | None = None) -> None:
        """Count a call, and hand the parameters to the writer if an update is due; on the training thread.

        `skips` are those of `attach`: of rounds that were no steps, known on the device only. They do not count: the
        writer, which learns of them later, takes them off a `t` that was counted.
        """
        now = self.t + 1 if t is None else integer(t)
        if now <= self.t:
            raise SettingsError(
                f"t must grow from call to call: got t={now} at t={self.t}, where the averages are. If you count t, "
                "count before the update. To go on from an earlier moment, make a new PostHocEMA with "
                f"resume={now}, which continues from the newest snapshot at or before that, or load the "
                "training_state that was saved with the model."
            )
        if self.unseen and self.place.rank == 0:
            text = f"the averages saw nothing of t={self.tracker.t + self._origin + 1} to {self.unseen}"
            self.place.warn(now, f"{text}; to go on exactly, load the training_state that was saved with the model")
        self.unseen = 0
        self.t, self._calls, self._counted, self._skips = now, self._calls + 1, t is None, skips
        self._called = True
        time = now - self._origin
        snapshot = self._calls % self._settings.checkpoint_every == 0
        due = self._calls % self._settings.update_every == 0
        if time > 0 and (snapshot or (due and schedule.update_is_due(time, self._last_time))):
            if self._settings.on_busy == "skip" and not snapshot and self.writer.is_busy:
                self.writer.counts.updates_skipped += 1
            else:
                self._hand_over(model, skips, snapshot=snapshot)
        self.writer.check()  # last: an error that is caught leaves nothing undone

    def close(self, timeout: float | None) -> None:
        """Write a last snapshot, and end the threads; see Writer.close."""
        begin = monotonic()
        try:
            self._catch_up(timeout)
        except PhemaError:
            self.writer.close(timeout)
            raise
        self.writer.close(None if timeout is None else max(0.0, begin + timeout - monotonic()))

    def _catch_up(self, timeout: float | None = None) -> None:
        """Where updates may be skipped, make one now, unless the last call did, or the model holds an average.

        Each rank skips for itself, and what they are to store together needs one t.
        """
        if self._settings.on_busy == "skip" and not holds_average(self._model):
            self.take_in(timeout)

    def take_in(self, timeout: float | None = None) -> None:
        """Make an update of the last call now, unless that has made one."""
        if self._called and self.t - self._origin > self._last_time:
            # That the latest step was none does not matter: the parameters are what they are at this t.
            self._hand_over(None, self._skips if self._counted else None, timeout=timeout)

    def _hand_over(
        self,
        model: nn.Module | None,
        skips: torch.Tensor | None,
        *,
        snapshot: bool = False,
        timeout: float | None = None,
    ) -> None:
        pieces = self._pieces_of(model)
        self._layout.check_unchanged()
        self._loaded = False
        self.writer.update(
            pieces, self.t, self._calls, snapshot=snapshot, counted=self._counted, skips=skips, timeout=timeout
        )
        self._last_time = self.t - self._origin

    def _pieces_of(self, model: nn.Module | None) -> list[tuple[Piece, ...]]:
        """The owned pieces in a model that is passed: usually the same one, or the same one less its wrappers."""
        if model is not None and model is not self._model:
            partial = self._settings.only_save_diff
            layout = read_layout(model, among=self._shapes if partial else None, prefix=self._settings.prefix)
            self._layout = layout = select(layout, self._shapes, partial=partial)
            found = {(tensor.info.fqn, tensor.box): tensor for tensor in layout.tensors}
            if not all((piece.info.fqn, piece.source.box) in found for pieces in self._pieces for piece in pieces):
                raise LayoutError("the model must be sharded as the one of the constructor; pass that one, or none.")
            self._pieces = [
                tuple(Piece(found[piece.info.fqn, piece.source.box], piece.box) for piece in pieces)
                for pieces in self._pieces
            ]
            self._model = model
        return self._pieces


def begin(
    store: Store,
    model: nn.Module,
    ranks: Ranks,
    settings: Settings,
    restore: Callable[[Session], None],
    *,
    resume: bool | int,
) -> Session:
    """Collective: agree on who owns what, and begin or continue the run in storage. Errors reach every rank.

    Nothing is written before all ranks have their memory and, if they continue, their averages (by `restore`).
    """
    _check_same_settings(ranks, settings, resume=resume)
    layout = ranks.each(lambda: read_layout(model, only_save_diff=settings.only_save_diff, prefix=settings.prefix))
    ownership = agree(layout, ranks)
    found = ranks.on_first(lambda: look(store, ownership, settings, resume=resume))
    session = ranks.each(lambda: Session(model, layout, ownership, settings, found))
    if found.parent is not None:
        ranks.each(lambda: restore(session))
        session.restored()
    if not isinstance(resume, bool) and resume > session.t:
        session.t = session.unseen = resume  # where the model is; the next update covers what is unseen
    if settings.drain_on_sigterm:
        ranks.each(ends.drain_on_sigterm)
    attempt = ranks.on_first(lambda: start(store, found, ranks.size))
    ranks.each(lambda: check_same_place(store, attempt))
    session.start(
        Place(
            store, attempt, ranks.rank, found.info.sigma_rels, found.info.origin,
            settings.max_checkpoints, settings.checkpoint_every, settings.retention,
        )
    )  # fmt: skip
    return session


def _check_same_settings(ranks: Ranks, settings: Settings, *, resume: bool | int) -> None:
    """Collective: ranks with another cadence or dtype would write snapshots that never become whole."""
    first, *others = ranks.gather({**vars(settings), "prefix": "", "resume": resume})
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise SettingsError(
                    f"{name} must be the same on all ranks; got {value} on rank 0 and {other[name]} on rank {rank}."
                )
