"""One pass over the stored bytes that makes any number of averages.

The work is cut into tiles: a few MiB of a shard file of the newest snapshot, and the boxes that lie in them. For a
tile the same elements are read from every snapshot of the recipes in one fixed order, checked, multiplied and added;
then the tile is handed out and forgotten. So the result depends neither on the number of readers nor on how a
snapshot was sharded, and memory holds a few tiles beside whatever the caller keeps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import xxhash

from phema_dist.errors import DamagedError
from phema_dist.shard import Box, check_exact_cover
from phema_dist.storage.snapshot import Entry, parse_header
from phema_dist.synthesis.sums import TERMS_AT_ONCE, add_batch, num_rows, prefers_batches
from phema_dist.synthesis.tiles import TILE_BYTES, Layout, Move, Tile, cut_tiles, plan_moves, reads_of

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, ShardFile
    from phema_dist.storage.run import Snapshot
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.recipe import Recipe

# What a reader hands out: target index, tensor, box, and its values (valid only during the call; any thread).
Sink = Callable[[int, str, Box, torch.Tensor], None]
Progress = Callable[[int], object]  # told the number of bytes read, now and then

MEMORY_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Source:
    """One stored average, its coefficient in each target, and the targets that are just this average, bit for bit."""

    snapshot: Snapshot
    files: tuple[ShardFile, ...]
    layout: Layout
    coefficients: tuple[float, ...]
    copied_to: tuple[int, ...]

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

    def source(self, snapshot: Snapshot, sigma_rel: float, recipes: Sequence[Recipe]) -> Source:
        """One profile of a snapshot, with the layout of its files and its part in the recipes."""
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
        terms = [{(term.sigma_rel, term.snapshot.t): term.coefficient for term in recipe.terms} for recipe in recipes]
        factors = [coefficients.get((sigma_rel, snapshot.t), 0.0) for coefficients in terms]
        copied_to = tuple(k for k, recipe in enumerate(recipes) if factors[k] == 1 and len(recipe.terms) == 1)
        return Source(snapshot, tuple(files), self._layouts[key_of_layout], tuple(factors), copied_to)


def stream(
    store: Store,
    info: RunInfo,
    recipes: Sequence[Recipe],
    sink: Sink,
    *,
    wanted: Mapping[str, Sequence[Box]] | None = None,
    calculation_dtype: torch.dtype = torch.float32,
    memory_bytes: int = MEMORY_BYTES,
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
        memory_bytes: how much memory to use beside what the sink keeps.
        progress: told the number of bytes read, now and then.

    Raises:
        DamagedError: a file is not what its manifest says; names file and rank.
        StorageError: a file could not be read; KeyMissingError if it is gone.
    """
    library = Library(store, info)
    newest = recipes[0].newest
    sources = [library.source(snapshot, sigma_rel, recipes) for sigma_rel, snapshot in _used(recipes)]
    reference = library.source(newest, info.sigma_rels[0], ())
    # Buffers are not averaged: all results take those of the newest snapshot.
    copied = replace(reference, copied_to=tuple(range(len(recipes))))

    num_readers = _num_readers(len(recipes), store.read_concurrency)
    tiles = cut_tiles(info, reference.layout, wanted, calculation_dtype)
    rooms = [_Room() for _ in range(num_readers)]

    def make(tile: Tile) -> None:
        room = rooms.pop()  # there is one for each thread
        try:
            _make_tile(store, sources if tile.averaged else [copied], tile, room, sink, progress)
        finally:
            rooms.append(room)

    # Readers are the parallelism: helpers of their own would only wait for each other.
    num_torch_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_readers, "phema-read", torch.set_num_threads, (1,)) as pool:
        jobs = [pool.submit(make, tile) for tile in tiles]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        finally:  # after an error, or Ctrl-C, what has not begun is not read
            pool.shutdown(cancel_futures=True)
    torch.set_num_threads(num_torch_threads)  # what threads to come begin with
    for job in done:
        job.result()


def num_bytes(recipes: Sequence[Recipe]) -> int:
    """How many bytes a pass over everything reads, for a progress bar."""
    return sum(file.data_bytes for sigma_rel, snapshot in _used(recipes) for file in _files(snapshot, sigma_rel))


def _used(recipes: Sequence[Recipe]) -> list[tuple[float, Snapshot]]:
    """The stored averages that some recipe needs, by sigma_rel, then t: the order in which they are added."""
    used = {(term.sigma_rel, term.snapshot.t): term.snapshot for recipe in recipes for term in recipe.terms}
    return [(sigma_rel, snapshot) for (sigma_rel, _), snapshot in sorted(used.items())]


def _num_readers(num_targets: int, most: int) -> int:
    """As many as are worthwhile, if all that they hold fits: sums and values in float32, and what was read."""
    others = TERMS_AT_ONCE if prefers_batches(num_targets, torch.float32) else num_targets + 1
    return max(1, min(most, MEMORY_BYTES // (TILE_BYTES * (num_rows(num_targets) + others + 1))))


def _files(snapshot: Snapshot, sigma_rel: float) -> list[ShardFile]:
    return [file for manifest in snapshot.manifests for file in manifest.files if file.sigma_rel == sigma_rel]


class _Room:
    """Memory that a reader works in, reused from tile to tile: fresh pages cost more than what is read into them."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def rows(self, name: str, num_rows: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, until the next call with this name."""
        num_bytes = num_rows * numel * dtype.itemsize
        if name not in self._held or len(self._held[name]) < num_bytes:
            self._held[name] = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        return self._held[name][:num_bytes].view(dtype).view(num_rows, numel)


def _make_tile(
    store: Store, sources: Sequence[Source], tile: Tile, room: _Room, sink: Sink, progress: Progress | None
) -> None:
    """Read the tile of each source, a batch at a time, add them up, and hand out the sums."""
    copied = {k for source in sources for k in source.copied_to}
    summed = [k for k in range(len(sources[0].coefficients)) if k not in copied]
    coefficients = torch.tensor([[s.coefficients[k] for s in sources] for k in summed], dtype=torch.float64)
    coefficients = coefficients.view(len(summed), len(sources))
    sums = room.rows("sums", num_rows(len(summed)), tile.numel, tile.dtype)
    collect = prefers_batches(len(summed), tile.dtype)
    plans: dict[int, list[list[Move]]] = {}

    def read(batch: Sequence[Source], into: torch.Tensor) -> Iterator[torch.Tensor]:
        for source, row in zip(batch, into, strict=True):
            if id(source.layout) not in plans:
                plans[id(source.layout)] = plan_moves(source.layout, tile)
            _read_tile(store, source, plans[id(source.layout)], row, room, progress)
            for k in source.copied_to:
                _hand_out(tile, k, row, sink)
            yield row

    for begin in range(0, len(sources), TERMS_AT_ONCE):
        batch = sources[begin : begin + TERMS_AT_ONCE]
        values = room.rows("values", len(batch) if collect else 1, tile.numel, tile.dtype)
        rows: Iterable[torch.Tensor] = read(batch, values.expand(len(batch), -1))
        if collect:
            deque(rows, maxlen=0)
            rows = values
        add_batch(sums, coefficients[:, begin : begin + TERMS_AT_ONCE], rows, first=begin == 0)
    for k, row in zip(summed, sums, strict=False):
        _hand_out(tile, k, row, sink)


def _hand_out(tile: Tile, k: int, row: torch.Tensor, sink: Sink) -> None:
    for part in tile.parts:
        sink(k, part.fqn, part.box, row[part.start : part.start + part.box.numel].view(part.box.sizes))


def _read_tile(
    store: Store, source: Source, plan: list[list[Move]], row: torch.Tensor, room: _Room, progress: Progress | None
) -> None:
    """Fill a row with the elements of a tile, in its dtype; straight from the file where they lie there alike."""
    for file, moves in zip(source.files, plan, strict=True):
        for start, stop, group in reads_of(moves, file.data_bytes, source.block_bytes):
            move = group[0]
            if (move.first_byte, move.last_byte, move.to_strides, move.dtype) == (start, stop, (1,), row.dtype):
                part = row[move.target : move.target + move.sizes[0]]
                _read_checked(store, source, file, start, part.view(torch.uint8))
            else:
                (data,) = room.rows("read", 1, stop - start, torch.uint8)
                _read_checked(store, source, file, start, data)
                for move in group:
                    found = data[move.first_byte - start : move.last_byte - start].view(move.dtype)
                    row[move.target :].as_strided(move.sizes, move.to_strides).copy_(
                        found.as_strided(move.sizes, move.from_strides)
                    )
            if progress is not None:
                progress(stop - start)


def _read_checked(store: Store, source: Source, file: ShardFile, start: int, data: torch.Tensor) -> None:
    """Fill `data` with whole blocks of a file's data, from byte `start` on, and compare their checksums."""
    key = f"{source.snapshot.folder}/{file.name}"
    view = data.numpy().data
    store.read_into(key, file.header_bytes + start, view)
    for offset in range(0, len(view), source.block_bytes):
        block = view[offset : offset + source.block_bytes]
        if xxhash.xxh3_64_hexdigest(block) != file.checksums[1 + (start + offset) // source.block_bytes]:
            first = start + offset
            raise DamagedError(
                f"{store.describe(key)} is damaged: bytes {first} to {first + len(block)} of its data are not those "
                "that were written (their checksum differs). Delete that snapshot to go on without it.",
                source.snapshot.folder,
            )
