"""Shard files read whole: every byte once, many reads in flight, compared with the checksums in their manifests.

What is wrong is named, with the file, the rank that wrote it and the tensors it holds. In memory are the reads in
flight, and one header of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING

import xxhash

from phema_dist.errors import KeyMissingError, LayoutError, SnapshotError, StorageError
from phema_dist.shard import check_exact_cover
from phema_dist.storage.snapshot import parse_header

if TYPE_CHECKING:
    from phema_dist.shard import Box
    from phema_dist.storage.manifest import RunInfo, ShardFile
    from phema_dist.storage.snapshot import Entry
    from phema_dist.storage.store import Store

Progress = Callable[[int, int], object]  # told the number of bytes read, and of all there are; from any thread

_READ_BYTES = 4 << 20  # at most, in one read: a block has as many
_MOST_UNREADABLE = 8  # files; if there are more, it is the storage that is ill, not the run
_TENSORS_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a note; `text` is a line that says all of it."""

    key: str  # of the file, or the folder of the snapshot; "" is the run
    text: str
    rank: int | None = None  # that wrote it
    tensors: tuple[str, ...] = ()  # of which it holds values
    is_note: bool = False  # of what readers leave out, because it is not, or not yet, complete


@dataclass(frozen=True, eq=False)
class File:
    """A shard file, as a manifest tells of it."""

    folder: str
    rank: int
    facts: ShardFile
    block_bytes: int

    @property
    def key(self) -> str:
        """Where it lies in the run."""
        return f"{self.folder}/{self.facts.name}"

    def part(self, number: int) -> tuple[int, int]:
        """From where to where a part with a checksum goes: the header is the first, then come the blocks."""
        header, size = self.facts.header_bytes, self.block_bytes
        end = header + min(number * size, self.facts.data_bytes)
        return (header + (number - 1) * size, end) if number else (0, header)


class Scan:
    """Reads shard files, each byte once, and remembers what it found; many reads are in flight."""

    def __init__(self, store: Store, progress: Progress | None) -> None:
        self.store, self._progress = store, progress
        self.num_bytes = self._num_wanted = 0
        self._headers: dict[str, bytes] = {}  # by checksum: they are the same in all snapshots of an attempt
        self._bad: dict[File, list[int]] = {}  # parts that are not what was written
        self._unreadable: dict[File, StorageError] = {}
        self._parsed: dict[tuple[str, int], tuple[Entry, ...]] = {}  # by checksum and bytes of the data
        self._uncovered: dict[tuple[tuple[str, int], ...], list[tuple[str, str]]] = {}
        self._lock = Lock()

    def read(self, files: Sequence[File]) -> None:
        """Read files, in their order."""
        self._unreadable.clear()
        self._num_wanted += sum(file.facts.header_bytes + file.facts.data_bytes for file in files)
        parts = ((file, number) for file in files for number in range(len(file.facts.checksums)))

        def work() -> None:
            buffer = memoryview(bytearray(_READ_BYTES))
            while (part := self._next(parts)) is not None:
                self._read_part(*part, buffer)

        with ThreadPoolExecutor(self.store.read_concurrency, "phema-verify") as pool:
            jobs = [pool.submit(work) for _ in range(self.store.read_concurrency)]
            try:
                for job in jobs:
                    job.result()
            finally:  # after an error, or Ctrl-C, what has not begun is not read
                with self._lock:
                    parts.close()

    def _next(self, parts: Iterator[tuple[File, int]]) -> tuple[File, int] | None:
        with self._lock:
            refused = [error for error in self._unreadable.values() if not isinstance(error, KeyMissingError)]
            if len(refused) > _MOST_UNREADABLE:
                raise refused[-1]
            return next((part for part in parts if part[0] not in self._unreadable), None)

    def _read_part(self, file: File, number: int, buffer: memoryview) -> None:
        start, end = file.part(number)
        checksum = file.facts.checksums[number]
        state, header = xxhash.xxh3_64(), bytearray()
        try:
            for position in range(start, end, len(buffer)):
                view = buffer[: min(len(buffer), end - position)]
                self.store.read_into(file.key, position, view)
                state.update(view)
                if not number and checksum not in self._headers:
                    header += view
                self._count(len(view))
        except StorageError as error:
            with self._lock:
                self._unreadable[file] = error
            return
        if state.hexdigest() != checksum:
            with self._lock:
                self._bad.setdefault(file, []).append(number)
        elif not number:
            self._headers.setdefault(checksum, bytes(header))

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes
        if self._progress is not None:
            self._progress(num_bytes, self._num_wanted)

    def judge(self, file: File, info: RunInfo) -> Finding | None:
        """What is wrong with a file that was read."""
        where, rank = f"{file.key} of rank {file.rank}", file.rank
        if error := self._unreadable.get(file):
            problem = "is gone" if isinstance(error, KeyMissingError) else f"cannot be read: {error}"
            return Finding(file.key, f"{where} {problem.rstrip('.')}.", rank)
        entries, bad = self._entries(file, info), sorted(self._bad.get(file, ()))
        if isinstance(entries, SnapshotError):
            return Finding(file.key, f"{entries} Rank {rank} wrote it.", rank)
        if not bad:
            return None
        stretches = [(0, file.facts.data_bytes)] if bad[0] == 0 else [file.part(number) for number in bad]
        shift = file.facts.header_bytes if bad[0] else 0
        names = tuple(
            entry.fqn
            for entry in entries or ()
            if any(entry.start + shift < last and first < entry.stop + shift for first, last in stretches)
        )
        blocks = f"{len(bad) - (bad[0] == 0)} of {len(file.facts.checksums) - 1} blocks of its data"
        what = "its header" if bad == [0] else f"its header and {blocks}" if bad[0] == 0 else blocks
        held = f" It holds values of {named(names)}." if names else ""
        text = f"{file.key} is damaged: {what}, as rank {rank} wrote them, had other checksums.{held}"
        return Finding(file.key, text, rank, names)

    def check_cover(self, folder: str, files: Sequence[File], info: RunInfo) -> Iterator[Finding]:
        """Whether files without a fault hold each element of each tensor once, in each profile."""
        for sigma_rel in info.sigma_rels:
            parts = tuple(sorted((self._kind(file) for file in files if file.facts.sigma_rel == sigma_rel), key=str))
            if parts not in self._uncovered:
                self._uncovered[parts] = list(_uncovered(info, [self._parsed[part] for part in parts]))
            if wrong := self._uncovered[parts]:
                names, more = (
                    tuple(fqn for fqn, _ in wrong),
                    f" And {len(wrong) - 1} more tensors." if wrong[1:] else "",
                )
                text = f"{folder}: the files of sigma_rel {sigma_rel} do not hold what they should: {wrong[0][1]}{more}"
                yield Finding(folder, text, None, names)

    def _kind(self, file: File) -> tuple[str, int]:
        return file.facts.checksums[0], file.facts.data_bytes

    def _entries(self, file: File, info: RunInfo) -> tuple[Entry, ...] | SnapshotError | None:
        """What lies where in a file, by its own header or, if that is damaged, an equal one of another snapshot."""
        kind = self._kind(file)
        if kind not in self._parsed and kind[0] in self._headers:
            try:
                self._parsed[kind] = parse_header(self._headers[kind[0]], file.facts, info, file.key)
            except SnapshotError as error:
                return error
        return self._parsed.get(kind)


def named(tensors: Sequence[str]) -> str:
    """Some tensors in words: the first few, and how many more."""
    more = f" and {len(tensors) - _TENSORS_NAMED} more" if len(tensors) > _TENSORS_NAMED else ""
    return f"{', '.join(tensors[:_TENSORS_NAMED])}{more}"


def _uncovered(info: RunInfo, files: Sequence[Sequence[Entry]]) -> Iterator[tuple[str, str]]:
    """Tensors that are not held just once, each with what is wrong about it."""
    boxes: dict[str, list[Box]] = {}
    for entry in chain.from_iterable(files):
        boxes.setdefault(entry.fqn, []).append(entry.box)
    for fqn, facts in info.tensors.items():
        try:
            check_exact_cover(fqn, facts.shape, boxes.get(fqn, ()))
        except LayoutError as error:
            yield fqn, str(error)
