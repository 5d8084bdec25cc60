"""What lies where: stored shards, the stretches of work that they are cut into, and which bytes go where in those.

Pure arithmetic on boxes: nothing here reads a byte.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from phema_dist.errors import SettingsError
from phema_dist.shard import Box, flat_range_to_boxes, flat_span, intersect
from phema_dist.storage.manifest import BLOCK_BYTES, PARAMETER
from phema_dist.storage.snapshot import AVERAGE_DTYPES, DTYPES

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, TensorFacts
    from phema_dist.storage.snapshot import Entry

TILE_BYTES = BLOCK_BYTES  # of a file of the reference layout; larger ones are multiples of it
SPAN_BYTES = BLOCK_BYTES // 4  # of a file, from the first element of a move to its last: so it needs two blocks at most


class _Places(NamedTuple):
    """The entries of a tensor, in the order of their first rows."""

    entries: list[tuple[int, Entry]]  # each with the index of its file
    starts: list[int]
    ends: list[int]  # the furthest end of an entry, up to here

    def near(self, box: Box) -> list[tuple[int, Entry]]:
        """Those that share rows with a box."""
        if not box.offsets:
            return self.entries
        first = bisect_right(self.ends, box.offsets[0])
        return self.entries[first : bisect_left(self.starts, box.offsets[0] + box.sizes[0])]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tensors of one profile of a snapshot lie: the entries of each of its files."""

    files: tuple[tuple[Entry, ...], ...]
    places: dict[str, _Places] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found: dict[str, list[tuple[int, Entry]]] = {}
        for index, entries in enumerate(self.files):
            for entry in entries:
                found.setdefault(entry.fqn, []).append((index, entry))
        for fqn, entries_of in found.items():
            entries_of.sort(key=lambda place: place[1].box.offsets)
            starts = [entry.box.offsets[0] if entry.box.offsets else 0 for _, entry in entries_of]
            lengths = [entry.box.num_rows for _, entry in entries_of]
            ends = accumulate(map(int.__add__, starts, lengths), max)
            self.places[fqn] = _Places(entries_of, starts, list(ends))

    def boxes(self, fqn: str) -> list[Box]:
        """Of a tensor, in all files."""
        return [entry.box for _, entry in self.places[fqn].entries] if fqn in self.places else []


class Part(NamedTuple):
    """A box of a tensor in a tile, from element `start` of the tile on."""

    fqn: str
    box: Box
    start: int


class Stretch(NamedTuple):
    """Bytes of a file's data, of one dtype."""

    layout: Layout
    file: int
    first_byte: int
    last_byte: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Tile:
    """A stretch of work: boxes that are made, and handed out, together. Parameters and buffers never mix."""

    parts: tuple[Part, ...]
    numel: int
    averaged: bool
    dtype: torch.dtype  # of the sums
    stretch: Stretch | None  # of the reference layout, if the tile is just that, and whole blocks


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

    def blocks(self, block_bytes: int) -> range:
        """The numbers of the blocks that hold them."""
        return range(self.first_byte // block_bytes, -(-self.last_byte // block_bytes))


def result_dtype(facts: TensorFacts) -> torch.dtype:
    """Of a synthesized tensor: float32, unless the model's precision is higher; a buffer keeps its own."""
    dtype = DTYPES[facts.dtype]
    return AVERAGE_DTYPES[dtype] if facts.kind == PARAMETER else dtype


def cast(values: torch.Tensor, dtype: torch.dtype, fqn: str) -> torch.Tensor:
    """Values of a tensor in another dtype. Raises SettingsError if it cannot hold them, but for rounding."""
    found = values.to(dtype)
    if dtype != values.dtype:
        back = found.to(values.dtype)
        rounds = values.is_floating_point() or values.is_complex()
        if not (torch.equal(back.isfinite(), values.isfinite()) if rounds else torch.equal(back, values)):
            raise SettingsError(f"{fqn} exceeds the range of {str(dtype)[6:]}; choose a wider dtype, as bfloat16.")
    return found


def cut_tiles(
    info: RunInfo,
    layout: Layout,
    wanted: Mapping[str, Sequence[Box]] | None,
    calculation_dtype: torch.dtype,
    tile_bytes: int,
) -> Iterator[Tile]:
    """Follow the files of the layout, so that a tile is one stretch of bytes wherever a snapshot is sharded alike."""
    for index, entries in enumerate(layout.files):
        cuts = (
            cut for entry in entries for cut in _cuts(entry, info.tensors[entry.fqn], calculation_dtype, tile_bytes)
        )
        for kind, group in groupby(cuts, key=lambda cut: cut[0]):
            parts, numel, positions, whole = [], 0, [], True
            for _, entry, cut, position in group:
                boxes = (
                    [cut] if wanted is None else [b for box in wanted.get(entry.fqn, ()) if (b := intersect(cut, box))]
                )
                for box in boxes:
                    parts.append(Part(entry.fqn, box, numel))
                    numel += box.numel
                whole = whole and boxes == [cut]
                positions += [position, position + cut.numel * kind.stored.itemsize]
            if not parts:
                continue
            first, last = positions[0], positions[-1]
            whole = whole and first % tile_bytes == 0 and (last % tile_bytes == 0 or last == entries[-1].stop)
            stretch = Stretch(layout, index, first, last, kind.stored) if whole else None
            yield Tile(tuple(parts), numel, kind.averaged, kind.dtype, stretch)


class _Kind(NamedTuple):
    """What the elements of a tile have in common."""

    number: int  # of the tile in its file
    averaged: bool
    dtype: torch.dtype
    stored: torch.dtype


def _cuts(
    entry: Entry, facts: TensorFacts, calculation_dtype: torch.dtype, tile_bytes: int
) -> Iterator[tuple[_Kind, Entry, Box, int]]:
    """The boxes of an entry, cut where a tile ends in the file, each with its first byte."""
    averaged, dtype = facts.kind == PARAMETER, result_dtype(facts)
    if averaged and dtype == torch.float32:
        dtype = calculation_dtype
    size, start = entry.dtype.itemsize, 0
    while start < entry.box.numel:
        number = (entry.start + start * size) // tile_bytes
        stop = min(entry.box.numel, max(start + 1, ((number + 1) * tile_bytes - entry.start) // size))
        for box in flat_range_to_boxes(entry.box, start, stop):
            yield _Kind(number, averaged, dtype, entry.dtype), entry, box, entry.start + start * size
            start += box.numel


def cut_strips(tile: Tile, numel: int) -> Iterator[Tile]:
    """Cut a tile into tiles of `numel` elements, in their order."""
    if tile.numel <= numel:
        yield tile
        return
    parts: list[Part] = []
    begin = 0
    for part in tile.parts:
        done = 0
        while done < part.box.numel:
            stop = min(part.box.numel, begin + numel - part.start)
            for box in flat_range_to_boxes(part.box, done, stop):
                parts.append(Part(part.fqn, box, part.start + done - begin))
                done += box.numel
            if part.start + done == begin + numel:
                yield _strip(tile, parts, begin, begin + numel)
                parts, begin = [], begin + numel
    if parts:
        yield _strip(tile, parts, begin, tile.numel)


def _strip(tile: Tile, parts: Sequence[Part], begin: int, end: int) -> Tile:
    stretch = tile.stretch
    if stretch:
        start, size = stretch.first_byte, stretch.dtype.itemsize
        stretch = stretch._replace(first_byte=start + begin * size, last_byte=start + end * size)
    return replace(tile, parts=tuple(parts), numel=end - begin, stretch=stretch)


def plan_moves(layout: Layout, tile: Tile) -> dict[int, list[Move]]:
    """For each file of a layout that has something of the tile: the moves that fill it, in the order of their bytes."""
    plan: dict[int, list[Move]] = {}
    for part in tile.parts:
        for index, entry in layout.places[part.fqn].near(part.box):
            shared = intersect(entry.box, part.box)
            if shared is None:
                continue
            moves = plan.setdefault(index, [])
            for box in _halved(shared, entry.box, SPAN_BYTES // entry.dtype.itemsize):
                move = _move(box, entry, part)
                if moves and (joined := _join(moves[-1], move)):
                    moves[-1] = joined
                else:
                    moves.append(move)
    for moves in plan.values():
        moves.sort(key=lambda move: move.first_byte)
    return plan


def _halved(box: Box, outer: Box, span: int) -> Iterator[Box]:
    """Cut a box until the elements of each lie close together in `outer`: what lies between is read with them."""
    first, last, _ = flat_span(box, outer)
    if last - first <= span:
        yield box
        return
    dim = next(dim for dim, size in enumerate(box.sizes) if size > 1)
    size = box.sizes[dim]
    for start, stop in ((0, size // 2), (size // 2, size)):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim], sizes[dim] = offsets[dim] + start, stop - start
        yield from _halved(Box(tuple(offsets), tuple(sizes)), outer, span)


def _move(box: Box, entry: Entry, part: Part) -> Move:
    first, last, dense = flat_span(box, entry.box)
    target, _, dense_there = flat_span(box, part.box)
    flat = dense and dense_there
    size = entry.dtype.itemsize
    return Move(
        entry.start + first * size,
        entry.start + last * size,
        entry.dtype,
        part.start + target,
        (box.numel,) if flat else box.sizes,
        (1,) if flat else _strides(entry.box),
        (1,) if flat else _strides(part.box),
    )


def _strides(box: Box) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(box.sizes[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _join(a: Move, b: Move) -> Move | None:
    """Two flat moves as one, if the second continues the first on both sides, and they are not too long for that."""
    if (
        (a.dtype, a.from_strides, a.to_strides) == (b.dtype, (1,), (1,))
        and b.from_strides == b.to_strides == (1,)
        and (a.last_byte, a.target + a.sizes[0]) == (b.first_byte, b.target)
        and b.last_byte - a.first_byte <= SPAN_BYTES
    ):
        return replace(a, last_byte=b.last_byte, sizes=(a.sizes[0] + b.sizes[0],))
    return None
