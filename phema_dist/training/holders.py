"""Which ranks hold which boxes of which tensors: what they tell each other, and what follows from it.

A thousand ranks may hold five million boxes between them. So boxes are columns of tables here (see `shard`), objects
only where they lie on this rank, and never in memory all at once: they travel compressed, in chunks of some tensors
each, and a rank keeps what it holds itself and, of all the others, sums. What is told is told once: ranks that hold the
same notice that by a digest, and the lowest of them speaks for all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from phema_dist.errors import LayoutError
from phema_dist.shard import (
    PRIME,
    Int64s,
    UInt64s,
    boxes_of,
    check_exact_cover,
    distinct,
    fingerprints,
    in_order,
    offsets_and_sizes,
    scramble,
    table_of,
    whole,
)
from phema_dist.storage.manifest import PARAMETER

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.training.layout import TensorInfo

_BOXES_AT_ONCE = 1 << 16  # in a chunk of tensors, if every rank holds one box of each
_OF_RANK = 1001  # a seed
_UNDIVIDED = np.uint64(0x9E3779B97F4A7C15)  # makes other numbers of those of what is divided
_MANY_RANKS = 16  # more of them are not listed one by one
APART = (
    "If these are different modules (pipeline stages, local experts), give each a prefix, "
    "PostHocEMA.from_model(..., prefix=...); otherwise"
)


@dataclass(eq=False)
class Group:
    """The boxes that the same ranks hold, all of them; for these to share out, or for the lowest of them."""

    ranks: tuple[int, ...]  # ascending
    undivided: bool = False
    num_bytes: int = 0  # of their averages, which are most of what a rank keeps and stores
    tables: list[Int64s] = field(default_factory=list)  # the boxes themselves, on these ranks only

    @property
    def owners(self) -> tuple[int, ...]:
        """The ranks that share them out."""
        return self.ranks[:1] if self.undivided else self.ranks

    @property
    def table(self) -> Int64s:
        """The boxes in an order that all ranks of the group agree on."""
        return in_order(np.concatenate(self.tables, axis=1))


def tell(ranks: Ranks, say: Callable[[], list[bytes]]) -> tuple[list[list[bytes]], list[tuple[int, ...]]]:
    """Collective: what the ranks say, each different answer once, and who gave it; by the lowest rank that did."""
    mine: list[bytes] = []

    def digest() -> bytes:
        mine.extend(say())
        return xxhash.xxh3_128_digest(b"".join(mine))

    sayers: dict[bytes, list[int]] = {}
    for rank, found in enumerate(ranks.together(digest)):
        sayers.setdefault(found, []).append(rank)
    speakers = [by[0] for by in sayers.values()]
    answers = ranks.gather(mine if ranks.rank in speakers else [])
    return [answers[rank] for rank in speakers], [tuple(by) for by in sayers.values()]


def most_dims(tensors: Iterable[TensorInfo]) -> int:
    """How many dimensions tables of their boxes have."""
    return max(1, *(len(tensor.shape) for tensor in tensors))


def _tensors_at_once(num_ranks: int) -> int:
    return max(1, _BOXES_AT_ONCE // num_ranks)


def pack(table: Int64s, num_tensors: int, num_ranks: int) -> list[bytes]:
    """A table as bytes, in compressed chunks: the boxes of some tensors, those of as many next ones, ..."""
    step = _tensors_at_once(num_ranks)
    edges = np.searchsorted(table[0], range(step, num_tensors, step))
    parts = np.split(table, edges, axis=1)
    # Neighbours differ in few ways, which makes the bytes a third.
    return [zlib.compress(np.diff(part, axis=1, prepend=0).tobytes()) if part.size else b"" for part in parts]


def unpack(tables: Sequence[Sequence[bytes]], chunk: int, num_dims: int) -> tuple[Int64s, Int64s]:
    """One chunk of all tables, end to end, and the index of the table that each box is from."""
    parts, origins = [np.empty((1 + 2 * num_dims, 0), dtype=np.int64)], [-1]
    for k, table in enumerate(tables):
        if table[chunk]:
            steps = np.frombuffer(zlib.decompress(table[chunk]), dtype=np.int64)
            parts.append(steps.reshape(1 + 2 * num_dims, -1).cumsum(axis=1))
            origins.append(k)
    return np.concatenate(parts, axis=1), np.repeat(origins, [part.shape[1] for part in parts])


def group_boxes(
    tensors: Sequence[TensorInfo], tables: Sequence[Sequence[bytes]], holders: Sequence[tuple[int, ...]], rank: int
) -> list[Group]:
    """Find out which ranks hold which boxes, and group the boxes by that; smaller groups come first.

    Args:
        tensors: of the run.
        tables: as `pack` made them, each different one once.
        holders: the ranks that each table is of; tables are in the order of their lowest rank.
        rank: this one, which learns the boxes of its own groups.

    Raises:
        LayoutError: an element is held nowhere, or boxes overlap.
    """
    num_dims = most_dims(tensors)
    itemsize = np.array([tensor.average_dtype.itemsize for tensor in tensors])
    averaged = np.array([tensor.kind == PARAMETER for tensor in tensors])
    # A set of ranks is known by the sum of random numbers, one for each rank.
    all_holders = np.array([scramble(np.array(by), _OF_RANK).sum() for by in holders])
    groups: dict[int, Group] = {}
    covered = np.zeros((2, len(tensors)), dtype=np.uint64)  # sums of the upper and of the lower bits of fingerprints

    for chunk in range(len(tables[0])):
        boxes, prints, origin, begins = distinct(*unpack(tables, chunk, num_dims))
        if not prints.size:
            continue
        np.add.at(covered, (0, boxes[0]), prints >> np.uint64(32))
        np.add.at(covered, (1, boxes[0]), prints & np.uint64(2**32 - 1))
        numel = offsets_and_sizes(boxes)[1].prod(axis=0)
        undivided = ~averaged[boxes[0]] | (numel == 0)  # all of it is for the lowest of its holders
        keys = np.add.reduceat(all_holders[origin], begins) ^ (undivided * _UNDIVIDED)
        found, example, which = np.unique(keys, return_index=True, return_inverse=True)
        num_bytes = np.zeros(len(found), dtype=np.int64)
        np.add.at(num_bytes, which, numel * itemsize[boxes[0]])
        for n, (key, k) in enumerate(zip(found.tolist(), example.tolist(), strict=True)):
            if key not in groups:
                by = [holders[i] for i in np.split(origin, begins[k : k + 2])[1].tolist()]  # whoever holds box k
                groups[key] = Group(tuple(sorted(chain(*by))), bool(undivided[k]))
            groups[key].num_bytes += int(num_bytes[n])
            if rank in groups[key].ranks:
                groups[key].tables.append(boxes[:, which == n])
    _check_cover(tensors, tables, holders, covered)
    return sorted(groups.values(), key=lambda group: (len(group.owners), group.owners, group.ranks))


def _check_cover(
    tensors: Sequence[TensorInfo],
    tables: Sequence[Sequence[bytes]],
    holders: Sequence[tuple[int, ...]],
    covered: UInt64s,
) -> None:
    """Compare sums of fingerprints with those of whole tensors; where they differ, say what is wrong with the boxes."""
    num_dims, shapes = most_dims(tensors), [tensor.shape for tensor in tensors]
    bounds = table_of(((i, whole(shape)) for i, shape in enumerate(shapes)), num_dims)
    sums = np.array([((upper << 32) + lower) % PRIME for upper, lower in covered.T.tolist()], dtype=np.uint64)
    for i in np.flatnonzero(sums != fingerprints(*offsets_and_sizes(bounds))).tolist():
        table, origin = unpack(tables, i // _tensors_at_once(sum(map(len, holders))), num_dims)
        of_tensor = table[0] == i
        by = set(chain.from_iterable(holders[k] for k in origin[of_tensor].tolist()))
        try:
            check_exact_cover(tensors[i].fqn, shapes[i], {box for _, box in boxes_of(table[:, of_tensor], shapes)})
        except LayoutError as error:
            raise LayoutError(f"{error} It lies on ranks {listed(sorted(by))}. {APART} shard it alike.") from error


def listed(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    if len(ranks) <= _MANY_RANKS:
        return str(list(ranks))
    return f"[{', '.join(map(str, ranks[: _MANY_RANKS // 2]))}, ..., {ranks[-1]}] ({len(ranks)} of them)"
