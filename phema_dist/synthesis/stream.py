"""One pass over the stored bytes that makes any number of averages.

The work is cut into tiles: a few MiB of a shard file of the newest snapshot, and the boxes that lie in them. For a
tile the same elements are read from every snapshot of the recipes in one fixed order, checked, multiplied and added;
then the tile is handed out and forgotten. So the result depends neither on the number of readers nor on how a
snapshot was sharded, and memory holds a few tiles beside whatever the caller keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import xxhash

from phema_dist.errors import SnapshotError
from phema_dist.shard import Box, check_exact_cover, flat_range_to_boxes, flat_span, intersect, whole
from phema_dist.storage.manifest import BLOCK_BYTES
from phema_dist.storage.snapshot import DTYPES, Entry, parse_header

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, ShardFile, TensorFacts
    from phema_dist.storage.run import Snapshot
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.recipe import Recipe

# What a reader hands out: target index, tensor, box, and its values (valid only during the call; any thread).
Sink = Callable[[int, str, Box, torch.Tensor], None]
Progress = Callable[[int], object]  # told the number of bytes read, now and then

_TILE_BYTES = BLOCK_BYTES
_MEMORY_BYTES = 256 << 20
_PIECE = 1 << 15  # elements that torch adds in the calling thread, without helpers
_SPAN = 8 * _PIECE


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tensors of one profile of a snapshot lie: the entries of each of its files."""

    files: tuple[tuple[Entry, ...], ...]
    places: dict[str, list[tuple[int, Entry]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, entries in enumerate(self.files):
            for entry in entries:
                self.places.setdefault(entry.fqn, []).append((index, entry))


@dataclass(frozen=True, eq=False)
class Source:
    """One stored average, and its coefficient in each target."""

    snapshot: Snapshot
    files: tuple[ShardFile, ...]
    layout: Layout
    coefficients: tuple[float, ...]

    @property
    def block_bytes(self) -> int:
        """Of the checksums of this snapshot."""
        return self.snapshot.manifests[0].block_bytes


class Library:
    """The shard files of a run, opened: equal headers are read once, and equal layouts checked once."""

    def __init__(self, store: Store, info: RunInfo) -> None:
        self._store, self._info = store, info
        self._headers: dict[str, tuple[Entry, ...]] = {}
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def source(self, snapshot: Snapshot, sigma_rel: float, coefficients: tuple[float, ...]) -> Source:
        """One profile of a snapshot, with the layout of its files."""
        files = _files(snapshot, sigma_rel)
        for file in files:
            if file.checksums[0] not in self._headers:
                key = f"{snapshot.folder}/{file.name}"
                header = bytearray(file.header_bytes)
                self._store.read_into(key, 0, memoryview(header))
                entries = parse_header(bytes(header), file, self._info, self._store.describe(key))
                self._headers[file.checksums[0]] = entries
        key_of_layout = tuple(file.checksums[0] for file in files)
        if key_of_layout not in self._layouts:
            layout = Layout(tuple(self._headers[checksum] for checksum in key_of_layout))
            for fqn, facts in self._info.tensors.items():
                check_exact_cover(fqn, facts.shape, [entry.box for _, entry in layout.places.get(fqn, ())])
            self._layouts[key_of_layout] = layout
        return Source(snapshot, tuple(files), self._layouts[key_of_layout], coefficients)


@dataclass(frozen=True)
class Part:
    """A box of a tensor in a tile, from element `start` of the tile on."""

    fqn: str
    box: Box
    start: int


@dataclass(frozen=True, eq=False)
class Tile:
    """A stretch of work: boxes that are made, and handed out, together. Parameters and buffers never mix."""

    parts: tuple[Part, ...]
    numel: int
    averaged: bool
    dtype: torch.dtype  # of the sums


@dataclass(frozen=True)
class Move:
    """Elements of a file that go to a tile: a strided view of each."""

    first_byte: int  # in the file's data
    last_byte: int
    dtype: torch.dtype
    target: int
    sizes: tuple[int, ...]
    from_strides: tuple[int, ...]
    to_strides: tuple[int, ...]


def stream(
    store: Store,
    info: RunInfo,
    recipes: Sequence[Recipe],
    sink: Sink,
    *,
    wanted: Mapping[str, Sequence[Box]] | None = None,
    calculation_dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> None:
    """Make the averages of `recipes`, all for one t, reading every byte once.

    Args:
        store: where the run lives.
        info: of the run that the recipes were planned from.
        recipes: what to add up.
        sink: takes the results, tile by tile, from several threads at once; every element exactly once.
        wanted: the boxes to make of each tensor; None: all of all tensors.
        calculation_dtype: of the sums of float32 averages: float32 or float64.
        progress: told the number of bytes read, now and then.

    Raises:
        SnapshotError: a file is not what its manifest says; names file and rank.
        StorageError: a file could not be read; KeyMissingError if it is gone.
    """
    library = Library(store, info)
    newest = recipes[0].newest
    used = {(term.sigma_rel, term.snapshot.t): term.snapshot for recipe in recipes for term in recipe.terms}
    factors = [{(term.sigma_rel, term.snapshot.t): term.coefficient for term in r.terms} for r in recipes]
    sources = [
        library.source(snapshot, key[0], tuple(f.get(key, 0.0) for f in factors))
        for key, snapshot in sorted(used.items())
    ]
    reference = library.source(newest, info.sigma_rels[0], (1.0,) * len(recipes))

    num_readers, found_bytes = _divide_memory(len(recipes), store.read_concurrency)
    tiles = _cut_tiles(info, reference.layout, wanted, calculation_dtype)
    rooms = [_Room(found_bytes) for _ in range(num_readers)]

    def make(tile: Tile) -> None:
        room = rooms.pop()  # there is one for each thread
        try:
            _make_tile(store, sources if tile.averaged else [reference], tile, room, sink, progress)
        finally:
            rooms.append(room)

    with ThreadPoolExecutor(num_readers, "phema-read") as pool:
        jobs = [pool.submit(make, tile) for tile in tiles]
        done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        if any(job.exception() for job in done):
            pool.shutdown(cancel_futures=True)
        for job in done:
            job.result()


def num_bytes(recipes: Sequence[Recipe]) -> int:
    """How many bytes a pass over everything reads, for a progress bar."""
    used = {(term.sigma_rel, term.snapshot.t): term.snapshot for recipe in recipes for term in recipe.terms}
    return sum(file.data_bytes for (sigma_rel, _), snapshot in used.items() for file in _files(snapshot, sigma_rel))


def _divide_memory(num_targets: int, most_threads: int) -> tuple[int, int]:
    """Number of readers, and the bytes that each may read before it adds them: many targets' sums leave the cache."""
    sums_bytes = 2 * num_targets * _TILE_BYTES  # 16-bit files double in float32
    num_readers = max(1, min(most_threads, _MEMORY_BYTES // (sums_bytes + 2 * _TILE_BYTES)))
    return num_readers, min((num_targets + 1) * _TILE_BYTES, _MEMORY_BYTES // num_readers - sums_bytes)


def _files(snapshot: Snapshot, sigma_rel: float) -> list[ShardFile]:
    return [file for manifest in snapshot.manifests for file in manifest.files if file.sigma_rel == sigma_rel]


def result_dtype(facts: TensorFacts) -> torch.dtype:
    """Of a synthesized tensor: float32, unless the model's precision is higher; a buffer keeps its own."""
    dtype = DTYPES[facts.dtype]
    return dtype if facts.kind != "parameter" or dtype in {torch.float64, torch.complex64} else torch.float32


def _cut_tiles(
    info: RunInfo,
    layout: Layout,
    wanted: Mapping[str, Sequence[Box]] | None,
    calculation_dtype: torch.dtype,
) -> Iterator[Tile]:
    """Follow the files of the layout, so that a tile is one stretch of bytes wherever a snapshot is sharded alike."""
    for entries in layout.files:
        parts: list[Part] = []
        numel, group = 0, None
        for entry in entries:
            facts = info.tensors[entry.fqn]
            boxes = [whole(facts.shape)] if wanted is None else wanted.get(entry.fqn, ())
            averaged, dtype = facts.kind == "parameter", result_dtype(facts)
            if averaged and dtype == torch.float32:
                dtype = calculation_dtype
            for start, stop in _cuts(entry):
                index = entry.start + start * entry.dtype.itemsize
                now = (index // _TILE_BYTES, averaged, dtype)
                if now != group:
                    if parts:
                        yield Tile(tuple(parts), numel, *group[1:])  # type: ignore[index]
                    parts, numel, group = [], 0, now
                for cut in flat_range_to_boxes(entry.box, start, stop):
                    for box in boxes:
                        shared = cut if cut == box else intersect(cut, box)
                        if shared is not None:
                            parts.append(Part(entry.fqn, shared, numel))
                            numel += shared.numel
        if parts:
            yield Tile(tuple(parts), numel, *group[1:])  # type: ignore[index]


def _cuts(entry: Entry) -> Iterator[tuple[int, int]]:
    """The elements of an entry, cut where a tile ends in the file."""
    size, start = entry.dtype.itemsize, 0
    while start < entry.box.numel:
        end_of_tile = ((entry.start + start * size) // _TILE_BYTES + 1) * _TILE_BYTES
        stop = min(entry.box.numel, max(start + 1, (end_of_tile - entry.start) // size))
        yield start, stop
        start = stop


class _Room:
    """Memory that a reader works in, reused from tile to tile: fresh pages cost more than what is read into them."""

    def __init__(self, found_bytes: int) -> None:
        self.found_bytes = found_bytes  # at most, unless one source needs more
        self._held: dict[str, torch.Tensor] = {}

    def rows(self, name: str, num_rows: int, row_bytes: int) -> torch.Tensor:
        """Uninitialised bytes, until the next call with this name; each row is aligned for any dtype."""
        width = -(-row_bytes // 16) * 16
        if name not in self._held or len(self._held[name]) < num_rows * width:
            self._held[name] = torch.empty(num_rows * width, dtype=torch.uint8)
        return self._held[name][: num_rows * width].view(num_rows, width)[:, :row_bytes]


def _make_tile(
    store: Store, sources: Sequence[Source], tile: Tile, room: _Room, sink: Sink, progress: Progress | None
) -> None:
    num_targets = len(sources[0].coefficients)
    sums = room.rows("sums", num_targets, tile.numel * tile.dtype.itemsize).view(tile.dtype)
    firsts = [next((s for s in sources if s.coefficients[k]), None) for k in range(num_targets)]
    for _, alike in groupby(sources, lambda source: (id(source.layout), source.block_bytes)):
        same = list(alike)
        for index, moves in enumerate(_plan_moves(same[0].layout, tile)):
            for start, stop, group in _reads(moves, same[0].files[index].data_bytes, same[0].block_bytes):
                size = max(1, room.found_bytes // (stop - start))
                for batch in (same[i : i + size] for i in range(0, len(same), size)):
                    found = room.rows("found", len(batch), stop - start)
                    for source, data in zip(batch, found, strict=True):
                        _read_checked(store, source, source.files[index], start, data)
                        if progress is not None:
                            progress(stop - start)
                    for move in group:
                        values = found[:, move.first_byte - start : move.last_byte - start].view(move.dtype)
                        _add(sums, firsts, batch, values, move)
    for k, flat in enumerate(sums):
        for part in tile.parts:
            sink(k, part.fqn, part.box, flat[part.start : part.start + part.box.numel].view(part.box.sizes))


def _plan_moves(layout: Layout, tile: Tile) -> list[list[Move]]:
    """For each file of a layout: the moves that fill the tile, in the order of their bytes."""
    plan: list[list[Move]] = [[] for _ in layout.files]
    for part in tile.parts:
        for index, entry in layout.places[part.fqn]:
            shared = intersect(entry.box, part.box)
            if shared is None:
                continue
            first, last, dense = flat_span(shared, entry.box)
            target, _, dense_there = flat_span(shared, part.box)
            flat = dense and dense_there
            size = entry.dtype.itemsize
            move = Move(
                entry.start + first * size,
                entry.start + last * size,
                entry.dtype,
                part.start + target,
                (shared.numel,) if flat else shared.sizes,
                (1,) if flat else _strides(entry.box),
                (1,) if flat else _strides(part.box),
            )
            moves = plan[index]
            if moves and (joined := _join(moves[-1], move)):
                moves[-1] = joined
            else:
                moves.append(move)
    for moves in plan:
        moves.sort(key=lambda move: move.first_byte)
    return plan


def _strides(box: Box) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(box.sizes[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _join(a: Move, b: Move) -> Move | None:
    """Two flat moves as one, if the second continues the first on both sides: where layouts agree, a tile is one."""
    if (
        (a.dtype, a.from_strides, a.to_strides) == (b.dtype, (1,), (1,))
        and b.from_strides == b.to_strides == (1,)
        and (a.last_byte, a.target + a.sizes[0]) == (b.first_byte, b.target)
    ):
        return replace(a, last_byte=b.last_byte, sizes=(a.sizes[0] + b.sizes[0],))
    return None


def _reads(moves: Sequence[Move], data_bytes: int, block_bytes: int) -> Iterator[tuple[int, int, list[Move]]]:
    """Whole checksum blocks that hold the moves' bytes, neighbouring ones as one read."""
    group: list[Move] = []
    start = stop = 0
    for move in moves:
        first = move.first_byte // block_bytes * block_bytes
        last = min(-(-move.last_byte // block_bytes) * block_bytes, data_bytes)
        if group and first > stop:
            yield start, stop, group
            group = []
        start, stop = (min(start, first), max(stop, last)) if group else (first, last)
        group.append(move)
    if group:
        yield start, stop, group


def _read_checked(store: Store, source: Source, file: ShardFile, start: int, data: torch.Tensor) -> None:
    """Fill `data` with whole blocks of a file's data, from byte `start` on, and compare their checksums."""
    key = f"{source.snapshot.folder}/{file.name}"
    view = data.numpy().data
    store.read_into(key, file.header_bytes + start, view)
    for offset in range(0, len(view), source.block_bytes):
        block = view[offset : offset + source.block_bytes]
        if xxhash.xxh3_64_hexdigest(block) != file.checksums[1 + (start + offset) // source.block_bytes]:
            first = start + offset
            raise SnapshotError(
                f"{store.describe(key)} is damaged: bytes {first} to {first + len(block)} of its data are not those "
                "that were written (their checksum differs). Delete that snapshot to go on without it."
            )


def _add(
    sums: torch.Tensor, firsts: Sequence[Source | None], batch: Sequence[Source], found: torch.Tensor, move: Move
) -> None:
    """Add what was found in each source, times its coefficients, to the sum of each target; sources in their order.

    A span at a time, so that it stays in the cache until all targets have it, and a whole span in one call, because
    readers wait for the interpreter lock after each. The first term is stored, not added, and a factor of 1 not
    multiplied: then a looked-up average, or a buffer of any dtype, keeps its bits.
    """
    flat = len(move.sizes) == 1
    for i in range(0, move.sizes[0] if flat else 1, _SPAN):
        if flat:
            into = [row[move.target :][: move.sizes[0]][i : i + _SPAN].split(_PIECE) for row in sums]
            values = [data[i : i + _SPAN].split(_PIECE) for data in found]
        else:
            into = [(row[move.target :].as_strided(move.sizes, move.to_strides),) for row in sums]
            values = [(data.as_strided(move.sizes, move.from_strides),) for data in found]
        if found.dtype != sums.dtype:
            values = [tuple(piece.to(sums.dtype) for piece in pieces) for pieces in values]
        for k, target in enumerate(into):
            for source, pieces in zip(batch, values, strict=True):
                factor = source.coefficients[k]
                if source is firsts[k]:
                    torch._foreach_copy_(target, pieces)
                    if factor != 1:
                        torch._foreach_mul_(target, factor)
                elif factor:
                    torch._foreach_add_(target, pieces, alpha=factor)
