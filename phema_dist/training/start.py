"""How a job starts on a run: what it finds in storage, what it goes on from, and what it writes down of that."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phema_dist import __version__
from phema_dist.errors import RunError, StorageError
from phema_dist.storage import run as runs
from phema_dist.storage.manifest import FORMAT, Attempt, RunInfo, TensorFacts, attempt_key, from_json
from phema_dist.storage.snapshot import DTYPE_NAMES, HALF_ULP
from phema_dist.training.settings import DEFAULT_SIGMA_RELS, Settings

if TYPE_CHECKING:
    from phema_dist.storage.run import Snapshot
    from phema_dist.storage.store import Store
    from phema_dist.training.ownership import Ownership

_log = logging.getLogger("phema_dist")


@dataclass(frozen=True)
class Found:
    """What rank 0 found in storage: a run to go on with, or what a new one will be."""

    info: RunInfo
    is_new: bool
    parent: Snapshot | None  # the snapshot to go on from
    next_attempt: int


def look(store: Store, ownership: Ownership, settings: Settings, *, resume: bool | int) -> Found:
    """On rank 0: what there is to go on with. Writes nothing."""
    wanted = RunInfo(
        FORMAT,
        __version__,
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
    if run.info.imported:
        raise RunError(
            f"{store.url} was imported from {run.info.imported.library}, whose averages have other profiles: it can be "
            "read, and nothing can go on with it. Choose another checkpoint_dir; both runs can be synthesized from."
        )
    newest = run.newest()
    if resume is False:
        state = f"its newest complete snapshot is t={newest.t}" if newest else "without a complete snapshot so far"
        raise RunError(
            f"{store.url} holds a run already, {state}. Pass resume=True to go on with it"
            + (", resume=<step of your model's own checkpoint> if it is not there," if newest else ", delete it,")
            + " or choose another checkpoint_dir."
        )
    check_sigma_rels(store, run.info, settings)
    _check_same_time(store, run.info, settings)
    _check_same_tensors(store, run.info, wanted)
    _check_attempts(run)
    parent = newest if resume is True else run.newest(resume)
    _tell_what_is_lost(run, parent, resume=resume)
    return Found(run.info, is_new=False, parent=parent, next_attempt=run.next_attempt)


def _check_attempts(run: runs.Run) -> None:
    """Raise RunError if snapshots have lost the record of their attempt: to go on would hide them for ever."""
    recorded = {attempt.number for attempt in run.attempts}
    lost = [s for s in (*run.snapshots, *run.abandoned) if s.attempt not in recorded]
    if lost:
        key = attempt_key(lost[0].attempt)
        raise RunError(
            f"{run.store.describe(key)} is gone, the record of the attempt that wrote {len(lost)} snapshots, up to "
            f"t={max(s.t for s in lost)}. Put it back, or delete those snapshots, or choose another checkpoint_dir."
        )


def _tell_what_is_lost(run: runs.Run, parent: Snapshot | None, *, resume: bool | int) -> None:
    """Log what a person who resumes may not expect. With an integer, training_state may be loaded next."""
    url, t = run.store.url, parent.t if parent else 0
    if parent is not None:
        _log.info("%s: going on from t=%d of attempt %d", url, t, parent.attempt)
        _tell_what_is_hidden(run, t)
    elif resume is True and run.attempts:
        _log.warning("%s: nothing complete to go on from is there; averaging begins afresh", url)
    elif run.attempts:
        hidden = ", ".join(str(s.t) for s in run.complete)
        _log.log(
            logging.WARNING if hidden and resume == 0 else logging.INFO,
            "%s: resume=%d: averaging begins afresh%s", url, resume,
            f"; the snapshots of before (t={hidden}) are hidden, until `phema gc --abandoned` deletes them"
            if hidden else "",
        )  # fmt: skip
    asked = float("inf") if resume is True else resume
    for snapshot in run.snapshots:
        if snapshot.problem and t < snapshot.t <= asked:
            _log.warning("%s: cannot go on from t=%d: %s", url, snapshot.t, snapshot.problem)
    if left := [s.t for s in run.abandoned if s.problem is None and t < s.t <= asked]:
        newest = run.attempts[-1]
        _log.warning(
            "%s: snapshots at t=%s stay hidden, because attempt %d went on from t=%d",
            url, left, newest.number, newest.t,
        )  # fmt: skip
    if parent is not None and (dtype := parent.manifests[0].dtype) != "F32":
        _log.log(
            logging.WARNING if resume is True else logging.INFO,
            "%s: going on from averages that were stored as %s, each rounded by up to %.2g of itself, unless "
            "training_state is loaded; float32 snapshots are exact, too", url, dtype, HALF_ULP[dtype],
        )  # fmt: skip
    if t < asked < float("inf"):
        _log.info("%s: the averages saw nothing of t=%d to %d, unless training_state is loaded", url, t + 1, asked)


def start(store: Store, found: Found, world_size: int) -> Attempt:
    """On rank 0: write down that this job goes on with the run, or begins it."""
    if found.is_new:
        runs.create_run(store, found.info)
    parent, t = (found.parent.attempt, found.parent.t) if found.parent else (None, 0)
    attempt = runs.start_attempt(store, world_size, found.next_attempt, parent, t)
    tracked = ", ".join(f"{s:g}" for s in found.info.sigma_rels)
    _log.info(
        "%s: attempt %d begins at t=%d on %d ranks; %d tensors, sigma_rels %s",
        store.url, attempt.number, t, world_size, len(found.info.tensors), tracked,
    )  # fmt: skip
    return attempt


def start_from(store: Store, t: int, saved_by: tuple[int, str], world_size: int) -> Attempt:
    """On rank 0: write down that this job goes on at t from a training checkpoint, and which snapshots led to it.

    `saved_by` is the number and the token of the attempt that saved the checkpoint.
    """
    run = runs.open_run(store)
    known = saved_by in [(a.number, a.token) for a in run.attempts]
    if not known and run.complete:
        raise RunError(
            f"training_state must come from this run: {store.url} has complete snapshots up to t={run.complete[-1].t}, "
            "and the attempt that saved the state is not one of its own. Use the run's checkpoint_dir, or an empty one."
        )
    _tell_what_is_hidden(run, t)
    attempt = runs.start_attempt(store, world_size, run.next_attempt, saved_by[0] if known else None, t)
    _log.info(
        "%s: attempt %d goes on from training_state, bit for bit, at t=%d on %d ranks",
        store.url, attempt.number, t, world_size,
    )  # fmt: skip
    return attempt


def _tell_what_is_hidden(run: runs.Run, t: int) -> None:
    if hidden := [s.t for s in run.complete if s.t > t]:
        _log.info(
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


def _check_same_time(store: Store, info: RunInfo, settings: Settings) -> None:
    """Raise RunError if t is to count something else, or from elsewhere; what is still the default was not chosen."""
    for name, has in {"t_unit": info.t_unit, "update_after_step": info.origin}.items():
        if (given := getattr(settings, name)) not in {has, getattr(Settings, name)}:
            raise RunError(
                f"{store.url} has {name} {has!r}, which cannot change; got {given!r}. Leave {name} out, if t still "
                "counts the same, or begin a new run."
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


def check_same_place(store: Store, attempt: Attempt) -> None:
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
