"""Verified bytes of a run: shard files opened, blocks read once and kept as long as somebody needs them.

A checksum covers a block of a few MiB. A stretch that is read from its first block to its last is verified on the way;
whatever else is wanted comes out of whole blocks.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import torch
import xxhash

from phema_dist.errors import DamagedError, LayoutError, SnapshotError, StorageError
from phema_dist.shard import check_exact_cover
from phema_dist.storage.scan import named
from phema_dist.storage.snapshot import parse_header
from phema_dist.synthesis.tiles import Layout, Move

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, ShardFile
    from phema_dist.storage.run import Snapshot
    from phema_dist.storage.snapshot import Entry
    from phema_dist.storage.store import Store

Progress = Callable[[int], object]  # told the number of bytes read, now and then
Uses = Mapping[tuple[int, int], Sequence[int]]  # the strips that need a block: (file, block) -> numbers, ascending
_Key = tuple[int, int, int]  # source, file, block
_Header = tuple[str, int, int]  # checksum, its bytes, those of the data


@dataclass(frozen=True, eq=False)
class Source:
    """One stored average: its coefficient in each target, and the targets that just take its parameters or buffers."""

    snapshot: Snapshot
    files: tuple[ShardFile, ...]
    ranks: tuple[int, ...]  # that wrote them
    layout: Layout
    coefficients: tuple[float, ...]
    copied_to: tuple[int, ...]
    buffers_to: tuple[int, ...]
    batch: object  # that it is added up with

    @property
    def block_bytes(self) -> int:
        """Of the checksums of this snapshot."""
        return self.snapshot.manifests[0].block_bytes

    @property
    def averaged(self) -> bool:
        """Whether its parameters are used, and not just its buffers."""
        return bool(self.copied_to) or any(self.coefficients)

    def takes_part(self, *, averaged: bool) -> bool:
        """Whether it has a part in a tile of parameters, or of buffers."""
        return self.averaged if averaged else bool(self.buffers_to)


class Library:
    """The shard files of a run, opened: equal headers are read once, and equal layouts checked once."""

    def __init__(self, store: Store, info: RunInfo) -> None:
        self._store, self._info = store, info
        self._headers: dict[_Header, tuple[Entry, ...]] = {}
        self._layouts: dict[tuple[_Header, ...], Layout] = {}

    def layout(self, snapshot: Snapshot, files: Sequence[tuple[int, ShardFile]]) -> Layout:
        """Where the tensors lie in the files of one profile, each given with its rank.

        Raises:
            DamagedError: a header is not what was written, or together they do not hold each element once.
        """
        for rank, file in files:
            if _header(file) not in self._headers:
                key = f"{snapshot.folder}/{file.name}"
                header = bytearray(file.header_bytes)
                read_whole(self._store, snapshot, file, 0, memoryview(header))
                try:
                    entries = parse_header(bytes(header), file, self._info, self._store.describe(key))
                except SnapshotError as error:
                    raise DamagedError(f"{error} Rank {rank} wrote it.", snapshot.folder) from error
                self._headers[_header(file)] = entries
        key_of_layout = tuple(_header(file) for _, file in files)
        if key_of_layout not in self._layouts:
            layout = Layout(tuple(self._headers[header] for header in key_of_layout))
            for fqn, facts in self._info.tensors.items():
                try:
                    check_exact_cover(fqn, facts.shape, layout.boxes(fqn))
                except LayoutError as error:
                    where = self._store.describe(snapshot.folder)
                    raise DamagedError(f"{where} is not what was written: {error}", snapshot.folder) from error
            self._layouts[key_of_layout] = layout
        return self._layouts[key_of_layout]


def _header(file: ShardFile) -> _Header:
    """What makes the headers of two files the same: a checksum alone would let one speak for other data."""
    return file.checksums[0], file.header_bytes, file.data_bytes


def read_whole(store: Store, snapshot: Snapshot, file: ShardFile, position: int, buffer: memoryview) -> None:
    """Fill a buffer from byte `position` of a file. Raises DamagedError if the file is too short for that."""
    key = f"{snapshot.folder}/{file.name}"
    try:
        store.read_into(key, position, buffer)
    except StorageError as error:
        if type(error) is not StorageError:
            raise
        found = store.list(key.rpartition("/")[0]).get(key)
        if found is None or found >= position + len(buffer):
            raise
        raise DamagedError(
            f"{store.describe(key)} is damaged: it has {found} bytes, and {file.header_bytes + file.data_bytes} were "
            "written.",
            snapshot.folder,
        ) from error


class Stretched:
    """The checksums of a file's bytes as they come in order, from the first byte of a block on."""

    def __init__(self, store: Store, source: Source, index: int, first_byte: int) -> None:
        self._store, self._source, self._index, self._position = store, source, index, first_byte
        self._file, self._block_bytes = source.files[index], source.block_bytes
        self._state = xxhash.xxh3_64()

    def read(self, buffer: memoryview) -> None:
        """Fill a buffer with the bytes that come next. Raises DamagedError at the end of a block that is not right."""
        file, size = self._file, self._block_bytes
        read_whole(self._store, self._source.snapshot, file, file.header_bytes + self._position, buffer)
        while buffer:
            part = buffer[: size - self._position % size]
            self._state.update(part)
            self._position += len(part)
            if self._position % size == 0 or self._position == file.data_bytes:
                block = (self._position - 1) // size
                check(self._store, self._source, self._index, block, self._state.hexdigest())
                self._state.reset()
            buffer = buffer[len(part) :]


def check(store: Store, source: Source, index: int, block: int, digest: str) -> None:
    """Raise DamagedError unless that is the checksum of a block, naming what the block holds."""
    file = source.files[index]
    if digest == file.checksums[1 + block]:
        return
    first, last = block * source.block_bytes, min((block + 1) * source.block_bytes, file.data_bytes)
    names = [entry.fqn for entry in source.layout.files[index] if entry.start < last and first < entry.stop]
    raise DamagedError(
        f"{store.describe(f'{source.snapshot.folder}/{file.name}')} is damaged: bytes {first} to {last} of its data "
        f"are not those that rank {source.ranks[index]} wrote (their checksum differs). They hold values of "
        f"{named(names)}.",
        source.snapshot.folder,
    )


def private_memory(num_bytes: int) -> torch.Tensor:
    """Bytes that go back to the system with the tensor; malloc would keep them for a thread that is gone."""
    pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]


class Blocks:
    """Whole verified blocks, read once for all that need them, and kept in between as far as there is room.

    `uses` says which strips will fetch each block (of a source's file). Where room is short that block is forgotten
    which is needed last.
    """

    def __init__(self, store: Store, room_bytes: int, uses: Callable[[Source], Uses]) -> None:
        self._store, self._room, self._uses = store, room_bytes, uses
        self._lock = Lock()
        self._held: dict[_Key, Future[torch.Tensor]] = {}
        self._users: Counter[_Key] = Counter()  # that have fetched it and not released it
        self._fetched: Counter[_Key] = Counter()  # how many times
        self._idle: dict[_Key, int] = {}  # held without users: the strip that needs it next
        self._spare: list[torch.Tensor] = []  # memory to use again: fresh pages cost more than what is read into them
        self._num_bytes = 0  # of all that is held, and spare

    def fetch(self, source: Source, index: int, block: int, progress: Progress | None) -> torch.Tensor:
        """A block's bytes; call `release` when they are not needed any more."""
        key = (id(source), index, block)
        with self._lock:
            self._users[key] += 1
            self._fetched[key] += 1
            self._idle.pop(key, None)
            future = self._held.get(key)
            mine = future is None
            if future is None:
                future = self._held[key] = Future()
        if mine:
            try:
                future.set_result(self._read(source, index, block))
            except BaseException as error:
                future.set_exception(error)
                raise
            if progress is not None:
                progress(len(future.result()))
        return future.result()

    def release(self, source: Source, index: int, block: int) -> None:
        """End one use: forget the block if it was the last."""
        key = (id(source), index, block)
        with self._lock:
            self._users[key] -= 1
            if self._users[key]:
                return
            del self._users[key]
            strips = self._uses(source)[index, block]
            if self._fetched[key] < len(strips):
                self._idle[key] = strips[self._fetched[key]]
            else:
                del self._fetched[key]
                self._spare.append(self._held.pop(key).result())

    def _read(self, source: Source, index: int, block: int) -> torch.Tensor:
        file, first = source.files[index], block * source.block_bytes
        num_bytes = min(source.block_bytes, file.data_bytes - first)
        with self._lock:
            data = self._take(num_bytes)
        view = data.numpy().data
        read_whole(self._store, source.snapshot, file, file.header_bytes + first, view)
        check(self._store, source, index, block, xxhash.xxh3_64_hexdigest(view))
        return data

    def _take(self, num_bytes: int) -> torch.Tensor:
        while not (self._spare and len(self._spare[-1]) == num_bytes):
            if self._num_bytes + num_bytes <= self._room or not (self._spare or self._idle):
                self._num_bytes += num_bytes
                return private_memory(num_bytes)
            if self._spare:
                self._num_bytes -= len(self._spare.pop())
            else:
                # Of those needed at the same time the one used last: sources take their turns in one order.
                key = max(reversed(self._idle), key=self._idle.__getitem__)
                del self._idle[key]
                self._spare.append(self._held.pop(key).result())
        return self._spare.pop()


def copy_moves(
    blocks: Blocks, source: Source, index: int, moves: Sequence[Move], row: torch.Tensor, progress: Progress | None
) -> None:
    """Fill a row with what moves take out of one file, in the order of their bytes; each block is fetched once."""
    size = source.block_bytes
    held: dict[int, torch.Tensor] = {}
    try:
        for move in moves:
            numbers = move.blocks(size)
            for block in [block for block in held if block < numbers.start]:
                del held[block]
                blocks.release(source, index, block)
            for block in numbers:
                if block not in held:
                    held[block] = blocks.fetch(source, index, block, progress)
            pieces = [
                held[block][max(0, move.first_byte - block * size) : move.last_byte - block * size] for block in numbers
            ]
            data = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(move.dtype)
            row[move.target :].as_strided(move.sizes, move.to_strides).copy_(
                data.as_strided(move.sizes, move.from_strides)
            )
    finally:
        for block in held:
            blocks.release(source, index, block)
