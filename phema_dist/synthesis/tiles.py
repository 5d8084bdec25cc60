"""What lies where: stored shards, the stretches of work that they are cut into, and which bytes go where in those.

Pure arithmetic on boxes: nothing here reads a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from phema_dist.shard import Box, flat_range_to_boxes, flat_span, intersect
from phema_dist.storage.manifest import BLOCK_BYTES, PARAMETER
from phema_dist.storage.snapshot import AVERAGE_DTYPES, DTYPES

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, TensorFacts
    from phema_dist.storage.snapshot import Entry

TILE_BYTES = BLOCK_BYTES  # of the newest snapshot's file


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tensors of one profile of a snapshot lie: the entries of each of its files."""

    files: tuple[tuple[Entry, ...], ...]
    places: dict[str, list[tuple[int, Entry]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, entries in enumerate(self.files):
            for entry in entries:
                self.places.setdefault(entry.fqn, []).append((index, entry))


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


def result_dtype(facts: TensorFacts) -> torch.dtype:
    """Of a synthesized tensor: float32, unless the model's precision is higher; a buffer keeps its own."""
    dtype = DTYPES[facts.dtype]
    return AVERAGE_DTYPES[dtype] if facts.kind == PARAMETER else dtype


def cut_tiles(
    info: RunInfo,
    layout: Layout,
    wanted: Mapping[str, Sequence[Box]] | None,
    calculation_dtype: torch.dtype,
) -> Iterator[Tile]:
    """Follow the files of the layout, so that a tile is one stretch of bytes wherever a snapshot is sharded alike."""
    for entries in layout.files:
        cuts = (cut for entry in entries for cut in _cuts(entry, info.tensors[entry.fqn], calculation_dtype))
        for (_, averaged, dtype), group in groupby(cuts, key=lambda cut: cut[0]):
            parts, numel = [], 0
            for _, fqn, cut in group:
                boxes = [cut] if wanted is None else [intersect(cut, box) for box in wanted.get(fqn, ())]
                for box in filter(None, boxes):
                    parts.append(Part(fqn, box, numel))
                    numel += box.numel
            if parts:
                yield Tile(tuple(parts), numel, averaged, dtype)


def _cuts(
    entry: Entry, facts: TensorFacts, calculation_dtype: torch.dtype
) -> Iterator[tuple[tuple[int, bool, torch.dtype], str, Box]]:
    """The boxes of an entry, cut where a tile ends in the file; with the tile's number, whether averaged, and dtype."""
    averaged, dtype = facts.kind == PARAMETER, result_dtype(facts)
    if averaged and dtype == torch.float32:
        dtype = calculation_dtype
    size, start = entry.dtype.itemsize, 0
    while start < entry.box.numel:
        number = (entry.start + start * size) // TILE_BYTES
        stop = min(entry.box.numel, max(start + 1, ((number + 1) * TILE_BYTES - entry.start) // size))
        for box in flat_range_to_boxes(entry.box, start, stop):
            yield (number, averaged, dtype), entry.fqn, box
        start = stop


def plan_moves(layout: Layout, tile: Tile) -> list[list[Move]]:
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


def reads_of(moves: Sequence[Move], data_bytes: int, block_bytes: int) -> Iterator[tuple[int, int, list[Move]]]:
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
