"""One pass over the stored bytes that makes any number of averages.

The work is cut into tiles: a few MiB of a shard file, sharded as most of the snapshots are, and the boxes that lie in
them; a tile is made in strips, small enough to stay in a cache. For a strip the same elements are read from every
snapshot of the recipes in one fixed order, multiplied and added, and handed out. So the result depends neither on the
number of readers nor on how a snapshot was sharded, and memory holds a few strips beside whatever the caller keeps.

Checksums are compared while the bytes come, and some of a block are handed out before its last ones are read: what was
handed out is worth something when `stream` returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from threading import Condition, Event, Lock, local
from typing import TYPE_CHECKING

import torch

from phema_dist.shard import Box
from phema_dist.synthesis.reading import Blocks, Library, Progress, Source, Stretched, copy_moves, private_memory
from phema_dist.synthesis.sizes import divide, lies_alike, window
from phema_dist.synthesis.sums import add_batch, num_rows, prefers_batches
from phema_dist.synthesis.tiles import Layout, Move, Tile, cut_strips, plan_moves

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, ShardFile
    from phema_dist.storage.run import Snapshot
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.recipe import Recipe, Term

# What a reader hands out: target index, tensor, box, and its values (valid only during the call; any thread).
Sink = Callable[[int, str, Box, torch.Tensor], None]

MEMORY_BYTES = 256 << 20
_lock = Lock()
_saved: list[int] = []  # torch's number of threads before the first of the streams at work; once for each of them


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
    sizes = divide(store, info, sources, reference, wanted, calculation_dtype, memory_bytes)
    blocks = Blocks(store, sizes.blocks_bytes, sizes.uses)
    turns, stopped = _Turns(len(sizes.tiles), window(sizes.num_readers)), Event()

    with ExitStack() as stack:
        # Readers are the parallelism: helpers of their own would only wait for each other.
        stack.enter_context(_torch_threads_restored())
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
            while (number := turns.take()) is not None:
                try:
                    if not stopped.is_set():
                        _make_tile(work, sizes.tiles[number])
                finally:
                    turns.done(number)

        done, _ = wait([pool.submit(read) for _ in range(sizes.num_readers)], return_when=FIRST_EXCEPTION)
        for job in done:
            job.result()


@contextmanager
def _torch_threads_restored() -> Iterator[None]:
    """Give torch its number of threads again, after all streams that overlap: what the first of them found."""
    with _lock:
        _saved.append(_saved[0] if _saved else torch.get_num_threads())
    try:
        yield
    finally:
        with _lock:
            # Earlier ones, too: for their own thread, and no reader of the others is without a number of its own.
            torch.set_num_threads(_saved.pop())


def num_bytes(recipes: Sequence[Recipe]) -> int:
    """How many bytes a pass over everything reads, for a progress bar."""
    return sum(file.data_bytes for term in _used(recipes) for _, file in _files(term.snapshot, term.sigma_rel))


def _used(recipes: Sequence[Recipe]) -> list[Term]:
    """The stored averages that some recipe needs, by sigma_rel, then t: the order in which they are added."""
    used = {(term.sigma_rel, term.snapshot.t): term for recipe in recipes for term in recipe.terms}
    return [used[key] for key in sorted(used)]


def _files(snapshot: Snapshot, sigma_rel: float) -> list[tuple[int, ShardFile]]:
    """Of one profile of a snapshot, each with the rank that wrote it."""
    return [(m.rank, file) for m in snapshot.manifests for file in m.files if file.sigma_rel == sigma_rel]


def _open_sources(library: Library, recipes: Sequence[Recipe], sigma_rel_of_buffers: float) -> list[Source]:
    """All that has a part in some result: averages in the order in which they are added, then what has only buffers."""
    used: dict[tuple[int, float], tuple[Snapshot, object]] = {
        (term.snapshot.t, term.sigma_rel): (term.snapshot, term.batch) for term in _used(recipes)
    }
    for recipe in sorted(recipes, key=lambda recipe: recipe.newest.t):
        used.setdefault((recipe.newest.t, sigma_rel_of_buffers), (recipe.newest, recipe.newest.folder))
    terms = [{(term.snapshot.t, term.sigma_rel): term.coefficient for term in recipe.terms} for recipe in recipes]
    sources = []
    for (_, sigma_rel), (snapshot, batch) in used.items():
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
                (sigma_rel, batch),
            )
        )
    return sources


def _commonest(sources: Sequence[Source]) -> Layout:
    """The layout that most of the bytes have: tiles that follow it are read straight into place."""
    counts = Counter(source.layout for source in reversed(sources) if source.averaged)
    return counts.most_common(1)[0][0] if counts else sources[-1].layout


@dataclass(frozen=True, eq=False)
class _Sum:
    """What is added up for parameters, or for buffers: these are only copied."""

    sources: list[Source]
    copied: list[tuple[int, ...]]  # for each source, the targets that are just it
    summed: list[int]  # the other targets
    coefficients: torch.Tensor  # [summed, sources]
    batches: list[slice]  # of sources that are added up together

    @classmethod
    def of(cls, sources: Sequence[Source], *, averaged: bool) -> _Sum:
        """Of those that have a part in it."""
        used = [source for source in sources if source.takes_part(averaged=averaged)]
        copied = [source.copied_to if averaged else source.buffers_to for source in used]
        summed = [k for k in range(len(sources[0].coefficients)) if not any(k in targets for targets in copied)]
        factors = [[source.coefficients[k] for source in used] for k in summed]
        coefficients = torch.tensor(factors, dtype=torch.float64, device="cpu").view(len(summed), len(used))
        ends = list(accumulate(len(list(batch)) for _, batch in groupby(used, key=lambda source: source.batch)))
        return cls(used, copied, summed, coefficients, list(map(slice, [0, *ends], ends)))


class _Turns:
    """Which tile is next. Readers stay near each other: blocks are kept for all from the first to the last."""

    def __init__(self, num_tiles: int, window: int) -> None:
        self._next, self._num_tiles, self._window = 0, num_tiles, window
        self._at_work: set[int] = set()
        self._changed = Condition()

    def take(self) -> int | None:
        """The next tile, as soon as it is near; None: there is no more."""
        with self._changed:
            if self._next == self._num_tiles:
                return None
            number, self._next = self._next, self._next + 1
            self._at_work.add(number)
            self._changed.wait_for(lambda: number < min(self._at_work) + self._window)
            return number

    def done(self, number: int) -> None:
        """Let others go on."""
        with self._changed:
            self._at_work.remove(number)
            self._changed.notify_all()


class _Room(local):
    """Memory that a thread works in, reused from tile to tile: fresh pages cost more than what is read into them."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def rows(self, name: str, num_rows: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, until the thread's next call with this name."""
        num_bytes = num_rows * numel * dtype.itemsize
        if name not in self._held or len(self._held[name]) < num_bytes:
            self._held.pop(name, None)
            self._held[name] = private_memory(num_bytes)
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
        if tile.stretch is not None and lies_alike(source, tile)
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
    collect = work.fetchers is not None or prefers_batches(len(summed), strip.dtype)
    num_sums = num_rows(len(summed)) if collect else len(summed)
    sums, scratch = (work.room.rows(name, num_sums, strip.numel, strip.dtype) for name in ("sums", "scratch"))
    plans: dict[Layout, dict[int, list[Move]]] = {}

    def fill(i: int, row: torch.Tensor) -> None:
        source, stretched = sources[i], stretches[i]
        if stretched is not None:
            _read_strip(work, strip, stretched, row)
            return
        moves_of = plans.get(source.layout) or plans.setdefault(source.layout, plan_moves(source.layout, strip))
        for index, moves in moves_of.items():
            copy_moves(work.blocks, source, index, moves, row, work.progress)

    for batch in job.batches:
        numbers = range(len(sources))[batch]
        values = work.room.rows("values", len(numbers) if collect else 1, strip.numel, strip.dtype)
        rows = values.expand(len(numbers), -1)
        filled = _filled(fill, numbers, rows, work.fetchers, job.copied, give)
        if collect:
            for _ in filled:
                pass
        add_batch(sums, job.coefficients[:, batch], rows if collect else filled, first=not batch.start, scratch=scratch)
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
