"""One rank's side of a training job: the clock, what is due, and the way from the model to the writer."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import nn

from phema_dist import schedule
from phema_dist.errors import LayoutError, RunError, SettingsError, StorageError
from phema_dist.profile import UpdateHistory, sigma_rel_to_gamma
from phema_dist.storage import run as runs
from phema_dist.storage.manifest import FORMAT, Attempt, RunInfo, TensorFacts, attempt_key, from_json
from phema_dist.storage.snapshot import DTYPE_NAMES, HALF_ULP
from phema_dist.training.layout import Layout, Piece, read_layout, select
from phema_dist.training.ownership import Ownership, agree
from phema_dist.training.policy import Place
from phema_dist.training.staging import segments
from phema_dist.training.tracker import Tracker
from phema_dist.training.writer import Writer

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.storage.run import Snapshot
    from phema_dist.storage.store import Store

_log = logging.getLogger("phema_dist")
DEFAULT_SIGMA_RELS = (0.05, 0.28)
_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Settings:
    """The arguments of PostHocEMA's constructors, checked."""

    max_checkpoints: int = 20
    sigma_rels: tuple[float, ...] | None = None
    update_every: int = 10
    checkpoint_every: int = 1000
    checkpoint_dtype: torch.dtype | None = None
    only_save_diff: bool = False
    update_after_step: int = 0
    t_unit: str = "steps"
    on_error: str = "warn"  # or "raise"
    on_busy: str = "wait"  # or "skip"
    drain_on_sigterm: bool = False
    prefix: str = ""  # this rank's own

    def __post_init__(self) -> None:
        least = {"max_checkpoints": 1, "update_every": 1, "checkpoint_every": 1, "update_after_step": 0}
        for name, smallest in least.items():
            if not isinstance(value := getattr(self, name), int) or value < smallest:
                raise SettingsError(f"{name} must be an integer of at least {smallest}; got {value!r}.")
        for name, known in (("on_error", ("warn", "raise")), ("on_busy", ("wait", "skip"))):
            if (choice := getattr(self, name)) not in known:
                raise SettingsError(f"{name} must be one of {known}; got {choice!r}.")
        if self.sigma_rels is not None:
            if not self.sigma_rels or len(set(self.sigma_rels)) != len(self.sigma_rels):
                raise SettingsError(f"sigma_rels must be one or more different numbers; got {self.sigma_rels}.")
            for sigma_rel in self.sigma_rels:
                sigma_rel_to_gamma(sigma_rel)  # raises ProfileError
        if self.checkpoint_dtype not in {None, *_STORED_DTYPES}:
            names = ", ".join(map(str, _STORED_DTYPES))
            raise SettingsError(f"checkpoint_dtype must be None or one of {names}; got {self.checkpoint_dtype}.")


def _integer(t: int) -> int:
    try:
        return operator.index(t)  # numpy's and torch's integers too
    except TypeError as error:
        raise SettingsError(f"t must be an integer, in steps, samples or whatever grows; got {t!r}.") from error


def check_resume(resume: bool | int) -> bool | int:
    """Raise SettingsError unless it is True, False, or a t."""
    if isinstance(resume, bool):
        return resume
    if _integer(resume) < 0:
        raise SettingsError(f"resume must be True, False, or the t where the model is; got {resume!r}.")
    return _integer(resume)


def require_same_t(ts: Sequence[int]) -> None:
    """Raise SettingsError unless all ranks are at the same t; `ts` are theirs, by rank."""
    if len(set(ts)) > 1:
        raise SettingsError(
            f"update_ must be called on every rank with the same t; their last ones are {ts}. Snapshots of ranks that "
            "disagree are never complete."
        )


@dataclass(frozen=True)
class Found:
    """What rank 0 found in storage: a run to go on with, or what a new one will be."""

    info: RunInfo
    is_new: bool
    parent: Snapshot | None  # the snapshot to go on from
    next_attempt: int


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
        self.assumed = ownership.assumed
        self._calls, self._settings, self._origin = 0, settings, found.info.origin
        self._model, self._layout = model, layout
        self._shapes = {fqn: info.shape for fqn, info in layout.infos.items()}
        self.segments = segments(ownership.pieces)
        self._pieces = [segment.pieces for segment in self.segments]
        self.tracker = Tracker(self.segments, found.info.sigma_rels)
        self._last_time = 0  # of the last update, from the origin; the averages may have refused it
        self._counted = True  # t is the number of calls
        self._skips: torch.Tensor | None = None  # rounds of `attach` that proved to be no steps, counted on the device
        self.writer = Writer(self.segments, self.tracker, settings.checkpoint_dtype)

    @property
    def num_skipped(self) -> int:
        """Rounds of `attach` that `t` counts and that were no steps; waits for the device."""
        return int(self._skips[0]) if self._counted and self._skips is not None else 0

    def start(self, place: Place) -> None:
        """Begin to average."""
        self.place = place
        self.writer.start(place)

    def restored(self) -> None:
        """Go on from `parent`, whose averages are now in the tracker."""
        assert self.parent is not None  # noqa: S101
        manifest = self.parent.manifests[0]
        self.t, self._calls, self._last_time = manifest.t, manifest.calls, manifest.t - self._origin
        self.tracker.restore(UpdateHistory(manifest.updates))

    def settle(self) -> Clock:
        """Wait until all updates are in the averages, and say where they stand."""
        self.writer.settle()
        attempt = self.place.attempt
        return Clock(
            FORMAT, self.info.sigma_rels, self._origin, self.t - self.num_skipped, self._calls, self._last_time,
            self.tracker.history.knots, attempt.number, attempt.token,
        )  # fmt: skip

    def begin_from(self, clock: Clock, ranks: Ranks) -> Attempt:
        """Collective: a new attempt, which goes on from a training checkpoint."""
        return ranks.on_first(lambda: _start_from(self.place.store, clock, ranks.size))

    def go_on_from(self, clock: Clock, attempt: Attempt) -> None:
        """Go on from averages that were put into the tracker, as this attempt."""
        self.t, self._calls, self._last_time = clock.t, clock.calls, clock.last_update
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
        now = self.t + 1 if t is None else _integer(t)
        if now <= self.t:
            raise SettingsError(
                f"t must grow from call to call: got t={now} at t={self.t}, where the averages are. If you count t, "
                "count before the update. To go on from an earlier moment, make a new PostHocEMA with "
                f"resume={now}, which continues from the newest snapshot at or before that, or load the "
                "training_state that was saved with the model."
            )
        self.t, self._calls, self._counted, self._skips = now, self._calls + 1, t is None, skips
        time = now - self._origin
        if time <= 0:
            return
        snapshot = self._calls % self._settings.checkpoint_every == 0
        due = self._calls % self._settings.update_every == 0 and schedule.update_is_due(time, self._last_time)
        if snapshot or due:
            pieces = self._pieces_of(model)
            self._layout.check_unchanged()
            self.writer.update(pieces, now, self._calls, snapshot=snapshot, counted=t is None, skips=skips)
            self._last_time = time

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
    found = ranks.on_first(lambda: _look(store, ownership, settings, resume=resume))
    session = ranks.each(lambda: Session(model, layout, ownership, settings, found))
    if found.parent is not None:
        ranks.each(lambda: restore(session))
        session.restored()
    if not isinstance(resume, bool):  # where the model is; the next update covers what the averages have not seen
        session.t = max(session.t, resume)
    attempt = ranks.on_first(lambda: _start(store, found, ranks.size))
    ranks.each(lambda: _check_same_place(store, attempt))
    session.start(
        Place(
            store, attempt, ranks.rank, found.info.sigma_rels, found.info.origin,
            settings.max_checkpoints, settings.checkpoint_every,
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


def _look(store: Store, ownership: Ownership, settings: Settings, *, resume: bool | int) -> Found:
    """On rank 0: what there is to go on with. Writes nothing."""
    wanted = RunInfo(
        FORMAT,
        version("phema-dist"),
        settings.sigma_rels or DEFAULT_SIGMA_RELS,
        settings.t_unit,
        settings.update_after_step,
        settings.only_save_diff,
        {i.fqn: TensorFacts(i.shape, DTYPE_NAMES[i.dtype], i.kind) for i in ownership.tensors},
        ownership.aliases,
    )
    run = runs.find_run(store)
    if run is None:
        return Found(wanted, is_new=True, parent=None, next_attempt=0)
    newest = run.newest()
    if resume is False:
        state = f"its newest complete snapshot is t={newest.t}" if newest else "without a complete snapshot so far"
        raise RunError(
            f"{store.url} holds a run already, {state}. Pass resume=True to go on with it"
            + (", resume=<t> to go on from an earlier snapshot," if newest else ", delete it,")
            + " or choose another checkpoint_dir."
        )
    check_sigma_rels(store, run.info, settings)
    _check_same_tensors(store, run.info, wanted)
    parent = newest if resume is True else run.newest(resume)
    _tell_what_is_lost(run, parent, resume=resume)
    return Found(run.info, is_new=False, parent=parent, next_attempt=run.next_attempt)


def _tell_what_is_lost(run: runs.Run, parent: Snapshot | None, *, resume: bool | int) -> None:
    """Log what a person who resumes may not expect."""
    url, t = run.store.url, parent.t if parent else 0
    asked = float("inf") if resume is True else resume
    for snapshot in run.snapshots:
        if snapshot.problem and t < snapshot.t <= asked:
            _log.warning("%s: cannot go on from t=%d: %s", url, snapshot.t, snapshot.problem)
    _tell_what_is_hidden(run, t)
    if left := [s.t for s in run.abandoned if s.problem is None and t < s.t <= asked]:
        newest = run.attempts[-1]
        _log.warning(
            "%s: snapshots at t=%s stay hidden, because attempt %d went on from t=%d",
            url, left, newest.number, newest.t,
        )  # fmt: skip
    if parent is not None and (dtype := parent.manifests[0].dtype) != "F32":
        _log.warning(
            "%s: going on from averages that were stored as %s, each rounded by up to %.2g of itself; float32 "
            "snapshots and training_state are exact", url, dtype, HALF_ULP[dtype],
        )  # fmt: skip
    if t < asked < float("inf"):
        start = f"going on from the snapshot at t={t}" if parent else "beginning afresh, there is no earlier snapshot"
        _log.warning(
            "%s: %s; the averages saw nothing of t=%d to %d, unless training_state is loaded", url, start, t + 1, asked
        )


def _start(store: Store, found: Found, world_size: int) -> Attempt:
    """On rank 0: write down that this job goes on with the run, or begins it."""
    if found.is_new:
        runs.create_run(store, found.info)
    parent, t = (found.parent.attempt, found.parent.t) if found.parent else (None, 0)
    return runs.start_attempt(store, world_size, found.next_attempt, parent, t)


def _start_from(store: Store, clock: Clock, world_size: int) -> Attempt:
    """On rank 0: write down that this job goes on from a training checkpoint, and which snapshots led to it."""
    run = runs.open_run(store)
    known = any((a.number, a.token) == (clock.attempt, clock.token) for a in run.attempts)
    if not known and run.complete:
        raise RunError(
            f"training_state must come from this run: {store.url} has complete snapshots up to t={run.complete[-1].t}, "
            "and the attempt that saved the state is not one of its own. Use the run's checkpoint_dir, or an empty one."
        )
    _tell_what_is_hidden(run, clock.t)
    return runs.start_attempt(store, world_size, run.next_attempt, clock.attempt if known else None, clock.t)


def _tell_what_is_hidden(run: runs.Run, t: int) -> None:
    if hidden := [s.t for s in run.complete if s.t > t]:
        _log.warning(
            "%s: going on from t=%d hides the snapshots at t=%s; they are deleted when the run is beyond them",
            run.store.url, t, hidden,
        )  # fmt: skip


def check_sigma_rels(store: Store, info: RunInfo, settings: Settings) -> None:
    """Raise RunError if other sigma_rels are asked for than the run tracks."""
    if settings.sigma_rels is not None and sorted(settings.sigma_rels) != sorted(info.sigma_rels):
        raise RunError(
            f"{store.url} tracks sigma_rels {info.sigma_rels}, which cannot change; got {settings.sigma_rels}. "
            "Leave sigma_rels out, or begin a new run."
        )


def _check_same_tensors(store: Store, info: RunInfo, wanted: RunInfo) -> None:
    odd = [fqn for fqn in info.tensors | wanted.tensors if info.tensors.get(fqn) != wanted.tensors.get(fqn)]
    if odd:
        fqn = odd[0]
        raise RunError(
            f"{store.url} is the run of another model: {len(odd)} tensors differ, the first is {fqn}: "
            f"{_facts(info.tensors, fqn)} in the run, {_facts(wanted.tensors, fqn)} in the model."
        )


def _facts(tensors: Mapping[str, TensorFacts], fqn: str) -> str:
    facts = tensors.get(fqn)
    return "none" if facts is None else f"{facts.kind} {facts.dtype} {list(facts.shape)}"


def _check_same_place(store: Store, attempt: Attempt) -> None:
    """On every rank: what rank 0 has just written must be here too."""
    key = attempt_key(attempt.number)
    try:
        seen = from_json(Attempt, store.get(key), store.describe(key)).token
    except StorageError as error:
        raise StorageError(
            f"every rank must see the same checkpoint_dir; this rank cannot read {store.describe(key)}, which rank 0 "
            f"has just written: {error} Use a shared folder or an object store."
        ) from error
    if seen != attempt.token:
        raise StorageError(
            f"every rank must see the same checkpoint_dir; {store.url} here is not what rank 0 sees. Use a shared "
            "folder or an object store."
        )
