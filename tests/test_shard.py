"""Boxes: what is cut can be put together again, and every element gets exactly one owner."""

from itertools import accumulate, pairwise
from math import prod
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phema_dist import shard
from phema_dist.errors import LayoutError
from phema_dist.shard import (
    PRIME,
    Box,
    boxes_of,
    check_exact_cover,
    cut_rows,
    distinct,
    fill_levels,
    fingerprints,
    flat_range_to_boxes,
    flat_span,
    intersect,
    offsets_and_sizes,
    scramble,
    table_of,
    whole,
)

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def marked(boxes: list[Box], shape: tuple[int, ...]) -> np.ndarray:
    """How many boxes hold each element of a tensor."""
    count = np.zeros(shape, dtype=int)
    for box in boxes:
        count[box.relative_to(whole(shape))] += 1
    return count


@st.composite
def boxes_inside(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(starts, tuple(draw(st.integers(1, n - a)) for n, a in zip(shape, starts, strict=True)))


@given(st.data())
def test_a_flat_range_becomes_boxes_of_exactly_its_elements_in_order(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    box = data.draw(boxes_inside(shape))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, box.numel), st.integers(0, box.numel))))
    cuts = flat_range_to_boxes(box, start, stop)
    flat = np.arange(box.numel).reshape(box.sizes)
    taken = [flat[cut.relative_to(box)].ravel().tolist() for cut in cuts]
    assert [element for elements in taken for element in elements] == list(
        range(start, stop)
    )  # also: in order, and each without gaps
    assert len(cuts) <= max(1, 2 * len(shape) - 1)
    for cut, elements in zip(cuts, taken, strict=True):
        assert flat_span(cut, box) == (elements[0], elements[-1] + 1, True)


@given(st.data())
def test_a_span_says_where_a_box_lies_in_another_and_whether_it_has_gaps(data: st.DataObject) -> None:
    outer = whole(data.draw(shapes))
    inner = data.draw(boxes_inside(outer.sizes))
    elements = np.arange(outer.numel).reshape(outer.sizes)[inner.relative_to(outer)].ravel()
    assert flat_span(inner, outer) == (elements[0], elements[-1] + 1, bool((np.diff(elements) == 1).all()))


@given(st.data())
def test_the_intersection_holds_what_both_boxes_hold(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    a, b = data.draw(boxes_inside(shape)), data.draw(boxes_inside(shape))
    shared = intersect(a, b)
    assert shared == intersect(b, a)
    both = marked([a], shape) + marked([b], shape) == 2
    assert np.array_equal(both, marked([shared] if shared else [], shape) == 1)


@given(st.data())
def test_only_an_exact_cover_passes(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    boxes = data.draw(st.lists(boxes_inside(shape), max_size=4))
    by_fingerprint = patch.object(shard, "_FEW_BOXES", data.draw(st.sampled_from([0, 16])))
    if (marked(boxes, shape) == 1).all():
        with by_fingerprint:
            check_exact_cover("w", shape, boxes)
    else:
        with by_fingerprint, pytest.raises(LayoutError, match="w "):
            check_exact_cover("w", shape, boxes)


def test_overlap_with_the_right_volume_is_no_cover() -> None:
    with pytest.raises(LayoutError, match="overlap"):
        check_exact_cover("w", (4, 2), [Box((0, 0), (3, 2)), Box((2, 0), (1, 2))])


def test_a_box_that_reaches_outside_is_no_cover() -> None:
    with pytest.raises(LayoutError, match="outside"):
        check_exact_cover("w", (4,), [Box((1,), (4,))])


@pytest.mark.parametrize(("shape", "boxes"), [((), [Box((), ())]), ((0, 7), []), ((0, 7), [Box((0, 0), (0, 7))])])
def test_scalars_and_empty_tensors_are_covered(shape: tuple[int, ...], boxes: list[Box]) -> None:
    check_exact_cover("w", shape, boxes)


def test_a_scalar_held_twice_is_no_cover() -> None:
    with pytest.raises(LayoutError, match="overlap"):
        check_exact_cover("w", (), [Box((), ()), Box((), ())])


def test_rows_that_no_rank_holds_are_counted() -> None:
    with pytest.raises(LayoutError, match="4 of 8 are not"):
        check_exact_cover("w", (4, 2), [Box((0, 0), (2, 2))])


# -- millions of boxes


def test_many_boxes_cover_as_few_do_and_fail_alike() -> None:
    columns = [Box((0, 3 * i), (7, 3)) for i in range(300)]
    check_exact_cover("w", (7, 900), columns)
    for wrong, message in [
        (columns[:99] + columns[100:], "21 of 6300 are not"),
        ([*columns[1:], Box((0, 0), (7, 4))], "overlap"),  # one column twice
        ([*columns[1:], Box((0, 1), (7, 3))], "overlap"),  # with the right volume
        ([*columns[:-1], Box((0, 898), (7, 3))], "outside"),
    ]:
        with pytest.raises(LayoutError, match=message):
            check_exact_cover("w", (7, 900), wrong)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[tuple[int, Box]]]:
    """Shapes of some tensors, and boxes of them."""
    all_shapes = draw(st.lists(shapes, min_size=1, max_size=4))
    indices = draw(st.lists(st.integers(0, len(all_shapes) - 1), max_size=12))
    return all_shapes, [(i, draw(boxes_inside(all_shapes[i]))) for i in indices]


@given(tables())
def test_a_table_gives_its_boxes_back_in_order(drawn: tuple[list[tuple[int, ...]], list[tuple[int, Box]]]) -> None:
    all_shapes, boxes = drawn
    table = table_of(boxes, max(map(len, all_shapes)))
    assert table.dtype == np.int64
    assert boxes_of(table, all_shapes) == sorted(boxes)


@given(tables(), st.data())
def test_each_box_is_found_once_with_all_its_origins(
    drawn: tuple[list[tuple[int, ...]], list[tuple[int, Box]]], data: st.DataObject
) -> None:
    all_shapes, boxes = drawn
    told = [data.draw(st.sets(st.sampled_from(boxes))) if boxes else set() for _ in range(3)]
    parts = [table_of(part, max(map(len, all_shapes))) for part in told]
    origin = np.repeat(np.arange(3), [len(part) for part in told])
    table, prints, origins, begins = distinct(np.concatenate(parts, axis=1), origin)
    found = zip(boxes_of(table, all_shapes), np.split(origins, begins)[1:], strict=True)
    wanted = {box: [k for k in range(3) if box in told[k]] for box in set().union(*told)}
    assert {box: by.tolist() for box, by in found} == wanted
    assert len(prints) == len(wanted)


def random_number(dim: int, position: int) -> int:
    """Splitmix64 of splitmix64, each after an addition, in Python's integers."""
    bits = position + (dim << 48)
    for _ in range(2):
        bits = (bits + 0xD1342543DE82EF95) * 0x9E3779B97F4A7C15 % 2**64
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        bits ^= bits >> 31
    return bits


@given(st.data())
def test_a_fingerprint_is_the_sum_over_elements_of_products_of_random_numbers(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    box = data.draw(boxes_inside(shape))
    total = sum(
        prod(random_number(dim, i + 1) - random_number(dim, i) for dim, i in enumerate(element))
        for element in np.argwhere(marked([box], shape)).tolist()
    )
    assert fingerprints(*offsets_and_sizes(table_of([(0, box)], len(shape)))).tolist() == [total % PRIME]


def test_fingerprints_are_exact_for_large_numbers() -> None:
    sizes = [2**40 - 1, 2**47 + 12345, 3, 2**20]
    offsets = [2**40, 2**46 + 999, 0, 7]
    wanted = prod(random_number(d, o + n) - random_number(d, o) for d, (o, n) in enumerate(zip(offsets, sizes)))  # noqa: B905
    assert fingerprints(np.array(offsets)[:, None], np.array(sizes)[:, None]).tolist() == [wanted % PRIME]


def test_fingerprints_of_many_boxes_and_dimensions_differ() -> None:
    boxes = [(i, j, k) for i in range(40) for j in range(40) for k in range(40)]
    offsets = np.array(boxes).T
    for sizes in (np.ones_like(offsets), offsets + 1, offsets[::-1] + 1):
        assert len(np.unique(fingerprints(offsets, sizes))) == len(boxes)
    assert len(np.unique(scramble(np.arange(10**6), 3))) == 10**6


@pytest.mark.parametrize("step", [1, 64, 128256])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_all_ranges_along_a_dimension_have_different_fingerprints(dim: int, step: int) -> None:
    starts, ends = np.triu_indices(1000, 1)
    offsets, sizes = np.zeros((4, len(starts)), dtype=np.int64), np.ones((4, len(starts)), dtype=np.int64)
    offsets[dim], sizes[dim] = starts * step, (ends - starts) * step
    assert len(np.unique(fingerprints(offsets, sizes))) == len(starts)


def test_evenly_spaced_shards_of_one_size_have_different_fingerprints() -> None:
    for size in range(1, 3000):
        offsets = np.arange(0, 8 * size, size)[None]
        assert len(np.unique(fingerprints(offsets, np.full_like(offsets, size)))) == 8, size


# -- who gets how much


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 200))
def test_water_that_is_poured_drop_by_drop_finds_the_same_level(loads: list[int], amount: int) -> None:
    poured = list(loads)
    for _ in range(amount):
        poured[poured.index(min(poured))] += 1
    ends = fill_levels(loads, amount)
    shares = np.diff(ends, prepend=0)
    assert ends[-1] == amount
    assert (shares >= 0).all()
    # Drops are whole, so a level is a drop off at most where it does not come out even.
    assert np.abs(loads + shares - np.array(poured)).max() <= 1


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=5), st.data())
def test_cuts_go_to_the_nearest_row(items: list[tuple[int, int]], data: st.DataObject) -> None:
    num_rows, row_bytes = np.array(items).T
    total = int((num_rows * row_bytes).sum())
    ends = [0, *sorted(data.draw(st.lists(st.integers(0, total), max_size=4))), total]
    rows = [(i, row, size) for i, (count, size) in enumerate(items) for row in range(count)]
    edges = [0, *accumulate(size for _, _, size in rows)]
    given_out = []
    for start, stop in pairwise(ends):
        first, last = cut_rows(num_rows, row_bytes, start, stop)
        mine = [(i, row) for i in range(len(items)) for row in range(first[i], last[i])]
        given_out += mine
        size = sum(row_bytes[i] for i, _ in mine)
        at = sum(row_bytes[i] for i, _ in given_out)  # where this share ends
        assert abs(at - stop) == min(abs(edge - stop) for edge in edges)
        assert size <= stop - start + max(row_bytes)
    assert given_out == [(i, row) for i, row, _ in rows]  # each row once, in order
