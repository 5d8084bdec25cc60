"""Whether a snapshot is whole: the manifests of all its ranks, read and held against the run and the listing.

They come from its index, if that fits, or one by one. A bucket may hold what somebody else put there: nothing is read
that is too large to be what it is called, and nothing is believed that the files or the run do not bear out. What is
wrong with one snapshot is a sentence about it, and no harm to the others.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from phema_dist.errors import RunError, SnapshotError
from phema_dist.storage.document import one_line
from phema_dist.storage.manifest import (
    INDEX_NAME,
    Attempt,
    Index,
    Manifest,
    RunInfo,
    from_json,
    largest_header,
    manifest_name,
    shard_name,
    snapshot_folder,
)

if TYPE_CHECKING:
    from phema_dist.storage.store import Store

Found: TypeAlias = dict[str, tuple[Manifest, ...] | str]  # by folder: manifests, or in words what is wrong
Sizes: TypeAlias = Mapping[str, Mapping[str, int]]  # by folder, of its files

_log = logging.getLogger("phema_dist")
SNAPSHOT = re.compile(r"([0-9]{12}|[1-9][0-9]{12,15})-a(0|[1-9][0-9]{0,14})")
LARGEST_MANIFEST = 16 << 20  # of 3 TiB on one rank
LARGEST_INDEX = 64 << 20  # of 12 TiB on all
_AT_ONCE_BYTES = 64 << 20  # of documents, read together
_MOST_UPDATES = 10_000_000  # of a history; it is unrolled to look at a recorded error
_MANY_RANKS = 4096
_LEAST_HEADER = 64
_OF_A_BYTE = {"I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"}  # all others have more


def check_size(store: Store, key: str, num_bytes: int, most: int) -> None:
    """Refuse a document by what the listing says, before it is read."""
    if num_bytes > most:
        raise RunError(
            f"{store.describe(key)} must have at most {most} bytes to be what it is called; it has {num_bytes}."
        )


def batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Keys to read together: many small ones, or a few large ones."""
    batch: list[str] = []
    num_bytes = 0
    for key, size in sizes.items():
        if batch and num_bytes + size > _AT_ONCE_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(key)
        num_bytes += size
    if batch:
        yield batch


def index_batches(store: Store, indexed: Mapping[str, int]) -> tuple[Iterator[list[str]], dict[str, str]]:
    """The keys of indexes, given by folder with their bytes, to read together; and why some are not worth reading."""
    doubts = {
        folder: f"{store.describe(f'{folder}/{INDEX_NAME}')} has {num_bytes} bytes, which no index has"
        for folder, num_bytes in indexed.items()
        if num_bytes > LARGEST_INDEX
    }
    return batches({f"{folder}/{INDEX_NAME}": indexed[folder] for folder in indexed.keys() - doubts}), doubts


def read_snapshots(
    store: Store,
    attempts: Mapping[str, Attempt],
    indexes: Iterable[Mapping[str, bytes]],
    sizes: Sizes,
    bounds: Bounds,
    doubts: Mapping[str, str],
) -> Found:
    """The manifests of snapshots that have all of them, or in words what is wrong.

    Args:
        store: where they are.
        attempts: of each folder.
        indexes: what there is of them, by key, some at a time.
        sizes: of the files, if they are known.
        bounds: what the run allows.
        doubts: why indexes are not among those, by folder.
    """
    found: Found = {}
    doubts = dict(doubts)
    for key, text in (pair for texts in indexes for pair in texts.items()):
        folder = key.rpartition("/")[0]
        if folder in attempts:
            try:
                manifests = from_json(Index, text, store.describe(key)).manifests
                _check_manifests(manifests, folder, attempts[folder], sizes.get(folder), bounds)
                found[folder] = manifests
            except RunError as error:
                doubts[folder] = str(error)
    _read_manifests(store, attempts, sizes, bounds, found)
    for folder, doubt in doubts.items():
        if folder in found and not isinstance(found[folder], str):
            _log.warning("%s: its index is not used, but its manifests, one by one: %s", folder, doubt)
    return found


def _read_manifests(store: Store, attempts: Mapping[str, Attempt], sizes: Sizes, bounds: Bounds, found: Found) -> None:
    """Add what was not found by indexes."""
    keys = {
        f"{folder}/{name}": sizes[folder][name] if folder in sizes else 0
        for folder, attempt in attempts.items()
        if folder not in found
        for name in manifest_names(attempt.world_size)
    }
    parsed: dict[str, list[Manifest]] = {}
    for batch in batches(keys):
        texts = store.get_many(key for key in batch if keys[key] <= LARGEST_MANIFEST)
        for key in batch:
            folder = key.rpartition("/")[0]
            if folder not in found:
                try:
                    check_size(store, key, keys[key], LARGEST_MANIFEST)
                    manifest = from_json(Manifest, texts.pop(key), store.describe(key))
                    parsed.setdefault(folder, []).append(manifest)
                except RunError as error:
                    found[folder] = str(error)
    for folder in parsed.keys() - found:
        try:
            _check_manifests(parsed[folder], folder, attempts[folder], sizes.get(folder), bounds)
            found[folder] = tuple(parsed[folder])
        except _RefusedError as error:
            found[folder] = Refused(error)
        except RunError as error:
            found[folder] = str(error)


class Refused(str):
    """What is wrong with a snapshot that is finished, and of which some rank had nothing to give."""

    __slots__ = ()


class _RefusedError(SnapshotError):
    pass


@dataclass(frozen=True)
class Bounds:
    """What the manifests of a run can say, as far as the run tells."""

    origin: int
    sigma_rels: frozenset[float]
    header_bytes: int
    data_bytes: int  # at least, of a profile

    @classmethod
    def of(cls, info: RunInfo) -> Bounds:
        """Those of a run."""
        least = sum((1 if facts.dtype in _OF_A_BYTE else 2) * math.prod(facts.shape) for facts in info.tensors.values())
        least //= 4  # what is really missing is named where tensors are looked at; this is about memory for claims
        return cls(info.origin, frozenset(info.sigma_rels), largest_header(info), least)


def _check_manifests(
    manifests: Sequence[Manifest], folder: str, attempt: Attempt, sizes: Mapping[str, int] | None, bounds: Bounds
) -> None:
    if len(manifests) != attempt.world_size:
        raise SnapshotError(f"{len(manifests)} manifests instead of {attempt.world_size}")
    ours = (attempt.token, attempt.world_size, *t_and_attempt(folder))
    for rank, manifest in enumerate(manifests):
        theirs = (manifest.token, manifest.world_size, manifest.t, manifest.attempt)
        if theirs != ours or manifest.rank != rank:
            raise SnapshotError(f"the manifest of rank {rank} was written by another job")
        if manifest.refused is not None:
            raise _RefusedError(f"rank {rank} had nothing to give: {one_line(manifest.refused)}")
        if manifest.block_bytes != manifests[0].block_bytes:
            raise SnapshotError(f"rank {rank} has other blocks than rank 0")
        _check_files(manifest, sizes, bounds)
    _check_updates(manifests[0], bounds)
    num_bytes: Counter[float] = Counter(dict.fromkeys(bounds.sigma_rels, 0))
    for manifest in manifests:
        for file in manifest.files:
            num_bytes[file.sigma_rel] += file.data_bytes
    least = min(num_bytes.values())
    if least < bounds.data_bytes:
        raise SnapshotError(f"it has {least} bytes of an average whose tensors need at least {bounds.data_bytes}")


def _check_files(manifest: Manifest, sizes: Mapping[str, int] | None, bounds: Bounds) -> None:
    rank = manifest.rank
    numbers: Counter[float] = Counter()
    for file in manifest.files:
        if file.sigma_rel not in bounds.sigma_rels:
            raise SnapshotError(f"rank {rank} has a file of sigma_rel {file.sigma_rel}, which the run does not track")
        name = shard_name(file.sigma_rel, rank, numbers[file.sigma_rel])
        numbers[file.sigma_rel] += 1
        if file.name != name:
            raise SnapshotError(f"rank {rank} must have {name}; found {file.name!r}")
        if not _LEAST_HEADER <= file.header_bytes <= bounds.header_bytes:
            state = f"a header of {file.header_bytes} bytes, and {_LEAST_HEADER} to {bounds.header_bytes} are possible"
            raise SnapshotError(f"{name} of rank {rank} has {state}")
        num_blocks = -(-file.data_bytes // manifest.block_bytes)
        if len(file.checksums) != 1 + num_blocks:
            state = f"has {len(file.checksums)} checksums instead of {1 + num_blocks}"
            raise SnapshotError(f"{name} of rank {rank} {state}")
        expected = file.header_bytes + file.data_bytes
        found = expected if sizes is None else sizes.get(name)
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise SnapshotError(f"{name} of rank {rank} {state}")


def _check_updates(manifest: Manifest, bounds: Bounds) -> None:
    """Raise SnapshotError unless the history of updates is one, and ends where the snapshot is."""
    last = total = 0
    for t, count in manifest.updates:
        if not 0 < count <= t - last:
            raise SnapshotError(f"its history cannot have {count} updates from t={last} to {t}")
        last, total = t, total + count
    if last != manifest.t - bounds.origin or not last:
        raise SnapshotError(f"its history of updates ends at t={last} instead of {manifest.t - bounds.origin}")
    if total > _MOST_UPDATES:
        raise SnapshotError(f"its history has {total} updates, more than {_MOST_UPDATES}")


def manifest_names(world_size: int) -> Iterable[str]:
    """The names of the manifests of all ranks, in order; made only as far as somebody looks, if there are many."""
    if world_size > _MANY_RANKS:
        return (manifest_name(rank, world_size) for rank in range(world_size))
    return _few_names(world_size)


@lru_cache(maxsize=16)
def _few_names(world_size: int) -> tuple[str, ...]:
    return tuple(manifest_name(rank, world_size) for rank in range(world_size))


def t_and_attempt(folder: str) -> tuple[int, int]:
    """What the name of a snapshot's folder says. Raises SnapshotError if it is none."""
    match = SNAPSHOT.fullmatch(folder.removeprefix("snapshots/"))
    if match is None:
        raise SnapshotError(f"a snapshot's folder is like {snapshot_folder(1000, 0)}; got {folder!r}.")
    return int(match[1]), int(match[2])
