"""Verified bytes of a run: shard files opened, blocks read once and kept as long as somebody needs them.

A checksum covers a block of a few MiB. A stretch that is read from its first block to its last is verified on the way;
whatever else is wanted comes out of whole blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import torch
import xxhash

from phema_dist.errors import DamagedError, LayoutError, SnapshotError, StorageError
from phema_dist.shard import check_exact_cover
from phema_dist.storage.snapshot import parse_header
from phema_dist.synthesis.tiles import Layout, Move

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, ShardFile
    from phema_dist.storage.run import Snapshot
    from phema_dist.storage.snapshot import Entry
    from phema_dist.storage.store import Store

Progress = Callable[[int], object]  # told the number of bytes read, now and then
_TENSORS_NAMED = 4


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
        self._headers: dict[str, tuple[Entry, ...]] = {}
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def layout(self, snapshot: Snapshot, files: Sequence[tuple[int, ShardFile]]) -> Layout:
        """Where the tensors lie in the files of one profile, each given with its rank.

        Raises:
            DamagedError: a header is not what was written, or together they do not hold each element once.
        """
        for rank, file in files:
            if file.checksums[0] not in self._headers:
                key = f"{snapshot.folder}/{file.name}"
                header = bytearray(file.header_bytes)
                read_whole(self._store, snapshot, file, 0, memoryview(header))
                try:
                    entries = parse_header(bytes(header), file, self._info, self._store.describe(key))
                except SnapshotError as error:
                    raise DamagedError(f"{error} Rank {rank} wrote it.", snapshot.folder) from error
                self._headers[file.checksums[0]] = entries
        key_of_layout = tuple(file.checksums[0] for _, file in files)
        if key_of_layout not in self._layouts:
            layout = Layout(tuple(self._headers[checksum] for checksum in key_of_layout))
            for fqn, facts in self._info.tensors.items():
                try:
                    check_exact_cover(fqn, facts.shape, layout.boxes(fqn))
                except LayoutError as error:
                    where = self._store.describe(snapshot.folder)
                    raise DamagedError(f"{where} is not what was written: {error}", snapshot.folder) from error
            self._layouts[key_of_layout] = layout
        return self._layouts[key_of_layout]


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
    more = f" and {len(names) - _TENSORS_NAMED} more" if len(names) > _TENSORS_NAMED else ""
    raise DamagedError(
        f"{store.describe(f'{source.snapshot.folder}/{file.name}')} is damaged: bytes {first} to {last} of its data "
        f"are not those that rank {source.ranks[index]} wrote (their checksum differs). They hold values of "
        f"{', '.join(names[:_TENSORS_NAMED])}{more}.",
        source.snapshot.folder,
    )


class Blocks:
    """Whole verified blocks, read once for all that need them, and kept in between as far as there is room.

    `uses` says how many times `fetch` will be called for each block (of a source's file).
    """

    def __init__(self, store: Store, room_bytes: int, uses: Callable[[Source], Counter[tuple[int, int]]]) -> None:
        self._store, self._room, self._uses = store, room_bytes, uses
        self._lock = Lock()
        self._held: dict[tuple[int, int, int], Future[torch.Tensor]] = {}
        self._users: Counter[tuple[int, int, int]] = Counter()  # that have fetched it and not released it
        self._left: dict[tuple[int, int, int], int] = {}  # uses to come
        self._spare: list[torch.Tensor] = []  # memory to use again: fresh pages cost more than what is read into them

    def fetch(self, source: Source, index: int, block: int, progress: Progress | None) -> torch.Tensor:
        """A block's bytes; call `release` when they are not needed any more."""
        key = (id(source), index, block)
        with self._lock:
            self._users[key] += 1
            self._left[key] = self._left.get(key, self._uses(source)[index, block]) - 1
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
        """End one use: forget the block if it was the last, or there is no room to keep it."""
        key = (id(source), index, block)
        with self._lock:
            self._users[key] -= 1
            if self._users[key] == 0:
                del self._users[key]
                kept = sum(1 for held in self._held if held not in self._users) * source.block_bytes
                if self._left[key] <= 0 or kept > self._room:
                    data = self._held.pop(key).result()
                    if len(data) == source.block_bytes:
                        self._spare.append(data)
                if self._left[key] <= 0:
                    del self._left[key]

    def _read(self, source: Source, index: int, block: int) -> torch.Tensor:
        file, first = source.files[index], block * source.block_bytes
        num_bytes = min(source.block_bytes, file.data_bytes - first)
        with self._lock:
            fits = bool(self._spare) and len(self._spare[-1]) == num_bytes
            data = self._spare.pop() if fits else torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        view = data.numpy().data
        read_whole(self._store, source.snapshot, file, file.header_bytes + first, view)
        check(self._store, source, index, block, xxhash.xxh3_64_hexdigest(view))
        return data


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
