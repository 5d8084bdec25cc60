"""A run as it lies in storage: its table of contents, and the few writes that begin a run or an attempt.

The listing is the table of contents. A snapshot exists when the manifests of all its ranks do, with the token of its
attempt, and every file that they name has its size. Nobody agrees on that: whoever looks derives it.

An index holds the manifests of a whole snapshot once more, in one object, so that a big run opens quickly. It is never
believed against them: where it does not fit, they are read.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING

from phema_dist.errors import KeyExistsError, KeyMissingError, RunError, SnapshotError
from phema_dist.storage.manifest import (
    AVERAGED_DTYPES,
    FORMAT,
    INDEX_NAME,
    PARAMETER,
    RUN_KEY,
    Attempt,
    Index,
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

_log = logging.getLogger("phema_dist")
_ATTEMPT = re.compile(r"attempts/(\d+)\.json")
_SNAPSHOT = re.compile(r"(\d+)-a(\d+)")
_PIN = re.compile(r"pins/(\d+)")


@dataclass(frozen=True)
class Snapshot:
    """One t of one attempt. `problem` is None if it is complete, else what is missing, in words."""

    t: int
    attempt: int
    num_bytes: int  # of its shards and manifests
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
    indexed: frozenset[str] = field(default=frozenset())  # folders of snapshots that have an index

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


# Folder -> its files and their sizes, without the index, which comes later, and what they are.
Known = dict[str, tuple[dict[str, int], "Snapshot"]]


def open_run(store: Store, known: Known | None = None) -> Run:
    """Read the table of contents of a run.

    Args:
        store: where it lives.
        known: the snapshots that were read before, brought up to date: files never change, so one whose files are the
            same is the same.

    Raises:
        RunError: there is no run, or it cannot be read; names the place.
    """
    run = find_run(store, known)
    if run is None:
        raise RunError(f"{store.url} must hold a run of phema-dist; there is no {RUN_KEY} in it.")
    return run


def find_run(store: Store, known: Known | None = None) -> Run | None:
    """The run in a store, as open_run reads it, or None if there is none."""
    known = {} if known is None else known
    try:
        return _read_run(store, store.list(), known)
    except KeyMissingError:  # retention of a job that writes has deleted a snapshot meanwhile
        return _read_run(store, store.list(), known)


def load_snapshots(store: Store, folders: Iterable[str]) -> dict[str, Snapshot]:
    """Read some snapshots, by folder, without listing the run: for one who was told of them by who did.

    The sizes of their files are not looked at.

    Raises:
        SnapshotError: what is there is no complete snapshot; says why.
        KeyMissingError: something of it is gone; names it.
    """
    wanted = {folder: _t_and_attempt(folder) for folder in folders}
    records = store.get_many({attempt_key(number) for _, number in wanted.values()})
    attempts = {attempt.number: attempt for attempt in _parse_attempts(store, records)}
    whole = {folder: attempts[number] for folder, (_, number) in wanted.items()}
    indexes = store.get_many((f"{folder}/{INDEX_NAME}" for folder in whole), absent_ok=True)
    snapshots = {}
    for folder, manifests in _read_manifests(store, whole, indexes, {}).items():
        if isinstance(manifests, str):
            raise SnapshotError(f"{store.describe(folder)}: {manifests}.")
        num_bytes = sum(file.header_bytes + file.data_bytes for manifest in manifests for file in manifest.files)
        snapshots[folder] = Snapshot(*wanted[folder], num_bytes, manifests, None)
    return snapshots


def read_info(store: Store) -> RunInfo:
    """What is fixed for a run. Raises RunError if there is none."""
    try:
        return _parse_info(store, store.get(RUN_KEY))
    except KeyMissingError as error:
        raise RunError(f"{store.url} must hold a run of phema-dist; there is no {RUN_KEY} in it.") from error


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


def write_index(store: Store, snapshot: Snapshot) -> None:
    """Join the manifests of a complete snapshot in one object; one that is there already stays."""
    with contextlib.suppress(KeyExistsError):
        store.put(f"{snapshot.folder}/{INDEX_NAME}", to_json(Index(FORMAT, snapshot.manifests)))


def delete_snapshot(store: Store, folder: str) -> None:
    """Remove a snapshot: first what makes it exist, then its data, so that it never looks whole and is not."""
    keys = store.list(folder).keys()
    index = keys & {f"{folder}/{INDEX_NAME}"}
    documents = {key for key in keys if key.endswith(".json")} - index
    store.delete(index)
    store.delete(sorted(documents))
    store.delete(keys - documents - index)


def _read_run(store: Store, listing: Mapping[str, int], known: Known) -> Run | None:
    if RUN_KEY not in listing:
        return None
    files = _files_by_folder(listing)
    indexed = frozenset(folder for folder, sizes in files.items() if sizes.pop(INDEX_NAME, None) is not None)
    for folder in [folder for folder in known if known[folder][0] != files.get(folder)]:
        del known[folder]
    new = files.keys() - known
    others = [key for key in listing if not key.startswith("snapshots/")]
    numbers = [key for key in others if _ATTEMPT.fullmatch(key)]
    texts = store.get_many([RUN_KEY, *numbers, *(f"{folder}/{INDEX_NAME}" for folder in new & indexed)])
    info = _parse_info(store, texts[RUN_KEY])
    attempts = _parse_attempts(store, {key: texts[key] for key in numbers})
    by_number = {attempt.number: attempt for attempt in attempts}
    known |= _read_snapshots(store, {folder: files[folder] for folder in new}, texts, by_number)
    found = sorted((snapshot for _, snapshot in known.values()), key=lambda s: (s.t, s.attempt))
    limits = _visible_until(by_number)
    return Run(
        store,
        info,
        tuple(sorted(attempts, key=lambda attempt: attempt.number)),
        tuple(s for s in found if s.t <= limits.get(s.attempt, -1)),
        tuple(s for s in found if s.t > limits.get(s.attempt, -1)),
        frozenset(int(match[1]) for key in others if (match := _PIN.fullmatch(key))),
        indexed,
    )


def _parse_info(store: Store, text: bytes) -> RunInfo:
    info, where = from_json(RunInfo, text, store.describe(RUN_KEY)), store.describe(RUN_KEY)
    for fqn, facts in info.tensors.items():
        if facts.kind == PARAMETER and facts.dtype not in AVERAGED_DTYPES:
            raise RunError(f"{where}: {fqn} is a parameter of dtype {facts.dtype}, which cannot be averaged.")
    for alias, fqn in info.aliases.items():
        if fqn not in info.tensors:
            raise RunError(f"{where}: {alias} is to be the same as {fqn}, which is no tensor of the run.")
    return info


def _parse_attempts(store: Store, texts: Mapping[str, bytes]) -> list[Attempt]:
    attempts = {key: from_json(Attempt, text, store.describe(key)) for key, text in texts.items()}
    for key, attempt in attempts.items():
        if attempt_key(attempt.number) != key:
            raise RunError(f"{store.describe(key)} is the record of another attempt, {attempt.number}.")
    return list(attempts.values())


def _files_by_folder(listing: Mapping[str, int]) -> dict[str, dict[str, int]]:
    names: dict[str, dict[str, int]] = {}
    for key, num_bytes in listing.items():
        top, _, below = key.partition("/")
        folder, _, name = below.partition("/")
        if top == "snapshots" and name:
            names.setdefault(folder, {})[name] = num_bytes
    matches = ((_SNAPSHOT.fullmatch(folder), sizes) for folder, sizes in names.items())
    return {snapshot_folder(int(match[1]), int(match[2])): sizes for match, sizes in matches if match}


def _read_snapshots(
    store: Store, files: Mapping[str, dict[str, int]], indexes: Mapping[str, bytes], attempts: Mapping[int, Attempt]
) -> Known:
    found: Known = {}
    whole: dict[str, Attempt] = {}
    for folder, sizes in files.items():
        t, number = _t_and_attempt(folder)
        num_bytes, attempt = sum(sizes.values()), attempts.get(number)
        if attempt is None:
            found[folder] = sizes, Snapshot(t, number, num_bytes, (), "its attempt is not recorded")
            continue
        missing = [rank for rank, name in enumerate(_manifest_names(attempt.world_size)) if name not in sizes]
        if missing:
            problem = f"manifests of {_ranks(missing)} of {attempt.world_size} are missing"
            found[folder] = sizes, Snapshot(t, number, num_bytes, (), problem, unfinished=True)
            continue
        whole[folder] = attempt
    for folder, manifests in _read_manifests(store, whole, indexes, files).items():
        t, number = _t_and_attempt(folder)
        facts = t, number, sum(files[folder].values())
        if isinstance(manifests, str):
            found[folder] = files[folder], Snapshot(*facts, (), manifests)
        else:
            found[folder] = files[folder], Snapshot(*facts, manifests, None)
    return found


def _read_manifests(
    store: Store,
    attempts: Mapping[str, Attempt],
    indexes: Mapping[str, bytes],
    sizes: Mapping[str, Mapping[str, int]],
) -> dict[str, tuple[Manifest, ...] | str]:
    """The manifests of whole snapshots, or in words what is wrong: from an index that fits, else one by one."""
    found: dict[str, tuple[Manifest, ...] | str] = {}
    doubts: dict[str, str] = {}
    for folder, attempt in attempts.items():
        key = f"{folder}/{INDEX_NAME}"
        if key in indexes:
            try:
                manifests = from_json(Index, indexes[key], store.describe(key)).manifests
                _check_manifests(manifests, folder, attempt, sizes.get(folder))
                found[folder] = manifests
            except RunError as error:
                doubts[folder] = str(error)
    keys = {
        folder: [f"{folder}/{n}" for n in _manifest_names(a.world_size)]
        for folder, a in attempts.items()
        if folder not in found
    }
    texts = store.get_many(key for each in keys.values() for key in each)
    for folder, names in keys.items():
        try:
            manifests = tuple(from_json(Manifest, texts[key], store.describe(key)) for key in names)
            _check_manifests(manifests, folder, attempts[folder], sizes.get(folder))
            found[folder] = manifests
        except RunError as error:
            found[folder] = str(error)
            continue
        if folder in doubts:
            _log.warning("%s: its index is not used, but its manifests, one by one: %s", folder, doubts[folder])
    return found


def _check_manifests(
    manifests: Sequence[Manifest], folder: str, attempt: Attempt, sizes: Mapping[str, int] | None
) -> None:
    if len(manifests) != attempt.world_size:
        raise SnapshotError(f"{len(manifests)} manifests instead of {attempt.world_size}")
    t_and_attempt = _t_and_attempt(folder)
    for rank, manifest in enumerate(manifests):
        if (manifest.token, manifest.rank, manifest.t, manifest.attempt) != (attempt.token, rank, *t_and_attempt):
            raise SnapshotError(f"the manifest of rank {rank} was written by another job")
        if manifest.refused is not None:
            raise SnapshotError(f"rank {rank} had nothing to give: {manifest.refused}")
        for file in manifest.files:
            num_blocks = -(-file.data_bytes // manifests[0].block_bytes)
            if len(file.checksums) != 1 + num_blocks:
                state = f"has {len(file.checksums)} checksums instead of {1 + num_blocks}"
                raise SnapshotError(f"{file.name} of rank {rank} {state}")
            expected = file.header_bytes + file.data_bytes
            found = expected if sizes is None else sizes.get(file.name)
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
                raise SnapshotError(f"{file.name} of rank {rank} {state}")


@cache
def _manifest_names(world_size: int) -> tuple[str, ...]:
    return tuple(manifest_name(rank, world_size) for rank in range(world_size))


def _t_and_attempt(folder: str) -> tuple[int, int]:
    match = _SNAPSHOT.fullmatch(folder.removeprefix("snapshots/"))
    if match is None:
        raise SnapshotError(f"a snapshot's folder is like {snapshot_folder(1000, 0)}; got {folder!r}.")
    return int(match[1]), int(match[2])


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
