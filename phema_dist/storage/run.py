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
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING

from phema_dist.errors import KeyExistsError, KeyMissingError, LayoutError, RunError, SettingsError, SnapshotError
from phema_dist.profile import MAX_SIGMA_REL, Array, UpdateHistory
from phema_dist.storage.completeness import (
    SNAPSHOT,
    Bounds,
    Refused,
    check_size,
    index_batches,
    manifest_names,
    read_snapshots,
    t_and_attempt,
)
from phema_dist.storage.key import checked
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
    snapshot_folder,
    to_json,
)

if TYPE_CHECKING:
    from phema_dist.storage.store import Store

_log = logging.getLogger("phema_dist")
# Names as this library gives them, of numbers that are not absurd; whatever else lies in the bucket is not of the run.
_ATTEMPT = re.compile(r"attempts/(0|[1-9][0-9]{0,15})\.json")
_PIN = re.compile(r"pins/([0-9]{1,16})")
# Bytes of a document, before it is read: what is larger is none. Parsed, it may take 20 times that, a real one 5 times.
_LARGEST_INFO = 32 << 20  # of 200 000 tensors
_LARGEST_ATTEMPT = 64 << 10
_LOOKS = 5  # at a run that changes while we look
_MOST_ATTEMPTS = 100_000
_MOST_SIGMA_RELS = 64
_LEAST_SIGMA_REL = 1e-9
_MOST_NAMED = 8


@dataclass(frozen=True)
class Snapshot:
    """One t of one attempt. `problem` is None if it is complete, else what is missing, in words."""

    t: int
    attempt: int
    num_bytes: int  # of its shards and manifests
    manifests: tuple[Manifest, ...]  # by rank, if complete
    problem: str | None
    unfinished: bool = False  # some rank has not written its manifest
    refused: bool = False  # some rank has written that it had nothing to give

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
    indexed: Mapping[str, int] = field(default_factory=dict)  # folders of snapshots that have an index, and its bytes

    @property
    def next_attempt(self) -> int:
        """A number that no attempt had; snapshots count too, as the record of an attempt may be lost."""
        numbers = [a.number for a in self.attempts] + [s.attempt for s in (*self.snapshots, *self.abandoned)]
        return 1 + max(numbers, default=-1)

    @cached_property
    def complete(self) -> tuple[Snapshot, ...]:
        """The complete snapshots, by t."""
        return tuple(s for s in self.snapshots if s.problem is None)

    @cached_property
    def update_times(self) -> Array:
        """Of all updates up to the newest complete snapshot, counted from the origin."""
        return UpdateHistory(self.complete[-1].manifests[0].updates).times()

    def newest(self, t: int | None = None) -> Snapshot | None:
        """The newest complete snapshot, at or before t if given."""
        return next((s for s in reversed(self.complete) if t is None or s.t <= t), None)

    def require_newest(self, t: int | None = None) -> Snapshot:
        """The same. Raises SnapshotError if there is none, with the reasons of those that are incomplete."""
        found = self.newest(t)
        if found is None:
            when = "" if t is None else f" at or before t={t}"
            all_broken = [f"t={s.t}: {s.problem}" for s in self.snapshots if s.problem]
            more = f"; and {len(all_broken) - _MOST_NAMED} more" if len(all_broken) > _MOST_NAMED else ""
            broken = "; ".join(all_broken[:_MOST_NAMED]) + more
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
    for looks_left in reversed(range(_LOOKS)):
        try:
            return _read_run(store, store.list(), known)
        except KeyMissingError:  # a job or `phema gc` has deleted a snapshot meanwhile
            if not looks_left:
                raise
    raise AssertionError


def load_snapshots(store: Store, folders: Iterable[str]) -> dict[str, Snapshot]:
    """Read some snapshots, by folder, without listing the run: for one who was told of them by who did.

    The sizes of their files are not looked at.

    Raises:
        SnapshotError: what is there is no complete snapshot; says why.
        KeyMissingError: something of it is gone; names it.
    """
    wanted = {folder: t_and_attempt(folder) for folder in folders}
    records = store.get_many({RUN_KEY, *(attempt_key(number) for _, number in wanted.values())})
    bounds = Bounds.of(_parse_info(store, records.pop(RUN_KEY)))
    attempts = {attempt.number: attempt for attempt in _parse_attempts(store, records)}
    whole = {folder: attempts[number] for folder, (_, number) in wanted.items()}
    indexes = store.get_many((f"{folder}/{INDEX_NAME}" for folder in whole), absent_ok=True)
    found = read_snapshots(store, whole, [indexes], {}, bounds, {})
    snapshots = {}
    for folder in whole:
        manifests = found[folder]
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
    """Begin a run.

    Raises:
        LayoutError: nobody could read it again, as for a name that is no text.
        RunError: somebody else began one there at the same moment.
    """
    text = to_json(info)
    try:
        check_size(store, RUN_KEY, len(text), _LARGEST_INFO)
        _parse_info(store, text)
    except RunError as error:
        raise LayoutError(f"this model cannot be stored so that it is read again: {error}") from error
    try:
        store.put(RUN_KEY, text)
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


def newest_attempt(store: Store) -> Attempt | None:
    """The attempt with the highest number, None before the first."""
    sizes = store.list("attempts")
    number = max((int(match[1]) for match in map(_ATTEMPT.fullmatch, sizes) if match), default=None)
    if number is None:
        return None
    key = attempt_key(number)
    check_size(store, key, sizes[key], _LARGEST_ATTEMPT)
    (attempt,) = _parse_attempts(store, {key: store.get(key)})
    return attempt


def write_index(store: Store, snapshot: Snapshot) -> None:
    """Join the manifests of a complete snapshot in one object; one that is there already stays."""
    with contextlib.suppress(KeyExistsError):
        store.put(f"{snapshot.folder}/{INDEX_NAME}", to_json(Index(FORMAT, snapshot.manifests)))


def delete_snapshot(store: Store, folder: str) -> None:
    """Remove a snapshot: first what makes it exist, then its data, so that it never looks whole and is not."""
    keys = {key for key in store.list(folder) if _is_key(key)}
    index = keys & {f"{folder}/{INDEX_NAME}"}
    documents = {key for key in keys if key.endswith(".json")} - index
    store.delete(index)
    store.delete(sorted(documents))
    store.delete(keys - documents - index)


def pins_among(keys: Iterable[str]) -> frozenset[int]:
    """Each t that one of these keys pins."""
    return frozenset(int(match[1]) for key in keys if (match := _PIN.fullmatch(key)))


def _is_key(key: str) -> bool:
    """Whether a store takes it: a bucket may hold others, that nobody can delete through it."""
    try:
        return bool(checked(key))
    except SettingsError:
        return False


def _read_run(store: Store, listing: Mapping[str, int], known: Known) -> Run | None:
    if RUN_KEY not in listing:
        return None
    files = _files_by_folder(listing)
    indexed = {folder: size for folder, sizes in files.items() if (size := sizes.pop(INDEX_NAME, None)) is not None}
    for folder in [folder for folder in known if known[folder][0] != files.get(folder)]:
        del known[folder]
    new = {folder: sizes for folder, sizes in files.items() if folder not in known}
    others = [key for key in listing if not key.startswith("snapshots/")]
    numbers = [key for key in others if _ATTEMPT.fullmatch(key)]
    if len(numbers) > _MOST_ATTEMPTS:
        raise RunError(
            f"{store.url} must have at most {_MOST_ATTEMPTS} attempts; it has {len(numbers)}. Delete those that no "
            "snapshot is of."
        )
    check_size(store, RUN_KEY, listing[RUN_KEY], _LARGEST_INFO)
    for key in numbers:
        check_size(store, key, listing[key], _LARGEST_ATTEMPT)
    index_keys, doubts = index_batches(store, {folder: indexed[folder] for folder in new.keys() & indexed.keys()})
    texts = store.get_many([RUN_KEY, *numbers, *next(index_keys, [])])  # in one go what is mostly all there is
    info = _parse_info(store, texts.pop(RUN_KEY))
    attempts = _parse_attempts(store, {key: texts.pop(key) for key in numbers})
    by_number = {attempt.number: attempt for attempt in attempts}
    read, whole = _look_for_manifests(new, by_number)
    indexes = chain([texts], map(store.get_many, index_keys))
    for folder, manifests in read_snapshots(store, whole, indexes, new, Bounds.of(info), doubts).items():
        read[folder] = _snapshot(folder, sum(new[folder].values()), manifests)
    known |= {folder: (new[folder], snapshot) for folder, snapshot in read.items()}
    snapshots = sorted((snapshot for _, snapshot in known.values()), key=lambda s: (s.t, s.attempt))
    limits = _visible_until(by_number)
    return Run(
        store,
        info,
        tuple(sorted(attempts, key=lambda attempt: attempt.number)),
        tuple(s for s in snapshots if s.t <= limits.get(s.attempt, -1)),
        tuple(s for s in snapshots if s.t > limits.get(s.attempt, -1)),
        pins_among(others),
        indexed,
    )


def _snapshot(folder: str, num_bytes: int, manifests: tuple[Manifest, ...] | str) -> Snapshot:
    whole, problem = ((), manifests) if isinstance(manifests, str) else (manifests, None)
    return Snapshot(*t_and_attempt(folder), num_bytes, whole, problem, refused=isinstance(manifests, Refused))


def _parse_info(store: Store, text: bytes) -> RunInfo:
    info, where = from_json(RunInfo, text, store.describe(RUN_KEY)), store.describe(RUN_KEY)
    rels = info.sigma_rels
    possible = all(_LEAST_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL * (1 + 1e-12) for sigma_rel in rels)
    if not possible or len({*rels}) < len(rels) or len(rels) > _MOST_SIGMA_RELS:
        raise RunError(
            f"{where}: sigma_rels must be at most {_MOST_SIGMA_RELS} different numbers in (0, 0.28867]; found "
            f"{str(rels)[:100]}."
        )
    for fqn, facts in info.tensors.items():
        if facts.kind == PARAMETER and facts.dtype not in AVERAGED_DTYPES:
            raise RunError(f"{where}: {fqn} is a parameter of dtype {facts.dtype}, which cannot be averaged.")
    for alias, fqn in info.aliases.items():
        if fqn not in info.tensors:
            raise RunError(f"{where}: {alias} is to be the same as {fqn}, which is no tensor of the run.")
        if alias in info.tensors:
            raise RunError(f"{where}: {alias} is to be the same as {fqn}, and is a tensor of its own.")
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
    return {f"snapshots/{folder}": sizes for folder, sizes in names.items() if SNAPSHOT.fullmatch(folder)}


def _look_for_manifests(
    files: Mapping[str, Mapping[str, int]], attempts: Mapping[int, Attempt]
) -> tuple[dict[str, Snapshot], dict[str, Attempt]]:
    """The snapshots that are certainly incomplete, and the attempts of the others, by folder."""
    found: dict[str, Snapshot] = {}
    whole: dict[str, Attempt] = {}
    for folder, sizes in files.items():
        facts = *t_and_attempt(folder), sum(sizes.values())
        attempt = attempts.get(facts[1])
        if attempt is None:
            found[folder] = Snapshot(*facts, (), "its attempt is not recorded")
            continue
        # A world size costs nothing to claim: no more names are made than there are files.
        missing = (rank for rank, name in enumerate(manifest_names(attempt.world_size)) if name not in sizes)
        some = list(islice(missing, _MOST_NAMED + 1))
        if some:
            problem = f"manifests of {_ranks(some)} of {attempt.world_size} are missing"
            found[folder] = Snapshot(*facts, (), problem, unfinished=True)
        else:
            whole[folder] = attempt
    return found, whole


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", …" if len(ranks) > _MOST_NAMED else "")
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
