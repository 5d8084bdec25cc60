"""Boxes: which part of a tensor a rank holds, owns, or wants.

A box is a half-open block of a tensor's index space, `offsets[d] <= i_d < offsets[d] + sizes[d]`. Everything here is
pure integer arithmetic: no tensor, no process group, no storage. Flat positions are row-major. What there are millions
of at construction comes in columns of numpy arrays instead of objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from phema_dist.errors import LayoutError

Int64s: TypeAlias = npt.NDArray[np.int64]
UInt64s: TypeAlias = npt.NDArray[np.uint64]

PRIME = 2**61 - 1  # of fingerprints
_PRIME, _29, _32, _61 = map(np.uint64, (PRIME, 29, 32, 61))  # numpy's own, or sums would turn signed
_LOW_29, _LOW_32 = map(np.uint64, (2**29 - 1, 2**32 - 1))
_OF_TENSOR = 1000  # a seed beyond any dimension's
_FEW_BOXES = 16  # up to here, looking at each pair is faster than a fingerprint


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A block of a tensor; a 0-d tensor is the box of empty offsets and sizes, with one element."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    @property
    def num_rows(self) -> int:
        """How many rows (slices along dim 0) the box can be cut into; a 0-d box is one row."""
        return self.sizes[0] if self.sizes else 1

    def rows(self, start: int, stop: int) -> Box:
        """The rows `start` to `stop` of this box, counted from its own first row."""
        if not self.sizes:
            return self
        return Box((self.offsets[0] + start, *self.offsets[1:]), (stop - start, *self.sizes[1:]))

    def relative_to(self, outer: Box) -> tuple[slice, ...]:
        """The index that cuts this box out of a tensor that holds `outer`."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offsets, outer.offsets, self.sizes, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor of `shape`."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """The elements that `a` and `b` share, or None where there are none."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    ends = (min(o + n, p + m) for o, n, p, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))
    sizes = tuple(end - start for start, end in zip(offsets, ends, strict=True))
    return Box(offsets, sizes) if all(n > 0 for n in sizes) else None


def flat_span(inner: Box, outer: Box) -> tuple[int, int, bool]:
    """Where `inner` lies in the row-major elements of `outer`: first, one past the last, and whether without gaps."""
    stride, first, last = 1, 0, 0
    for o, n, p, m in zip(
        reversed(inner.offsets), reversed(inner.sizes), reversed(outer.offsets), reversed(outer.sizes), strict=True
    ):
        first += (o - p) * stride
        last += (o - p + n - 1) * stride
        stride *= m
    return first, last + 1, last + 1 - first == inner.numel


def flat_range_to_boxes(box: Box, start: int, stop: int) -> list[Box]:
    """Cut the row-major elements `start` to `stop` of `box` into boxes, in order, each without gaps in `box`.

    A range inside a tensor of n dimensions needs at most 2n - 1 boxes: the end of a first row, whole rows, the
    beginning of a last one, and the same again inside each broken row.
    """
    if start >= stop:
        return []
    if not box.sizes:
        return [box]
    row = box.numel // box.sizes[0]
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        return _inside_row(box, last, start - last * row, stop - last * row)
    head = _inside_row(box, first - 1, start - (first - 1) * row, row) if start < first * row else []
    body = [box.rows(first, last)] if first < last else []
    tail = _inside_row(box, last, 0, stop - last * row) if last * row < stop else []
    return head + body + tail


def _inside_row(box: Box, index: int, start: int, stop: int) -> list[Box]:
    inner = Box(box.offsets[1:], box.sizes[1:])
    return [
        Box((box.offsets[0] + index, *cut.offsets), (1, *cut.sizes)) for cut in flat_range_to_boxes(inner, start, stop)
    ]


def check_exact_cover(name: str, shape: Sequence[int], boxes: Iterable[Box]) -> None:
    """Raise LayoutError unless every element of a tensor of `shape` lies in exactly one of `boxes`.

    Both are checked, overlap and coverage: interleaved shards can have the right volume and be wrong all the same.
    """
    filled = [box for box in boxes if box.numel]
    if len(filled) > _FEW_BOXES and _cover_exactly(shape, filled):
        return
    filled.sort()
    bounds = whole(shape)
    for i, box in enumerate(filled):
        if intersect(box, bounds) != box:
            raise LayoutError(f"{name} of shape {tuple(shape)} has a shard {box} that reaches outside of it.")
        end = box.offsets[0] + box.sizes[0] if box.sizes else 1
        for other in filled[i + 1 :]:
            if other.offsets and other.offsets[0] >= end:
                break  # sorted by the first offset: nothing further on can touch this box
            if intersect(box, other):
                raise LayoutError(f"{name} of shape {tuple(shape)} has shards that overlap: {box} and {other}.")
    found = sum(box.numel for box in filled)
    if found != bounds.numel:
        raise LayoutError(
            f"every element of {name} {tuple(shape)} must be held by some rank; {bounds.numel - found} of "
            f"{bounds.numel} are not. Construct on every rank of the group that shards the model."
        )


def _cover_exactly(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    offsets, sizes = np.array([(box.offsets, box.sizes) for box in boxes], dtype=np.int64).transpose(1, 2, 0)
    bounds = np.array(shape, dtype=np.int64)[:, None]
    (wanted,) = fingerprints(np.zeros_like(bounds), bounds)
    return bool(sum(fingerprints(offsets, sizes).tolist()) % PRIME == wanted)


def table_of(boxes: Iterable[tuple[int, Box]], num_dims: int) -> Int64s:
    """Boxes as the columns of an array, in order, each given with the index of its tensor; `boxes_of` is the inverse.

    The rows are the index, `num_dims` offsets and as many sizes, of which those that a tensor lacks are 0 and 1.
    """
    rows = []
    for index, box in boxes:
        lacking = num_dims - len(box.sizes)
        rows.append((index, *box.offsets, *(0,) * lacking, *box.sizes, *(1,) * lacking))
    return in_order(np.array(rows, dtype=np.int64).reshape(-1, 1 + 2 * num_dims).T)


def boxes_of(table: Int64s, shapes: Sequence[Sequence[int]]) -> list[tuple[int, Box]]:
    """The columns of a table: each box, after the index of its tensor in `shapes`."""
    num_dims = len(table) // 2
    numbers = ((index, row, len(shapes[index])) for index, *row in table.T.tolist())
    return [(i, Box(tuple(row[:n]), tuple(row[num_dims : num_dims + n]))) for i, row, n in numbers]


def in_order(table: Int64s) -> Int64s:
    """The columns of a table in order: by tensor, then by offsets."""
    return table[:, np.lexsort(table[::-1])]


def offsets_and_sizes(table: Int64s) -> tuple[Int64s, Int64s]:
    """These rows of a table, each with a row for each dimension."""
    num_dims = len(table) // 2
    return table[1 : 1 + num_dims], table[1 + num_dims :]


def distinct(table: Int64s, origin: Int64s) -> tuple[Int64s, UInt64s, Int64s, Int64s]:
    """Each box of a table once, and where it is from; `origin` says so for each column.

    Returns:
        A table of different boxes, in no order; their fingerprints; the origins of the first of them, ascending if
        `origin` is, then those of the second, ...; and where those of each begin.
    """
    prints = fingerprints(*offsets_and_sizes(table))
    keys = prints ^ scramble(table[0], _OF_TENSOR)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(keys)])
    first = order[begins]
    return table[:, first], prints[first], origin[order], begins


def fingerprints(offsets: Int64s, sizes: Int64s) -> UInt64s:
    """A number below PRIME for each box; boxes are columns, `offsets[d, i]` and `sizes[d, i]`.

    Boxes cover a tensor, each element exactly once, if and only if their fingerprints add up to that of the whole
    tensor, modulo PRIME; and boxes with elements have equal fingerprints if and only if they are equal. Wrong with a
    chance of 2^-58 at most, in up to 8 dimensions.
    """
    # Draw a number x[d, i] modulo PRIME for each position i along each dimension d. A fingerprint is the sum, over the
    # elements of a box, of the product of their x[d, i_d]: the product over d of the sum of x[d] along the box. And
    # such a sum is F_d(end) - F_d(start), where F_d are prefix sums: random numbers too, and what is really drawn.
    # If two sets of boxes count some element differently, the difference of their sums is a polynomial in x that is not
    # zero, of degree n in n dimensions, so it vanishes with a chance of n / PRIME at most (Schwartz and Zippel). This
    # needs a field: modulo 2^64, where a product may vanish although no factor does, the chance would be much larger.
    prints = np.ones(offsets.shape[1], dtype=np.uint64)
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        along = scramble(start + size, dim) % _PRIME + (_PRIME - scramble(start, dim) % _PRIME)
        prints = _multiply(prints, along % _PRIME)
    return prints


def scramble(values: Int64s, seed: int) -> UInt64s:
    """64 bits for each of `values`, always the same and as good as random; others for each seed."""
    # splitmix64, twice: once, it keeps some multiples multiples, as f(134) = 2 f(67), and shards are evenly spaced.
    bits: UInt64s = values.astype(np.uint64) + np.uint64(seed << 48)
    for _ in range(2):
        bits = (bits + np.uint64(0xD1342543DE82EF95)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
        bits ^= bits >> np.uint64(31)
    return bits


def _multiply(a: UInt64s, b: UInt64s) -> UInt64s:
    """The product modulo PRIME of numbers below PRIME, from their halves: nothing exceeds 64 bits."""
    a_high, a_low, b_high, b_low = a >> _32, a & _LOW_32, b >> _32, b & _LOW_32
    high, middle, low = a_high * b_high, a_high * b_low + a_low * b_high, a_low * b_low
    # 2^61 is 1 modulo PRIME: so 2^64 is 8, and bits beyond the 61st are added at the bottom.
    middle = (middle >> _29) + ((middle & _LOW_29) << _32)
    product: UInt64s = (high * np.uint64(8) + middle + (low >> _61) + (low & _PRIME)) % _PRIME
    return product


def fill_levels(loads: Sequence[int], amount: int) -> list[int]:
    """Share `amount` out so that it levels `loads` like water in connected vessels: where each one's share ends."""
    order = sorted(loads)
    filled, total = 1, amount + order[0]  # as many vessels get some, and this is what is in them then
    while filled < len(order) and total > order[filled] * filled:
        total += order[filled]
        filled += 1
    return [end // filled for end in accumulate(max(0, total - load * filled) for load in loads)]


def cut_rows(num_rows: Int64s, row_bytes: Int64s, start: int, stop: int) -> tuple[Int64s, Int64s]:
    """Cut items that are laid end to end at bytes `start` and `stop`: the first row between, and one past the last.

    Item i has `num_rows[i]` rows of `row_bytes[i]` bytes. Cuts go to the nearest row, so whoever cuts at the same byte
    cuts at the same row.
    """
    item_bytes = num_rows * row_bytes
    begins = np.cumsum(item_bytes) - item_bytes
    first, last = (np.clip((2 * (at - begins) + row_bytes) // (2 * row_bytes), 0, num_rows) for at in (start, stop))
    return first, last
