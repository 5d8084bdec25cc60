"""Boxes: which part of a tensor a rank holds, owns, or wants.

A box is a half-open block of a tensor's index space, `offsets[d] <= i_d < offsets[d] + sizes[d]`. Everything here is
pure integer arithmetic: no tensor, no process group, no storage. Flat positions are row-major.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from phema_dist.errors import LayoutError


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
    filled = sorted(box for box in boxes if box.numel)
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


@dataclass(frozen=True, slots=True)
class Held:
    """One box of one tensor as some ranks hold it, all of them the same elements."""

    tensor: int  # index of the tensor, for the caller
    box: Box
    itemsize: int
    ranks: tuple[int, ...]  # ascending


def share_out(held: Sequence[Held], num_ranks: int) -> list[list[tuple[int, Box]]]:
    """Decide who owns what: for each rank, the (tensor, box) pairs that it averages and stores.

    Every element gets exactly one owner among the ranks that hold it. Boxes with one holder stay with it. What several
    ranks hold alike is laid end to end and cut, at whole rows, so that the bytes of those ranks level out like water in
    connected vessels: where all ranks share it, no rank exceeds the larger of what it alone holds and the mean, by more
    than about one row; where groups nest (replicas of shards), that mean is of the group. Cuts follow the order of
    `held`, so a rank owns one run of neighbouring tensors, cut at two places.
    """
    owned: list[list[tuple[int, Box]]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    groups: dict[tuple[int, ...], list[Held]] = {}
    for item in held:
        groups.setdefault(item.ranks, []).append(item)
    for ranks in sorted(groups, key=lambda ranks: (len(ranks), ranks)):
        items = groups[ranks]
        ends = _fill_levels([load[r] for r in ranks], sum(i.box.numel * i.itemsize for i in items))
        position, share = 0, 0
        for item in items:
            if not item.box.numel:
                owned[ranks[0]].append((item.tensor, item.box))
                continue
            row_bytes = item.box.numel * item.itemsize // item.box.num_rows
            first = 0
            while first < item.box.num_rows:
                take = item.box.num_rows - first
                if share < len(ranks) - 1:  # the last share takes whatever remains; other cuts go to the nearest row
                    take = max(0, min(take, round((ends[share] - position) / row_bytes)))
                if take:
                    owned[ranks[share]].append((item.tensor, item.box.rows(first, first + take)))
                    load[ranks[share]] += take * row_bytes
                    position += take * row_bytes
                    first += take
                if first < item.box.num_rows:
                    share += 1
    return owned


def _fill_levels(loads: Sequence[int], amount: int) -> list[float]:
    """Where to cut `amount` so that adding the shares to `loads` levels them: the end of each share."""
    order = sorted(loads)
    level = 0.0
    for below in range(1, len(order) + 1):
        level = (amount + sum(order[:below])) / below
        if below == len(order) or level <= order[below]:
            break
    ends, position = [], 0.0
    for load in loads:
        position += max(0.0, level - load)
        ends.append(position)
    return ends
