"""A run as it lies in storage: its table of contents, and the few writes that begin a run or an attempt.

The listing is the table of contents. A snapshot exists when the manifests of all its ranks do, with the token of its
attempt, and every file that they name has its size. Nobody agrees on that: whoever looks derives it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from phema_dist.errors import KeyExistsError, KeyMissingError, RunError, SnapshotError
from phema_dist.storage.manifest import (
    RUN_KEY,
    Attempt,
    Manifest,
    RunInfo,
    attempt_key,
    from_json,
    manifest_name,
    snapshot_folder,
    to_json,
)

if TYPE_CHECKING:
    from phema_dist.storage.store import Store

_ATTEMPT = re.compile(r"attempts/(\d+)\.json")
_SNAPSHOT = re.compile(r"snapshots/(\d+)-a(\d+)/(.+)")
_MANIFEST = re.compile(r"rank-(\d+)-of-(\d+)\.json")
_PIN = re.compile(r"pins/(\d+)")


@dataclass(frozen=True)
class Snapshot:
    """One t of one attempt. `problem` is None if it is complete, else what is missing, in words."""

    t: int
    attempt: int
    num_bytes: int
    manifests: tuple[Manifest, ...]  # by rank, if complete
    problem: str | None
    unfinished: bool = False  # some rank has not written its manifest

    @property
    def folder(self) -> str:
        """Its place in the run."""
        return snapshot_folder(self.t, self.attempt)


@dataclass(frozen=True)
class Run:
    """A run at one moment; open it again to see later snapshots."""

    store: Store
    info: RunInfo
    attempts: tuple[Attempt, ...]
    snapshots: tuple[Snapshot, ...]  # that the newest attempt builds on, by t; incomplete ones too
    abandoned: tuple[Snapshot, ...]  # of older attempts, later than the t that a newer one continued from
    pins: frozenset[int] = field(default=frozenset())

    @property
    def next_attempt(self) -> int:
        """A number that no attempt had; snapshots count too, as the record of an attempt may be lost."""
        numbers = [a.number for a in self.attempts] + [s.attempt for s in (*self.snapshots, *self.abandoned)]
        return 1 + max(numbers, default=-1)

    @cached_property
    def complete(self) -> tuple[Snapshot, ...]:
        """The complete snapshots, by t."""
        return tuple(s for s in self.snapshots if s.problem is None)

    def newest(self, t: int | None = None) -> Snapshot | None:
        """The newest complete snapshot, at or before t if given."""
        return next((s for s in reversed(self.complete) if t is None or s.t <= t), None)

    def require_newest(self, t: int | None = None) -> Snapshot:
        """The same. Raises SnapshotError if there is none, with the reasons of those that are incomplete."""
        found = self.newest(t)
        if found is None:
            when = "" if t is None else f" at or before t={t}"
            broken = "; ".join(f"t={s.t}: {s.problem}" for s in self.snapshots if s.problem)
            later = f"; the first complete one is t={self.complete[0].t}" if self.complete else ""
            raise SnapshotError(
                f"{self.store.url} has no complete snapshot{when}{later or ' yet'}. "
                + (f"Incomplete: {broken}." if broken else "")
                + ("" if later or broken else "The first is written at the call of update_ number checkpoint_every.")
            )
        return found


Known = dict[str, tuple[dict[str, int], "Snapshot"]]  # folder -> its files and their sizes, and what they are


def open_run(store: Store, known: Known | None = None) -> Run:
    """Read the table of contents of a run.

    Args:
        store: where it lives.
        known: the snapshots that were read before, brought up to date: files never change, so one whose files are the
            same is the same.

    Raises:
        RunError: there is no run, or it cannot be read; names the place.
    """
    return _read_run(store, store.list(), {} if known is None else known)


def read_info(store: Store) -> RunInfo:
    """What is fixed for a run. Raises RunError if there is none."""
    try:
        return from_json(RunInfo, store.get(RUN_KEY), store.describe(RUN_KEY))
    except KeyMissingError as error:
        raise RunError(f"{store.url} must hold a run of phema-dist; there is no {RUN_KEY} in it.") from error


def find_run(store: Store) -> Run | None:
    """The run in a store, or None if there is none."""
    listing = store.list()
    return _read_run(store, listing, {}) if RUN_KEY in listing else None


def create_run(store: Store, info: RunInfo) -> None:
    """Begin a run. Raises RunError if somebody else began one there at the same moment."""
    try:
        store.put(RUN_KEY, to_json(info))
    except KeyExistsError as error:
        raise RunError(f"{store.url} has just become the run of another job; give each job its own folder.") from error


def start_attempt(store: Store, world_size: int, number: int, parent: int | None, t: int) -> Attempt:
    """Begin an attempt that continues attempt `parent` from t, numbered from `number` on; no two starters share one."""
    while True:
        attempt = Attempt(number, parent, t, world_size, secrets.token_hex(8))
        try:
            store.put(attempt_key(number), to_json(attempt))
        except KeyExistsError:
            number += 1
        else:
            return attempt


def newest_attempt(store: Store) -> int:
    """The highest number of an attempt, -1 before the first."""
    found = (_ATTEMPT.fullmatch(key) for key in store.list("attempts"))
    return max((int(match[1]) for match in found if match), default=-1)


def delete_snapshot(store: Store, folder: str) -> None:
    """Remove a snapshot: first what makes it exist, then its data, so that it never looks whole and is not."""
    keys = list(store.list(folder))
    documents = [key for key in keys if key.endswith(".json")]
    store.delete(sorted(documents))  # index.json before rank-*.json
    store.delete(set(keys) - set(documents))


def _read_run(store: Store, listing: Mapping[str, int], known: Known) -> Run:
    if RUN_KEY not in listing:
        raise RunError(f"{store.url} must hold a run of phema-dist; there is no {RUN_KEY} in it.")
    files: dict[str, dict[str, int]] = {}
    for key, num_bytes in listing.items():
        if match := _SNAPSHOT.fullmatch(key):
            files.setdefault(snapshot_folder(int(match[1]), int(match[2])), {})[match[3]] = num_bytes
    for folder in [folder for folder in known if known[folder][0] != files.get(folder)]:
        del known[folder]
    numbers = [key for key in listing if _ATTEMPT.fullmatch(key)]
    manifests = [
        f"{folder}/{name}" for folder in files.keys() - known for name in files[folder] if _MANIFEST.fullmatch(name)
    ]
    texts = store.get_many([RUN_KEY, *numbers, *manifests])
    info = from_json(RunInfo, texts[RUN_KEY], store.describe(RUN_KEY))
    attempts = [from_json(Attempt, texts[key], store.describe(key)) for key in numbers]
    by_number = {attempt.number: attempt for attempt in attempts}
    for folder in files.keys() - known:
        known[folder] = files[folder], _read_snapshot(store, folder, files[folder], texts, by_number)
    found = sorted((snapshot for _, snapshot in known.values()), key=lambda s: (s.t, s.attempt))
    limits = _visible_until(by_number)
    return Run(
        store,
        info,
        tuple(sorted(attempts, key=lambda attempt: attempt.number)),
        tuple(s for s in found if s.t <= limits.get(s.attempt, -1)),
        tuple(s for s in found if s.t > limits.get(s.attempt, -1)),
        frozenset(int(match[1]) for key in listing if (match := _PIN.fullmatch(key))),
    )


def _read_snapshot(
    store: Store, folder: str, sizes: Mapping[str, int], texts: Mapping[str, bytes], attempts: Mapping[int, Attempt]
) -> Snapshot:
    t, number = map(int, folder.removeprefix("snapshots/").split("-a"))
    num_bytes, attempt = sum(sizes.values()), attempts.get(number)
    if attempt is None:
        return Snapshot(t, number, num_bytes, (), "its attempt is not recorded")
    names = [manifest_name(rank, attempt.world_size) for rank in range(attempt.world_size)]
    missing = [rank for rank, name in enumerate(names) if name not in sizes]
    if missing:
        problem = f"manifests of {_ranks(missing)} of {attempt.world_size} are missing"
        return Snapshot(t, number, num_bytes, (), problem, unfinished=True)
    try:
        return Snapshot(t, number, num_bytes, _read_manifests(store, folder, names, sizes, texts, attempt), None)
    except RunError as error:
        return Snapshot(t, number, num_bytes, (), str(error))


def _read_manifests(
    store: Store,
    folder: str,
    names: Sequence[str],
    sizes: Mapping[str, int],
    texts: Mapping[str, bytes],
    attempt: Attempt,
) -> tuple[Manifest, ...]:
    manifests = tuple(
        from_json(Manifest, texts[f"{folder}/{name}"], store.describe(f"{folder}/{name}")) for name in names
    )
    for rank, manifest in enumerate(manifests):
        if (manifest.token, manifest.rank, snapshot_folder(manifest.t, manifest.attempt)) != (
            attempt.token,
            rank,
            folder,
        ):
            raise SnapshotError(f"the manifest of rank {rank} was written by another job")
        if manifest.refused is not None:
            raise SnapshotError(f"rank {rank} had nothing to give: {manifest.refused}")
        for file in manifest.files:
            expected, found = file.header_bytes + file.data_bytes, sizes.get(file.name)
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
                raise SnapshotError(f"{file.name} of rank {rank} {state}")
    return manifests


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")  # noqa: PLR2004
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _visible_until(attempts: Mapping[int, Attempt]) -> dict[int, float]:
    """For the newest attempt and those it builds on: up to which t their snapshots belong to the run."""
    limits: dict[int, float] = {}
    number, limit = max(attempts, default=None), float("inf")
    while number is not None and number in attempts and number not in limits:
        limits[number] = limit
        limit = min(limit, attempts[number].t)
        number = attempts[number].parent
    return limits
