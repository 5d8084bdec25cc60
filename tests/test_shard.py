"""Boxes: what is cut can be put together again, and every element gets exactly one owner."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phema_dist.errors import LayoutError
from phema_dist.shard import (
    Box,
    Held,
    check_exact_cover,
    flat_range_to_boxes,
    flat_span,
    intersect,
    share_out,
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
    if (marked(boxes, shape) == 1).all():
        check_exact_cover("w", shape, boxes)
    else:
        with pytest.raises(LayoutError, match="w "):
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


@st.composite
def held_by_groups(draw: st.DrawFn, groups: list[tuple[int, ...]]) -> list[Held]:
    """Tensors of 0 to 3 dims, each cut along dim 0 into shards that some of the groups hold."""
    held = []
    for tensor in range(draw(st.integers(0, 6))):
        shape = draw(st.lists(st.integers(0, 30), max_size=3).map(tuple))
        itemsize = draw(st.sampled_from([2, 4, 8]))
        cuts = [0, *sorted(draw(st.lists(st.integers(0, shape[0]), max_size=2))), shape[0]] if shape else [0, 1]
        for first, last in pairwise(cuts):
            held.append(Held(tensor, whole(shape).rows(first, last), itemsize, draw(st.sampled_from(groups))))
    return held


def bytes_of(held: list[Held]) -> int:
    return sum(item.box.numel * item.itemsize for item in held)


def largest_row(held: list[Held]) -> int:
    return max((item.box.numel * item.itemsize // item.box.num_rows for item in held if item.box.numel), default=0)


# The groups that meshes and stages make: disjoint, or one inside the other.
NESTED = [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)]


@given(held_by_groups(NESTED))
def test_every_element_gets_one_owner_among_the_ranks_that_hold_it(held: list[Held]) -> None:
    owned = share_out(held, 4)
    for item in held:
        if not item.box.numel:
            continue
        parts = []
        for rank, boxes in enumerate(owned):
            mine = [box for tensor, box in boxes if tensor == item.tensor and intersect(box, item.box)]
            assert len(mine) <= (rank in item.ranks)  # one run of rows at most: one box of a tensor in a file
            parts += mine
        moved = [Box(tuple(a - b for a, b in zip(p.offsets, item.box.offsets, strict=True)), p.sizes) for p in parts]
        check_exact_cover("item", item.box.sizes, moved)


@given(held_by_groups([(0,), (1,), (2,), (0, 1, 2)]))
def test_no_rank_gets_more_than_it_alone_holds_or_the_mean_and_a_row(held: list[Held]) -> None:
    owned = share_out(held, 3)
    itemsize = {item.tensor: item.itemsize for item in held}
    mean = bytes_of(held) / 3
    for rank, boxes in enumerate(owned):
        alone = bytes_of([item for item in held if item.ranks == (rank,)])
        assert sum(box.numel * itemsize[tensor] for tensor, box in boxes) <= max(alone, mean) + largest_row(held)


@given(held_by_groups(NESTED))
def test_nested_groups_are_levelled_as_far_as_their_members_allow(held: list[Held]) -> None:
    owned = share_out(held, 4)
    itemsize = {item.tensor: item.itemsize for item in held}
    for rank, boxes in enumerate(owned):
        # What only the members of a group hold, they must own: no sharing can give a rank less than the mean of it.
        least = max(
            bytes_of([item for item in held if set(item.ranks) <= set(group)]) / len(group)
            for group in NESTED
            if rank in group
        )
        assert sum(box.numel * itemsize[tensor] for tensor, box in boxes) <= least + 2 * largest_row(held)


def test_replicas_are_shared_evenly_in_order() -> None:
    held = [Held(0, whole((6, 10)), 4, (0, 1, 2)), Held(1, whole((3, 10)), 4, (0, 1, 2))]
    assert share_out(held, 3) == [
        [(0, Box((0, 0), (3, 10)))],
        [(0, Box((3, 0), (3, 10)))],
        [(1, Box((0, 0), (3, 10)))],
    ]


def test_a_tensor_without_elements_has_an_owner_too() -> None:
    assert share_out([Held(0, whole((0, 7)), 4, (0, 1))], 2) == [[(0, whole((0, 7)))], []]
