"""One pass over the stored bytes that makes any number of averages.

The work is cut into tiles: a few MiB of a shard file, sharded as most of the snapshots are, and the boxes that lie in
them; a tile is made in strips, small enough to stay in a cache. For a strip the same elements are read from every
snapshot of the recipes in one fixed order, multiplied and added, and handed out. So the result depends neither on the
number of readers nor on how a snapshot was sharded, and memory holds a few strips beside whatever the caller keeps.

Checksums are compared while the bytes come, and some of a block are handed out before its last ones are read: what was
handed out is worth something when `stream` returns.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from threading import Event, local
from typing import TYPE_CHECKING

import torch

from phema_dist.errors import SettingsError
from phema_dist.shard import Box
from phema_dist.storage.manifest import PARAMETER
from phema_dist.storage.store import LocalStore
from phema_dist.synthesis import tiles as cutting
from phema_dist.synthesis.reading import Blocks, Library, Progress, Source, Stretched, copy_moves
from phema_dist.synthesis.sums import TERMS_AT_ONCE, add_batch, num_rows, prefers_batches
from phema_dist.synthesis.tiles import Layout, Move, Tile, cut_strips, cut_tiles, plan_moves, result_dtype

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, ShardFile
    from phema_dist.storage.run import Snapshot
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.recipe import Recipe

# What a reader hands out: target index, tensor, box, and its values (valid only during the call; any thread).
Sink = Callable[[int, str, Box, torch.Tensor], None]

MEMORY_BYTES = 256 << 20
_STRIP_BYTES = 1 << 20  # of a local file, at most: smaller ones lose to steps of Python what they win by caches
_RANGE_BYTES = 16 << 20  # of an object, at most: larger ranges are not faster
_LEAST_STRIP_BYTES = 64 << 10
_SHARE_OF_STRIPS = 0.6  # of the memory, where blocks are kept too


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
    """Make the averages of `recipes`, each at its own t, reading every byte once.

    Args:
        store: where the run lives.
        info: of the run that the recipes were planned from.
        recipes: what to add up.
        sink: takes the results, a few at a time, from several threads at once; every element exactly once. They are
            verified only when all is done: an error means that what was handed out is worthless.
        wanted: the boxes to make of each tensor; None: all of all tensors.
        calculation_dtype: of the sums of float32 averages: float32 or float64.
        memory_bytes: how much memory to use beside what the sink keeps.
        progress: told the number of bytes read, now and then; called from any thread.

    Raises:
        DamagedError: a file is not what its manifest says; names file, rank and tensors.
        SettingsError: `memory_bytes` is too little.
        StorageError: a file could not be read; KeyMissingError if it is gone.
    """
    if not recipes:
        return
    sources = _open_sources(Library(store, info), recipes, info.sigma_rels[0])
    reference = _commonest(sources)
    sizes = _fit(store, info, sources, reference, calculation_dtype, memory_bytes)
    tiles = list(cut_tiles(info, reference, wanted, calculation_dtype, sizes.tile_bytes))
    if not all(source.layout is reference for source in sources):
        # What lies together in one sharding does so, more or less, in the order of tensors in every other.
        order = {fqn: i for i, fqn in enumerate(info.tensors)}
        tiles.sort(key=lambda tile: (order[tile.parts[0].fqn], tile.parts[0].box.offsets))
    blocks = Blocks(store, sizes.kept_bytes, _count_uses(tiles, sources, sizes.strip_numel))
    queue, stopped = iter(tiles), Event()

    # Readers are the parallelism: helpers of their own would only wait for each other.
    num_torch_threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, num_torch_threads)  # what threads to come begin with
        pool = ThreadPoolExecutor(sizes.num_readers, "phema-read", torch.set_num_threads, (1,))
        stack.callback(pool.shutdown)
        fetchers = None
        if sizes.num_fetchers:
            fetchers = ThreadPoolExecutor(sizes.num_fetchers, "phema-fetch", torch.set_num_threads, (1,))
            stack.callback(fetchers.shutdown, cancel_futures=True)
        stack.callback(stopped.set)  # after an error, or Ctrl-C, what has not begun is not read
        sums = {averaged: _Sum.of(sources, averaged=averaged) for averaged in (True, False)}
        work = _Work(store, sums, blocks, sizes.strip_numel, sink, progress, fetchers, stopped, _Room())

        def read() -> None:
            for tile in queue:
                if not stopped.is_set():
                    _make_tile(work, tile)

        done, _ = wait([pool.submit(read) for _ in range(sizes.num_readers)], return_when=FIRST_EXCEPTION)
        for job in done:
            job.result()


def num_bytes(recipes: Sequence[Recipe]) -> int:
    """How many bytes a pass over everything reads, for a progress bar."""
    return sum(file.data_bytes for s, sigma_rel in _used(recipes) for _, file in _files(s, sigma_rel))


def _used(recipes: Sequence[Recipe]) -> list[tuple[Snapshot, float]]:
    """The stored averages that some recipe needs, by sigma_rel, then t: the order in which they are added."""
    used = {(term.sigma_rel, term.snapshot.t): term.snapshot for recipe in recipes for term in recipe.terms}
    return [(snapshot, sigma_rel) for (sigma_rel, _), snapshot in sorted(used.items(), key=lambda item: item[0])]


def _files(snapshot: Snapshot, sigma_rel: float) -> list[tuple[int, ShardFile]]:
    """Of one profile of a snapshot, each with the rank that wrote it."""
    return [(m.rank, file) for m in snapshot.manifests for file in m.files if file.sigma_rel == sigma_rel]


def _open_sources(library: Library, recipes: Sequence[Recipe], sigma_rel_of_buffers: float) -> list[Source]:
    """All that has a part in some result: averages in the order in which they are added, then what has only buffers."""
    used = _used(recipes)
    known = {(snapshot.t, sigma_rel) for snapshot, sigma_rel in used}
    newest = {recipe.newest.t: recipe.newest for recipe in recipes}
    used += [(s, sigma_rel_of_buffers) for t, s in sorted(newest.items()) if (t, sigma_rel_of_buffers) not in known]
    terms = [{(term.snapshot.t, term.sigma_rel): term.coefficient for term in recipe.terms} for recipe in recipes]
    sources = []
    for snapshot, sigma_rel in used:
        files = _files(snapshot, sigma_rel)
        factors = [coefficients.get((snapshot.t, sigma_rel), 0.0) for coefficients in terms]
        buffers = sigma_rel == sigma_rel_of_buffers
        sources.append(
            Source(
                snapshot,
                tuple(file for _, file in files),
                tuple(rank for rank, _ in files),
                library.layout(snapshot, files),
                tuple(factors),
                tuple(k for k, recipe in enumerate(recipes) if factors[k] == 1 and len(recipe.terms) == 1),
                tuple(k for k, recipe in enumerate(recipes) if buffers and recipe.newest.t == snapshot.t),
            )
        )
    return sources


def _commonest(sources: Sequence[Source]) -> Layout:
    """The layout that most of the bytes have: tiles that follow it are read straight into place."""
    counts = Counter(source.layout for source in reversed(sources) if source.averaged)
    return counts.most_common(1)[0][0] if counts else sources[-1].layout


@dataclass(frozen=True)
class _Sizes:
    """How the work is divided so that it fits."""

    num_readers: int
    num_fetchers: int  # that read for them, many at a time; 0: each reader reads for itself
    tile_bytes: int  # of a file of the reference layout
    strip_numel: int
    kept_bytes: int  # of blocks that are needed again


def _fit(
    store: Store, info: RunInfo, sources: Sequence[Source], reference: Layout, dtype: torch.dtype, memory_bytes: int
) -> _Sizes:
    """Choose the largest strips, and then as many readers, as fit.

    A reader holds sums, and rows that are to be added; whoever reads holds what is read, and two blocks of a source.
    """
    is_local = isinstance(store, LocalStore)
    num_targets, num_terms = len(sources[0].coefficients), sum(source.averaged for source in sources)
    few = not prefers_batches(num_targets, dtype)
    num_terms = 1 if is_local and few else num_rows(num_targets) + max(1, min(num_terms, TERMS_AT_ONCE))
    dtypes = {result_dtype(facts) for facts in info.tensors.values() if facts.kind == PARAMETER}
    itemsize = max(dtype.itemsize, *(kind.itemsize for kind in dtypes), 4)
    block_bytes = max(source.block_bytes for source in sources)
    alike = all(source.layout is reference for source in sources)
    most = store.read_concurrency
    largest = _STRIP_BYTES if is_local else _RANGE_BYTES
    strips = [largest >> i for i in range(9) if i == 0 or largest >> i >= _LEAST_STRIP_BYTES]
    for share, strip_bytes in product((1, 2, 4, 8, 16, 32, 64, 128), strips):
        num_readers = max(1, (most if is_local else 2) // share)
        num_fetchers = 0 if is_local else max(1, most // share)
        row_bytes = strip_bytes // 4 * itemsize
        held = num_readers * (num_rows(num_targets) + num_terms) * row_bytes
        held += (num_fetchers or num_readers) * (2 * block_bytes + 2 * row_bytes)
        # What is sharded otherwise comes in blocks that the next strips need, too: keep room for those.
        if held <= memory_bytes * (1 if alike else _SHARE_OF_STRIPS):
            tile_bytes = max(cutting.TILE_BYTES, strip_bytes // 4 * _commonest_itemsize(reference))
            return _Sizes(num_readers, num_fetchers, tile_bytes, strip_bytes // 4, memory_bytes - held)
    least = held if alike else round(held / _SHARE_OF_STRIPS)
    raise SettingsError(
        f"memory_bytes must be at least {least} for {num_targets} averages of this run; got {memory_bytes}."
    )


def _commonest_itemsize(layout: Layout) -> int:
    sizes: Counter[int] = Counter()
    for entries in layout.files:
        for entry in entries:
            sizes[entry.dtype.itemsize] += entry.box.numel
    return sizes.most_common(1)[0][0] if sizes else 1


def _count_uses(
    tiles: Sequence[Tile], sources: Sequence[Source], numel: int
) -> Callable[[Source], Counter[tuple[int, int]]]:
    """How many strips need each block (of each file) of a source, where whole blocks are read."""
    alike = {_kind(source): source for source in sources}
    counts: dict[object, Counter[tuple[int, int]]] = {kind: Counter() for kind in alike}
    for tile in tiles:
        for kind, source in alike.items():
            if not source.takes_part(averaged=tile.averaged) or _lies_alike(source, tile):
                continue
            for strip in cut_strips(tile, numel):
                for index, moves in plan_moves(source.layout, strip).items():
                    counts[kind].update({(index, block) for move in moves for block in move.blocks(source.block_bytes)})
    return lambda source: counts[_kind(source)]


def _kind(source: Source) -> object:
    return source.layout, source.block_bytes, source.averaged, bool(source.buffers_to)


def _lies_alike(source: Source, tile: Tile) -> bool:
    """Whether a tile is whole blocks of a file, in its order, so that checksums can be compared as it is read."""
    stretch, size = tile.stretch, source.block_bytes
    if stretch is None or source.layout is not stretch.layout:
        return False
    return stretch.first_byte % size == 0 and stretch.last_byte in {
        stretch.last_byte // size * size,
        source.files[stretch.file].data_bytes,
    }


@dataclass(frozen=True, eq=False)
class _Sum:
    """What is added up for parameters, or for buffers: these are only copied."""

    sources: list[Source]
    copied: list[tuple[int, ...]]  # for each source, the targets that are just it
    summed: list[int]  # the other targets
    coefficients: torch.Tensor  # [summed, sources]

    @classmethod
    def of(cls, sources: Sequence[Source], *, averaged: bool) -> _Sum:
        """Of those that have a part in it."""
        used = [source for source in sources if source.takes_part(averaged=averaged)]
        copied = [source.copied_to if averaged else source.buffers_to for source in used]
        summed = [k for k in range(len(sources[0].coefficients)) if not any(k in targets for targets in copied)]
        factors = [[source.coefficients[k] for source in used] for k in summed]
        coefficients = torch.tensor(factors, dtype=torch.float64, device="cpu").view(len(summed), len(used))
        return cls(used, copied, summed, coefficients)


class _Room(local):
    """Memory that a thread works in, reused from tile to tile: fresh pages cost more than what is read into them."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def rows(self, name: str, num_rows: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, until the thread's next call with this name."""
        num_bytes = num_rows * numel * dtype.itemsize
        if name not in self._held or len(self._held[name]) < num_bytes:
            self._held.pop(name, None)
            self._held[name] = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        return self._held[name][:num_bytes].view(dtype).view(num_rows, numel)


@dataclass(frozen=True)
class _Work:
    """What all tiles have in common."""

    store: Store
    sums: dict[bool, _Sum]  # of averaged tensors, and of the others
    blocks: Blocks
    strip_numel: int
    sink: Sink
    progress: Progress | None
    fetchers: ThreadPoolExecutor | None
    stopped: Event
    room: _Room


def _make_tile(work: _Work, tile: Tile) -> None:
    """Make a tile strip by strip, in the order of its bytes.

    An error of the sink is held back until all was verified: it may be due to bytes that are not right.
    """
    stretches = [
        Stretched(work.store, source, tile.stretch.file, tile.stretch.first_byte)
        if tile.stretch is not None and _lies_alike(source, tile)
        else None
        for source in work.sums[tile.averaged].sources
    ]
    refused: list[Exception] = []

    def give(strip: Tile, k: int, row: torch.Tensor) -> None:
        try:
            for part in () if refused else strip.parts:
                work.sink(k, part.fqn, part.box, row[part.start : part.start + part.box.numel].view(part.box.sizes))
        except Exception as error:  # noqa: BLE001  raised below
            refused.append(error)

    for strip in cut_strips(tile, work.strip_numel):
        if work.stopped.is_set():
            return
        _make_strip(work, strip, stretches, partial(give, strip))
    if refused:
        raise refused[0]


def _make_strip(
    work: _Work, strip: Tile, stretches: Sequence[Stretched | None], give: Callable[[int, torch.Tensor], None]
) -> None:
    """Read a strip of each source, a batch at a time, add them up, and hand out the sums."""
    job = work.sums[strip.averaged]
    sources, summed = job.sources, job.summed
    sums = work.room.rows("sums", num_rows(len(summed)), strip.numel, strip.dtype)
    plans: dict[Layout, dict[int, list[Move]]] = {}

    def fill(i: int, row: torch.Tensor) -> None:
        source, stretched = sources[i], stretches[i]
        if stretched is not None:
            _read_strip(work, strip, stretched, row)
            return
        moves_of = plans.get(source.layout) or plans.setdefault(source.layout, plan_moves(source.layout, strip))
        for index, moves in moves_of.items():
            copy_moves(work.blocks, source, index, moves, row, work.progress)

    collect = work.fetchers is not None or prefers_batches(len(summed), strip.dtype)
    num_scratch = len(sums) if collect else 0
    for begin in range(0, len(sources), TERMS_AT_ONCE):
        batch = range(begin, min(begin + TERMS_AT_ONCE, len(sources)))
        matrix = work.room.rows("values", num_scratch + (len(batch) if collect else 1), strip.numel, strip.dtype)
        values = matrix[num_scratch:].expand(len(batch), -1)
        rows: Iterable[torch.Tensor] = _filled(fill, batch, values, work.fetchers, job.copied, give)
        if collect:
            deque(rows, maxlen=0)
            rows = matrix
        add_batch(sums, job.coefficients[:, begin : begin + TERMS_AT_ONCE], rows, first=begin == 0)
    for k, row in zip(summed, sums, strict=False):
        give(k, row)


def _filled(
    fill: Callable[[int, torch.Tensor], None],
    batch: Sequence[int],
    rows: torch.Tensor,
    fetchers: ThreadPoolExecutor | None,
    copied: Sequence[Sequence[int]],
    give: Callable[[int, torch.Tensor], None],
) -> Iterator[torch.Tensor]:
    """The rows of a batch, filled, in order; each is given to the targets that are just a copy of it."""
    for i, row, _ in zip(batch, rows, (map if fetchers is None else fetchers.map)(fill, batch, rows), strict=True):
        for k in copied[i]:
            give(k, row)
        yield row


def _read_strip(work: _Work, strip: Tile, stretched: Stretched, row: torch.Tensor) -> None:
    """Fill a row with what a file has next; straight, if it has the dtype of the sums."""
    assert strip.stretch is not None  # noqa: S101
    dtype = strip.stretch.dtype
    read = row if dtype == row.dtype else work.room.rows("read", 1, strip.numel, dtype)[0]
    stretched.read(read.view(torch.uint8).numpy().data)
    if read is not row:
        row.copy_(read)
    if work.progress is not None:
        work.progress(read.nbytes)
