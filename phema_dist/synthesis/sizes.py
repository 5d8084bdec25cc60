"""How a pass is divided among readers, tiles and strips: so that it fits into memory, and reads every byte once.

A snapshot sharded like the reference is read straight through. Of any other whole blocks are read, and one that later
strips need too must be kept until then. So fewer readers and other strips are taken before a block is read twice.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, takewhile
from typing import TYPE_CHECKING

import numpy as np

from phema_dist.errors import SettingsError
from phema_dist.storage.manifest import PARAMETER
from phema_dist.storage.store import LocalStore
from phema_dist.synthesis import tiles as cutting
from phema_dist.synthesis.sums import num_rows, prefers_batches
from phema_dist.synthesis.tiles import Layout, Tile, cut_strips, cut_tiles, plan_moves, result_dtype

if TYPE_CHECKING:
    import torch

    from phema_dist.shard import Box
    from phema_dist.storage.manifest import RunInfo
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.reading import Source, Uses

_STRIP_BYTES = 2 << 20  # of a local file: smaller ones lose to steps of Python what they win by caches
_RANGE_BYTES = 16 << 20  # of an object: larger ranges are not faster, and a quarter of this is nearly as fast
_LEAST_STRIP_BYTES = 64 << 10
_LARGEST_TRIED = 3  # strips, where nothing reads everything once: the larger, the fewer blocks lie across their ends
_BLOCKS_IN_USE = 2  # of one who reads, at most
_log = logging.getLogger("phema_dist")


@dataclass(frozen=True)
class Division:
    """How the work is divided."""

    num_readers: int
    num_fetchers: int  # that read for them, many at a time; 0: each reader reads for itself
    strip_numel: int
    tiles: Sequence[Tile]  # in the order in which they are made
    blocks_bytes: int  # room for whole blocks, in use or kept
    uses: Callable[[Source], Uses]  # the strips that need each block of a source, where whole blocks are read


def divide(
    store: Store,
    info: RunInfo,
    sources: Sequence[Source],
    reference: Layout,
    wanted: Mapping[str, Sequence[Box]] | None,
    dtype: torch.dtype,
    memory_bytes: int,
) -> Division:
    """Choose as many readers as fit, and then the best strips, such that each block is read once.

    Where that cannot be, a warning tells so, and that is chosen which reads the least.

    Raises:
        SettingsError: `memory_bytes` is too little for anything.
    """

    @cache
    def touched_in(tile_bytes: int, strip_bytes: int, order: tuple[str, ...]) -> _Touched:
        tiles = list(cut_tiles(info, reference, wanted, dtype, tile_bytes))
        if order:
            places = {fqn: i for i, fqn in enumerate(order)}
            tiles.sort(key=lambda tile: (places[tile.parts[0].fqn], tile.parts[0].box.offsets))
        return _touch(tiles, sources, strip_bytes // 4)

    ways = list(_ways(store, info, sources, reference, dtype))
    # What lies together in one sharding does so in another file by file, if both are cut along one dimension, and else
    # tensor by tensor.
    orders = [(), tuple(info.tensors)] if any(source.layout is not reference for source in sources) else [()]
    size = (ways[0].tile_bytes, ways[0].strip_bytes)
    alone = replace(ways[0], num_readers=1, num_fetchers=1)
    order = min(orders, key=lambda order: touched_in(*size, order).needed_bytes(alone))

    def touched(way: _Way, strip_bytes: int) -> _Touched:
        return touched_in(way.tile_bytes, strip_bytes, order)

    smallest = min(ways, key=lambda way: way.held_bytes + way.blocks_in_use)
    least = touched(smallest, smallest.strip_bytes).held_bytes(smallest)
    if memory_bytes < least:
        raise SettingsError(
            f"memory_bytes must be at least {least} for {len(sources[0].coefficients)} averages of this run; got "
            f"{memory_bytes}."
        )
    known: dict[int, int] = {}  # for tiles of that size, strips for which it is known what they touch
    for way in (way for way in ways if way.held_bytes <= memory_bytes):
        # Smaller strips of the same tiles have all their ends, and more: what is kept there can only be more.
        coarser = known.get(way.tile_bytes, 0)
        if coarser > way.strip_bytes and touched(way, coarser).needed_bytes(way) > memory_bytes:
            continue
        known.setdefault(way.tile_bytes, way.strip_bytes)
        if (found := touched(way, way.strip_bytes)).needed_bytes(way) <= memory_bytes:
            return _division(way, found, memory_bytes)
    last = (ways[-1].num_readers, ways[-1].num_fetchers)
    return _least_read([way for way in ways if (way.num_readers, way.num_fetchers) == last], touched, memory_bytes)


def _least_read(ways: Sequence[_Way], touched: Callable[[_Way, int], _Touched], memory_bytes: int) -> Division:
    """Of ways that all read some blocks again, what reads the least."""
    fitting = [way for way in ways if touched(way, way.strip_bytes).held_bytes(way) <= memory_bytes]
    fitting.sort(key=lambda way: -way.strip_bytes)
    tried = [way for i, way in enumerate(fitting) if i < _LARGEST_TRIED or way.strip_bytes >= ways[0].strip_bytes]

    def times_read(way: _Way) -> float:
        room = memory_bytes - way.held_bytes - way.blocks_in_use // _BLOCKS_IN_USE  # one is mostly in use, not all
        return touched(way, way.strip_bytes).times_read(room)

    best = min(tried, key=times_read)
    _log.warning(
        "With memory_bytes=%d about %.2f times the bytes will be read, for blocks that are needed again cannot all be "
        "kept. memory_bytes=%d would read each once.",
        memory_bytes,
        times_read(best),
        min(
            touched(way, way.strip_bytes).needed_bytes(way)
            for way in [ways[0], *tried]
            if way.strip_bytes >= ways[0].strip_bytes
        ),
    )
    return _division(best, touched(best, best.strip_bytes), memory_bytes)


@dataclass(frozen=True)
class _Way:
    """One way to divide the work."""

    num_readers: int
    num_fetchers: int
    strip_bytes: int  # as float32
    tile_bytes: int  # of a file of the reference layout
    blocks_in_use: int  # bytes, where whole blocks are read
    held_bytes: int  # without blocks


def _ways(
    store: Store, info: RunInfo, sources: Sequence[Source], reference: Layout, dtype: torch.dtype
) -> Iterator[_Way]:
    """The most readers first; for as many, strips of the best size, then smaller ones, then larger ones.

    A reader holds sums, and rows that are to be added; whoever reads holds what is read, and perhaps two blocks.
    """
    is_local = isinstance(store, LocalStore)
    num_targets = len(sources[0].coefficients)
    num_terms = max(Counter(source.batch for source in sources if source.averaged).values(), default=1)  # of a batch
    dtypes = {result_dtype(facts) for facts in info.tensors.values() if facts.kind == PARAMETER}
    rows = 2 * num_targets + 1
    if not is_local or any(prefers_batches(num_targets, kind) for kind in (dtype, *dtypes)):
        rows = 2 * num_rows(num_targets) + num_terms
    itemsize = max(dtype.itemsize, *(kind.itemsize for kind in dtypes), 4)
    best, most = _STRIP_BYTES if is_local else _RANGE_BYTES, store.read_concurrency
    file_bytes = max(file.data_bytes for source in sources for file in source.files)
    strips = [best, *takewhile(lambda size: size >= _LEAST_STRIP_BYTES, (best >> i for i in count(1)))]
    strips += takewhile(lambda size: size < 4 * max(file_bytes, best), (best << 2 * i for i in count(1)))
    block_bytes = max(source.block_bytes for source in sources)
    shares = [1 << i for i in range(max(most, 2).bit_length())]
    crews = {
        (max(1, most // n), 0) if is_local else (max(1, 2 // n), max(1, most // n)): None for n in shares
    }  # each once, in this order
    pairs = [(crew, strip_bytes) for crew in crews for strip_bytes in strips]
    if not is_local:  # whoever waits for answers gains more by ranges of some size than by a second reader
        pairs.sort(key=lambda pair: -min(pair[1], best // 4) if pair[0][1] == most else 0)
    for (num_readers, num_fetchers), strip_bytes in pairs:
        row_bytes = strip_bytes // 4 * itemsize
        in_use = (num_fetchers or num_readers) * _BLOCKS_IN_USE * block_bytes
        held = num_readers * rows * row_bytes + (num_fetchers or num_readers) * 2 * row_bytes
        tile_bytes = max(cutting.TILE_BYTES, strip_bytes // 4 * _commonest_itemsize(reference))
        yield _Way(num_readers, num_fetchers, strip_bytes, tile_bytes, in_use, held)


def _commonest_itemsize(layout: Layout) -> int:
    sizes: Counter[int] = Counter()
    for entries in layout.files:
        for entry in entries:
            sizes[entry.dtype.itemsize] += entry.box.numel
    return sizes.most_common(1)[0][0] if sizes else 1


def _division(way: _Way, touched: _Touched, memory_bytes: int) -> Division:
    room = memory_bytes - way.held_bytes
    uses = touched.uses
    return Division(
        way.num_readers,
        way.num_fetchers,
        way.strip_bytes // 4,
        touched.tiles,
        room,
        lambda source: uses[_kind(source)],
    )


@dataclass(frozen=True, eq=False)
class _Touched:
    """What strips touch of the blocks of all sources, where whole blocks are read. Strips are numbered in their order.

    Blocks are kept across the cuts between strips: cut i is the one before strip i.
    """

    tiles: Sequence[Tile]
    uses: Mapping[object, Mapping[tuple[int, int], Sequence[int]]]  # for each kind of source
    ends: Sequence[int]  # the cuts where tiles begin, and the last one ends
    begun: np.ndarray  # [cuts] bytes of the blocks that are touched more than once, and before this cut
    done: np.ndarray  # [cuts] of those, what is not touched after it
    beside: np.ndarray  # [strips] bytes that are kept while a strip is made, beside those of the source that is read
    beside_own: int  # bytes that may be kept of that source, in other files
    returning: np.ndarray  # [strips] bytes of the blocks that were touched before
    all_kept: int  # bytes of the blocks that are touched more than once
    once: int  # bytes of everything, read once
    in_blocks: int  # of those, what is read as whole blocks

    def held_bytes(self, way: _Way) -> int:
        """What is held without blocks that are kept."""
        return way.held_bytes + min(way.blocks_in_use, self.in_blocks)

    def needed_bytes(self, way: _Way) -> int:
        """With the most that is kept while the readers are as near each other as `window` says."""
        held = self.held_bytes(way)
        if way.num_readers > 1:
            near = np.arange(len(self.tiles)) + window(way.num_readers)
            first, last = self.ends[:-1], np.minimum(near, len(self.tiles))
            return held + int((self.begun[np.asarray(self.ends)[last]] - self.done[first]).max(initial=0))
        return held + min(int(self.beside.max(initial=0)) + self.beside_own * max(1, way.num_fetchers), self.all_kept)

    def times_read(self, kept_bytes: int) -> float:
        """How often the bytes are read, about, by one reader that can keep so many."""
        missing = 1 - np.minimum(kept_bytes / np.maximum(self.beside, 1), 1)
        return 1 + float((self.returning * missing).sum()) / max(self.once, 1)


def _touch(tiles: Sequence[Tile], sources: Sequence[Source], numel: int) -> _Touched:
    """Cut tiles into strips of `numel` elements, and see what they touch."""
    num_of = Counter(map(_kind, sources))
    alike = {_kind(source): source for source in sources}
    uses: dict[object, dict[tuple[int, int], list[int]]] = {kind: {} for kind in alike}
    once, in_blocks, ends = 0, 0, [0]
    for tile in tiles:
        strips = list(cut_strips(tile, numel))
        for kind, source in alike.items():
            if not source.takes_part(averaged=tile.averaged):
                continue
            if lies_alike(source, tile):
                assert tile.stretch is not None  # noqa: S101
                once += num_of[kind] * (tile.stretch.last_byte - tile.stretch.first_byte)
                continue
            for number, strip in enumerate(strips, ends[-1]):
                for place in _blocks(source, strip):
                    uses[kind].setdefault(place, []).append(number)
        ends.append(ends[-1] + len(strips))

    begun, done, beside, returning = (np.zeros(ends[-1] + 1, np.int64) for _ in range(4))
    beside_own = all_kept = 0
    for kind, source in alike.items():
        kept, during = np.zeros((2, ends[-1] + 2), np.int64)  # of one such source: changes at cuts, and at strips
        for (file, block), numbers in uses[kind].items():
            num_bytes = min(source.block_bytes, source.files[file].data_bytes - block * source.block_bytes)
            in_blocks += num_of[kind] * num_bytes
            if len(numbers) > 1:
                all_kept += num_of[kind] * num_bytes
                kept[[numbers[0] + 1, numbers[-1] + 1]] += num_bytes, -num_bytes
                during[[numbers[0], numbers[-1] + 1]] += num_bytes, -num_bytes
                begun[numbers[0] + 1] += num_of[kind] * num_bytes
                done[numbers[-1] + 1] += num_of[kind] * num_bytes
                returning[numbers[1:]] += num_of[kind] * num_bytes
        kept, during = kept.cumsum(), during.cumsum()[:-1]
        around = np.maximum(kept[:-1], kept[1:])
        beside += num_of[kind] * around
        beside_own = max(beside_own, int((during - around).max()))
    once += in_blocks
    return _Touched(
        tiles, uses, ends, begun.cumsum(), done.cumsum(), beside, beside_own, returning, all_kept, once, in_blocks
    )


def _blocks(source: Source, strip: Tile) -> set[tuple[int, int]]:
    """The blocks of a source, each with its file, that have something of a strip."""
    moves_of = plan_moves(source.layout, strip).items()
    return {(file, block) for file, moves in moves_of for move in moves for block in move.blocks(source.block_bytes)}


def window(num_readers: int) -> int:
    """How many tiles may lie from the first to the last that is made: for blocks are kept in between."""
    return 2 * num_readers


def _kind(source: Source) -> object:
    return source.layout, source.block_bytes, source.averaged, bool(source.buffers_to)


def lies_alike(source: Source, tile: Tile) -> bool:
    """Whether a tile is whole blocks of a file, in its order, so that checksums can be compared as it is read."""
    stretch, size = tile.stretch, source.block_bytes
    if stretch is None or source.layout is not stretch.layout:
        return False
    return stretch.first_byte % size == 0 and stretch.last_byte in {
        stretch.last_byte // size * size,
        source.files[stretch.file].data_bytes,
    }
