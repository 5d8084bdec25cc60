"""What of a run can go, and the one who removes it when no job does.

A look at the run says what is dead: what nobody will finish, what a newer attempt has gone beyond, what retention does
not keep. What the newest attempt may still be writing is not, nor are pins and the newest complete snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from phema_dist import schedule
from phema_dist.errors import RunError, SettingsError
from phema_dist.storage.manifest import INDEX_NAME
from phema_dist.storage.pins import delete_unpinned
from phema_dist.storage.run import newest_attempt, open_run

if TYPE_CHECKING:
    from phema_dist.storage.run import Known, Run, Snapshot
    from phema_dist.storage.store import Store

_OF_SNAPSHOT = re.compile(r"snapshots/([0-9]{1,18})-a([0-9]{1,9})(/sigma_rel-)?")  # a shard or its folder has all three
_LATER = 2  # complete snapshots of the same attempt, after which nobody finishes an earlier one


@dataclass(frozen=True)
class Garbage:
    """Something to remove: a snapshot, or what a put left that has not ended."""

    key: str  # of the snapshot's folder, or what the put was to write
    why: str
    num_bytes: int | None  # None: the store does not say
    handle: str | None = None  # of the put


def collect_garbage(
    store: Store,
    *,
    keep: int | None = None,
    retention: str = "best",
    abandoned: bool = False,
    dry_run: bool = False,
) -> Iterator[Garbage]:
    """Remove what is dead, one thing after the other, and yield what was removed; a job may write meanwhile.

    Args:
        store: where the run lives.
        keep: how many complete snapshots to keep; None: all of them.
        retention: which ones: "best", those that serve every sigma_rel best, or "last", the newest.
        abandoned: also remove all that is hidden because a newer attempt went on from an earlier t, or from nothing.
        dry_run: remove nothing.

    Raises:
        RunError: there is no run, or it was imported, and nobody knows which are best.
        StorageError: something could not be removed; the rest is as it was.
    """
    if keep is not None and keep < 1:
        raise SettingsError(f"keep must be at least 1; got {keep}.")
    schedule.check_retention(retention)
    known: Known = {}
    done: set[str] = set()
    while True:
        run = open_run(store, known)
        if not run.attempts:
            return
        if keep is not None and retention == "best" and run.info.imported:
            raise RunError(
                f"{store.url} was imported from {run.info.imported.library}, and which of its averages are best is not "
                f"known: retention must be last; got best. Give --retention last, or pin what you want (phema pin)."
            )
        for garbage in chain(_dead_snapshots(run, keep, retention, abandoned=abandoned), _dead_puts(store, run)):
            if (name := garbage.handle or garbage.key) in done:
                continue
            if not dry_run and newest_attempt(store) != run.attempts[-1]:
                break  # somebody goes on with the run, perhaps from here: look again
            done.add(name)
            if dry_run or _remove(store, garbage, known):
                yield garbage
        else:
            return


def partials(run: Run) -> list[Snapshot]:
    """Snapshots that lack a manifest, or what some rank should have given, and that nobody will finish.

    A superseded job stops. And a rank writes its snapshots in order: it has done with what comes before others that are
    complete.
    """
    complete: dict[int, list[int]] = {}  # by attempt
    for snapshot in (*run.snapshots, *run.abandoned):
        if snapshot.problem is None:
            complete.setdefault(snapshot.attempt, []).append(snapshot.t)

    def is_dead(snapshot: Snapshot) -> bool:
        later = sum(t > snapshot.t for t in complete.get(snapshot.attempt, ()))
        return snapshot.attempt < run.attempts[-1].number or later >= _LATER

    # An index is written of what is complete: what has one was harmed, and may be mended.
    candidates = (
        s
        for s in (*run.snapshots, *run.abandoned)
        if s.refused or (s.unfinished and not (s.num_bytes and s.folder in run.indexed))
    )
    return [s for s in candidates if s.t not in run.pins and is_dead(s)]


def left_behind(run: Run, *, abandoned: bool = False) -> list[Snapshot]:
    """Hidden snapshots that a newer attempt has gone beyond with a complete one; or all of them.

    Whole ones of before the run was begun afresh stay: who has lost a training checkpoint may want them back. Where the
    record of an attempt is lost, who went on from where is not known, and nothing is left behind.
    """
    numbers = {attempt.number for attempt in run.attempts}
    if not all(a.parent is None or a.parent in numbers for a in run.attempts):
        return []
    mine = [s.t for s in run.complete if s.attempt == run.attempts[-1].number]
    limit = float("inf") if abandoned else max(mine, default=0)
    hidden = [s for s in run.abandoned if s.attempt in numbers and s.t not in run.pins and s.t <= limit]
    if not abandoned:
        afresh = _begun_afresh(run)
        hidden = [s for s in hidden if s.problem is not None or s.attempt >= afresh]
    if run.newest() is None:  # all that there is to go back to
        whole = [s for s in run.abandoned if s.problem is None]
        hidden = [s for s in hidden if s not in whole[-1:]]
    return hidden


def _begun_afresh(run: Run) -> int:
    """The attempt that the newest one goes back to, which went on from nothing."""
    parents = {attempt.number: attempt.parent for attempt in run.attempts}
    number = run.attempts[-1].number
    while (parent := parents.pop(number, None)) is not None:
        number = parent
    return number


def not_kept(run: Run, keep: int, t: int | None = None, retention: str = "best") -> list[Snapshot]:
    """Complete snapshots beyond the `keep` that this retention chooses; one at `t` counts, complete or not.

    Nothing else counts, so whoever looks at the same snapshots chooses the same ones, now or in another attempt.
    """
    newest, origin = run.newest(), run.info.origin
    if newest is None:
        return []
    ts = {s.t for s in run.complete} | ({t} if t is not None else set())
    kept = schedule.snapshots_to_keep(
        [x - origin for x in ts], run.info.sigma_rels, keep, {x - origin for x in run.pins | {newest.t}}, retention
    )
    return [s for s in run.complete if s.t - origin not in kept]


def dead_puts(run: Run, unfinished: Mapping[str, str]) -> dict[str, str]:
    """Of what `Store.unfinished` tells: what superseded attempts began, and shards of snapshots that are behind us."""
    newest = run.attempts[-1].number
    done = max((s.t for s in run.complete if s.attempt == newest), default=-1)
    dead = {}
    for handle, key in unfinished.items():
        match = _OF_SNAPSHOT.match(key)
        if match and (int(match[2]) < newest or (int(match[2]) == newest and match[3] and int(match[1]) <= done)):
            dead[handle] = key
    return dead


def _dead_snapshots(run: Run, keep: int | None, retention: str, *, abandoned: bool) -> Iterator[Garbage]:
    """What can go, each once, the worthless first."""
    newest = run.attempts[-1]
    given_up = f"hidden: attempt {newest.number} went on from t={newest.t}"
    found = [(s, f"{s.problem}, and nobody will write more of it") for s in partials(run)]
    found += [(s, given_up) for s in left_behind(run, abandoned=abandoned)]
    surplus = not_kept(run, keep, retention=retention) if keep else ()
    found += [(s, f"not one of the {keep} to keep") for s in surplus]
    reasons: dict[str, Garbage] = {}
    for snapshot, why in found:
        reasons.setdefault(snapshot.folder, Garbage(snapshot.folder, why, snapshot.num_bytes))
    yield from reasons.values()


def _dead_puts(store: Store, run: Run) -> Iterator[Garbage]:
    for handle, key in dead_puts(run, store.unfinished()).items():
        yield Garbage(key, "a put that was cut off", None, handle)


def _remove(store: Store, garbage: Garbage, known: Known) -> bool:
    """Remove it, unless it is gone, or pinned, or more than when it was judged: then somebody writes it."""
    if garbage.handle is not None:
        store.discard([garbage.handle])
        return True
    there = {key.removeprefix(f"{garbage.key}/") for key in store.list(garbage.key)}
    files, snapshot = known[garbage.key]
    if not there or not there <= {*files, INDEX_NAME}:
        return False
    return delete_unpinned(store, snapshot)
