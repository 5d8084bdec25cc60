"""Who owns what: every element has one owner among the ranks that hold it, and what is wrong is told on every rank.

The ranks are threads that pass pickled messages, each with a layout written by hand; and, where a test says so, real
processes, or one process that a script plays a thousand ranks to.
"""

import json
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ranks as processes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phema_dist.errors import LayoutError
from phema_dist.ranks import ALONE, Ranks, join
from phema_dist.shard import Box, flat_range_to_boxes, whole
from phema_dist.storage.manifest import BUFFER, PARAMETER
from phema_dist.training import holders
from phema_dist.training.layout import Layout, LocalTensor, TensorInfo
from phema_dist.training.ownership import Ownership, agree

# -- worlds


@dataclass(frozen=True, eq=False)
class Held:
    """Stands for a LocalTensor."""

    info: TensorInfo
    box: Box
    content: torch.Tensor
    replicated: bool = True

    def local(self) -> torch.Tensor:
        return self.content


@dataclass(frozen=True, eq=False)
class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    barrier: threading.Barrier
    messages: list[bytes]
    sent: list[int] = field(default_factory=list)  # bytes of each message of this rank

    def local(self, global_rank: int) -> int | None:
        return global_rank if global_rank < self.size else None

    def gather(self, value: Any) -> list[Any]:
        self.messages[self.rank] = pickle.dumps(value)
        self.sent.append(len(self.messages[self.rank]))
        self.barrier.wait(30)
        values = [pickle.loads(message) for message in self.messages]  # noqa: S301
        self.barrier.wait(30)
        return values


def in_threads(layouts: Sequence[Layout]) -> list[tuple[Ownership | LayoutError, ThreadRanks]]:
    """Agree on these layouts: what became of it on each rank."""
    size = len(layouts)
    barrier, messages = threading.Barrier(size), [b""] * size
    group = cast("Any", "threads")

    def one(rank: int) -> tuple[Ownership | LayoutError, ThreadRanks]:
        ranks = ThreadRanks(rank, size, group, barrier, messages)
        try:
            return agree(layouts[rank], ranks), ranks
        except LayoutError as error:
            return error, ranks
        except BaseException:
            barrier.abort()  # the others need not wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def owned(layouts: Sequence[Layout]) -> list[Ownership]:
    found = [outcome for outcome, _ in in_threads(layouts)]
    for outcome in found:
        if isinstance(outcome, LayoutError):
            raise outcome
    return cast("list[Ownership]", found)


def values(info: TensorInfo) -> torch.Tensor:
    """What a tensor holds: other numbers for each name."""
    generator = torch.Generator().manual_seed(sum(info.fqn.encode()))
    return torch.randint(-100, 100, info.shape, generator=generator).to(info.dtype)


def parameter(fqn: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorInfo:
    return TensorInfo(fqn, shape, dtype, PARAMETER)


def buffer(fqn: str, *shape: int) -> TensorInfo:
    return TensorInfo(fqn, shape, torch.float32, BUFFER)


def held(info: TensorInfo, box: Box | None = None, *, replicated: bool = True) -> Held:
    box = box or whole(info.shape)
    return Held(info, box, values(info)[box.relative_to(whole(info.shape))], replicated)


def layout(
    tensors: Iterable[Held], infos: Iterable[TensorInfo] = (), aliases: Mapping[str, str] | None = None
) -> Layout:
    """A rank's layout; `infos` are those of which nothing lies here."""
    tensors = tuple(tensors)
    known = {info.fqn: info for info in [*(tensor.info for tensor in tensors), *infos]}
    kin = frozenset(range(64)) if any(tensor.replicated for tensor in tensors) else frozenset[int]()
    return Layout(known, cast("tuple[LocalTensor, ...]", tensors), dict(aliases or {}), kin)


def rows(info: TensorInfo, part: int, num_parts: int) -> list[Held]:
    """A shard along dim 0, as torch cuts it: of equal size, but for the last ones; nothing where it is empty."""
    size = -(-info.shape[0] // num_parts)
    start, stop = (min(size * k, info.shape[0]) for k in (part, part + 1))
    return [held(info, whole(info.shape).rows(start, stop))]


# -- what comes out


def check_owners(layouts: Sequence[Layout], found: Sequence[Ownership]) -> None:
    """Every element has exactly one owner, which holds it; a buffer is whole with the lowest rank that holds it."""
    tensors = found[0].tensors
    assert {info.fqn for info in tensors} == set().union(*(layout.infos for layout in layouts))
    count = {info.fqn: np.zeros(info.shape, dtype=int) for info in tensors}
    for local, mine in zip(layouts, found, strict=True):
        assert (mine.tensors, mine.aliases) == (tensors, found[0].aliases)
        order = [(tensors.index(piece.info), piece.box) for piece in mine.pieces]
        assert order == sorted(order)
        for piece in mine.pieces:
            assert piece.source in local.tensors
            assert torch.equal(piece.local(), values(piece.info)[piece.box.relative_to(whole(piece.info.shape))])
            count[piece.info.fqn][piece.box.relative_to(whole(piece.info.shape))] += 1
    assert all((times == 1).all() for times in count.values())
    for info in tensors:
        having = [rank for rank, mine in enumerate(found) if any(piece.info == info for piece in mine.pieces)]
        if info.kind == BUFFER or 0 in info.shape:
            assert having == [min(r for r, local in enumerate(layouts) if any(t.info == info for t in local.tensors))]


def num_bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.box.numel * tensor.info.average_dtype.itemsize for tensor in tensors)


@st.composite
def worlds(draw: st.DrawFn, groups: Sequence[tuple[int, ...]]) -> list[list[Held]]:
    """What each of 4 ranks holds of some tensors: shards along some dimension, each held by one of `groups`."""
    world: list[list[Held]] = [[] for _ in range(4)]
    for number in range(draw(st.integers(0, 6))):
        shape = draw(st.lists(st.integers(0, 30), max_size=3).map(tuple))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        info = TensorInfo(f"tensor{number}", shape, dtype, draw(st.sampled_from([PARAMETER, PARAMETER, BUFFER])))
        if info.kind == BUFFER or not shape:
            pieces = [whole(shape)]
        else:
            dim = draw(st.integers(0, len(shape) - 1))
            cuts = [0, *sorted(draw(st.lists(st.integers(0, shape[dim]), max_size=2))), shape[dim]]
            pieces = [
                Box((*(0,) * dim, a, *(0,) * (len(shape) - dim - 1)), (*shape[:dim], b - a, *shape[dim + 1 :]))
                for a, b in pairwise(cuts)
            ]
        for box in pieces:
            for rank in draw(st.sampled_from(groups)):
                world[rank].append(held(info, box))
    return world


# The groups that meshes and stages make: disjoint, or one inside the other.
NESTED = [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)]
ALWAYS = parameter("always", 8, 2)


@settings(deadline=None)
@given(worlds(NESTED), st.sampled_from([1, 1 << 16]))
def test_every_element_has_one_owner_and_nested_groups_are_levelled(world: list[list[Held]], at_once: int) -> None:
    for rank, tensors in enumerate(world):
        tensors.extend(rows(ALWAYS, rank, 4))
    layouts = [layout(tensors) for tensors in world]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holders, "_BOXES_AT_ONCE", at_once)  # as if there were many tensors
        found = owned(layouts)
    check_owners(layouts, found)

    boxes: dict[tuple[str, Box], tuple[Held, list[int]]] = {}
    for rank, tensors in enumerate(world):
        for tensor in tensors:
            boxes.setdefault((tensor.info.fqn, tensor.box), (tensor, []))[1].append(rank)
    items = [(t, set(by if t.info.kind == PARAMETER else by[:1])) for t, by in boxes.values()]
    row = max(num_bytes([t]) // t.box.num_rows if t.box.num_rows else 0 for t, _ in items)
    for rank, mine in enumerate(found):
        # What only the members of a group hold, they must own: no sharing can give a rank less than the mean of it.
        least = max(
            Fraction(num_bytes(t for t, by in items if by <= set(group)), len(group))
            for group in NESTED
            if rank in group
        )
        assert num_bytes(mine.pieces) <= least + 2 * row + 2
        for tensor, _ in items:  # one run of rows of a box at most: one box of a tensor in a file
            assert sum((p.info.fqn, p.source.box) == (tensor.info.fqn, tensor.box) for p in mine.pieces) <= 1


@settings(deadline=None)
@given(worlds([(0,), (1,), (2,), (3,), (0, 1, 2, 3)]))
def test_no_rank_gets_more_than_it_alone_holds_or_the_mean_and_a_row(world: list[list[Held]]) -> None:
    world = [[t for t in tensors if t.info.kind == PARAMETER] for tensors in world]
    for tensors in world:
        tensors.append(held(ALWAYS))
    found = owned([layout(tensors) for tensors in world])
    boxes: dict[tuple[str, Box], tuple[Held, list[int]]] = {}
    for rank, tensors in enumerate(world):
        for tensor in tensors:
            boxes.setdefault((tensor.info.fqn, tensor.box), (tensor, []))[1].append(rank)
    mean = num_bytes(t for t, _ in boxes.values()) / 4
    row = max(num_bytes([t]) // t.box.num_rows if t.box.num_rows else 0 for t, _ in boxes.values())
    for rank, mine in enumerate(found):
        alone = num_bytes(t for t, by in boxes.values() if by == [rank])
        assert num_bytes(mine.pieces) <= max(alone, mean) + row + 1


def test_replicas_are_shared_evenly_in_order() -> None:
    model = [parameter("a", 6, 10), parameter("b", 3, 10)]
    found = owned([layout(held(info) for info in model)] * 3)
    assert [[(p.info.fqn, p.box) for p in mine.pieces] for mine in found] == [
        [("a", Box((0, 0), (3, 10)))],
        [("a", Box((3, 0), (3, 10)))],
        [("b", whole((3, 10)))],
    ]


def test_ranks_take_their_shares_in_order_whatever_else_they_hold() -> None:
    model = [parameter(f"layers.{i}", 2, 5) for i in range(20)]
    layouts = [layout([*map(held, model), *([held(parameter("more", 1))] if rank == 1 else [])]) for rank in range(4)]
    found = owned(layouts)
    check_owners(layouts, found)
    in_order = [piece.info.fqn for mine in found for piece in mine.pieces if piece.info.fqn != "more"]
    assert in_order == [info.fqn for info in model]


def test_boxes_are_looked_at_one_by_one_only_where_sums_say_that_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holders, "check_exact_cover", None)
    layouts = [layout(t for i in range(9) for t in rows(parameter(f"layers.{i}", 5, 1 + i), r, 3)) for r in range(3)]
    check_owners(layouts, owned(layouts))


def test_16_bit_parameters_weigh_as_much_as_their_float32_averages() -> None:
    model = [parameter("a", 8, 10, dtype=torch.bfloat16), parameter("b", 8, 10)]
    found = owned([layout(held(info) for info in model)] * 2)
    assert [[(p.info.fqn, p.box) for p in mine.pieces] for mine in found] == [
        [("a", whole((8, 10)))],
        [("b", whole((8, 10)))],
    ]


def test_replicas_of_shards_and_a_buffer_on_all() -> None:
    model = [parameter("a", 7, 5), parameter("b", 1, 3), parameter("c", 30, 4), parameter("d", 9)]
    layouts = [
        layout([*(t for info in model for t in rows(info, rank % 2, 2)), held(buffer("mean", 3), replicated=False)])
        for rank in range(6)
    ]
    found = owned(layouts)
    check_owners(layouts, found)
    sizes = [num_bytes(mine.pieces) for mine in found]
    for shard in (0, 1):
        assert max(sizes[shard::2]) - min(sizes[shard::2]) <= 2 * 4 * 5


def test_a_rank_may_hold_many_boxes_of_a_tensor() -> None:
    """As FSDP1 cuts: all elements end to end, in equal parts wherever that is."""
    model = [parameter("a", 3, 5, 2), parameter("b"), parameter("c", 0, 3), parameter("d", 7, 3), parameter("e", 11)]
    total = sum(whole(info.shape).numel for info in model)
    layouts = []
    for rank in range(5):
        first, last = (total * k // 5 for k in (rank, rank + 1))
        mine, position = [], 0
        for info in model:
            box = whole(info.shape)
            start, stop = (min(max(at - position, 0), box.numel) for at in (first, last))
            mine += [held(info, cut) for cut in flat_range_to_boxes(box, start, stop)]
            position += box.numel
        layouts.append(layout([*mine, *([held(model[2])] if rank in {1, 3} else [])], model))
    assert max(len([t for t in local.tensors if t.info.fqn == "a"]) for local in layouts) > 2
    found = owned(layouts)
    check_owners(layouts, found)
    for rank, (local, mine) in enumerate(zip(layouts, found, strict=True)):
        assert {(p.info, p.box) for p in mine.pieces} == {(t.info, t.box) for t in local.tensors if t.box.numel} | (
            {(model[2], whole((0, 3)))} if rank == 1 else set()
        )
    twice = owned([*layouts, *layouts])  # and replicas of that
    check_owners([*layouts, *layouts], twice)
    assert max(num_bytes(mine.pieces) for mine in twice) < max(num_bytes(mine.pieces) for mine in found)


def test_empty_shards_scalars_and_tensors_without_elements() -> None:
    model = [parameter("one"), parameter("short", 2, 3), parameter("none", 0, 4), parameter("flat", 4, 0)]
    layouts = [
        layout(
            [held(model[0]), *rows(model[1], rank, 4), *rows(model[2], rank, 4), held(model[3], Box((rank, 0), (1, 0)))]
        )
        for rank in range(4)
    ]
    found = owned(layouts)
    check_owners(layouts, found)
    assert sum(len(mine.pieces) for mine in found) == 1 + 2 + 1 + 1
    assert not any(piece.box.numel == 0 and 0 not in piece.info.shape for mine in found for piece in mine.pieces)


def test_stages_with_names_of_their_own_share_each_with_its_replicas() -> None:
    stages = [[parameter(f"{s}.w", 8, 3), buffer(f"{s}.mean", 3), parameter(f"{s}.b", 5)] for s in range(3)]
    tied = [{"0.tied": "0.w"}, {}, {"2.tied": "2.w"}]
    layouts = [layout(map(held, stages[rank // 2]), aliases=tied[rank // 2]) for rank in range(6)]
    found = owned(layouts)
    check_owners(layouts, found)
    assert [info.fqn for info in found[0].tensors] == [info.fqn for stage in stages for info in stage]
    assert found[0].aliases == {"0.tied": "0.w", "2.tied": "2.w"}
    assert all(mine.pieces and {p.info.fqn[0] for p in mine.pieces} == {str(r // 2)} for r, mine in enumerate(found))


def test_ranks_that_name_tensors_in_another_order_agree_all_the_same() -> None:
    model = [parameter("a", 6, 2), parameter("b", 6, 2), buffer("c", 3)]
    layouts = [layout(map(held, model)), layout(map(held, reversed(model)))]
    check_owners(layouts, owned(layouts))


def test_a_lone_process_owns_all_of_its_model() -> None:
    model = [parameter("a", 6, 2), parameter("b"), buffer("c", 3), parameter("d", 0, 2)]
    found = agree(layout(held(info, replicated=False) for info in model), ALONE)
    assert [(piece.info, piece.box) for piece in found.pieces] == [(info, whole(info.shape)) for info in model]


def test_what_all_ranks_have_to_say_is_said_once() -> None:
    model = [parameter(f"layers.{i}.weight", 8 + i, 4) for i in range(500)]
    spoken = [sum(ranks.sent) for _, ranks in in_threads([layout(map(held, model))] * 3)]
    assert spoken[0] > 2500
    assert max(spoken[1:]) < 500


# -- mistakes

W, B = parameter("w", 6, 4), parameter("b", 4)


def world_of(*per_rank: Sequence[Held], infos: Sequence[TensorInfo] = ()) -> list[Layout]:
    return [layout(tensors, infos) for tensors in per_rank]


def sharded(num_ranks: int = 3) -> list[list[Held]]:
    return [[*rows(W, rank, num_ranks), *rows(B, rank, num_ranks)] for rank in range(num_ranks)]


def changed(tensor: Held) -> Held:
    """The same, but for one bit of its last element."""
    content = tensor.content.clone()
    content.view(torch.int32).view(-1)[-1] ^= 1
    return replace(tensor, content=content)


def with_info(**facts: Any) -> list[Layout]:
    odd = replace(W, **facts)
    return world_of([held(W), held(B)], [held(W), held(B)], [held(odd), held(B)])


def with_box(rank: int, box: Box) -> list[Layout]:
    """Shards of 3 ranks, of which one is another one."""
    ranks = sharded()
    ranks[rank][0] = Held(W, box, torch.zeros(box.sizes))
    return world_of(*ranks)


def one_bit(rank: int, which: int, num_ranks: int = 4, *, replicated: bool = True) -> list[Layout]:
    ranks = [[held(info, replicated=replicated) for info in (W, B)] for _ in range(num_ranks)]
    ranks[rank][which] = changed(ranks[rank][which])
    return world_of(*ranks)


def one_bit_of_a_shard(rank: int) -> list[Layout]:
    ranks = [[*rows(W, k % 2, 2), *rows(B, k % 2, 2)] for k in range(6)]
    ranks[rank][1] = changed(ranks[rank][1])
    return world_of(*ranks)


PREFIX = r"pipeline stages, local experts\), give each a prefix, PostHocEMA.from_model\(..., prefix=...\); otherwise "
MISTAKES: dict[str, tuple[Callable[[], list[Layout]], str]] = {
    "shape": (
        lambda: with_info(shape=(6, 5)),
        r"w must be the same .*\(6, 4\).* on ranks \[0, 1\] and .*\(6, 5\).* \[2\]",
    ),
    "transposed": (lambda: with_info(shape=(4, 6)), r"w must be the same tensor.*\(6, 4\).*\(4, 6\)"),
    "more dims": (lambda: with_info(shape=(6, 4, 1)), r"w must be the same tensor.*\(6, 4\).*\(6, 4, 1\)"),
    "dtype": (lambda: with_info(dtype=torch.float16), r"w must be the same tensor.*torch.float32.*torch.float16"),
    "kind": (lambda: with_info(kind=BUFFER), r"w must be the same tensor.*parameter.*buffer"),
    "shape where nothing lies": (
        lambda: [*world_of(*sharded(2)), layout([held(B)], [replace(W, shape=(7, 4))])],
        r"w must be the same tensor.*\(6, 4\).* \[0, 1\] and .*\(7, 4\).* \[2\]",
    ),
    "overlap": (lambda: with_box(1, Box((1, 0), (3, 4))), r"w .*\(6, 4\) has shards that overlap.*ranks \[0, 1, 2\]"),
    "overlap, right volume": (lambda: with_box(2, Box((3, 0), (2, 4))), r"w .*\(6, 4\) has shards that overlap"),
    "overlap, inside": (lambda: with_box(2, Box((1, 1), (1, 1))), "w .*has shards that overlap"),
    "the whole and a shard": (lambda: with_box(0, whole((6, 4))), "w .*has shards that overlap"),
    "rows and columns": (lambda: with_box(0, Box((0, 0), (6, 2))), "w .*has shards that overlap.*" + PREFIX),
    "hole": (lambda: with_box(1, Box((2, 0), (1, 4))), r"w \(6, 4\) must be held by some rank; 4 of 24 are not"),
    "hole of one element": (lambda: with_box(1, Box((2, 0), (2, 3))), r"w \(6, 4\) must be held .* 2 of 24 are not"),
    "a shard held twice, another by none": (lambda: with_box(1, Box((0, 0), (2, 4))), "w .* must be held .* 8 of 24"),
    "outside": (lambda: with_box(2, Box((4, 0), (3, 4))), "w .* reaches outside"),
    "outside, right volume": (lambda: with_box(2, Box((4, 1), (2, 4))), "w .* reaches outside"),
    "far outside": (lambda: with_box(2, Box((2**40, 0), (2, 4))), "w .* reaches outside"),
    "negative": (lambda: with_box(0, Box((-2, 0), (2, 4))), "w .* reaches outside"),
    "a rank is missing": (lambda: world_of(*sharded(4)[:3]), r"b \(4,\) must be held by some rank; 1 of 4"),
    "held by none": (
        lambda: world_of([held(B)], [held(B)], infos=[W]),
        r"w \(6, 4\) must be held by some rank; 24 of 24.*ranks \[\]",
    ),
    "a bit": (
        lambda: one_bit(2, 0),
        r"w must be equal on ranks \[0, 1, 2, 3\], .*found other values on ranks \[2\] than on rank 0.*\(6, 4\).*"
        + PREFIX,
    ),
    "a bit of the last tensor": (lambda: one_bit(3, 1), r"b must be equal on ranks \[0, 1, 2, 3\].* on ranks \[3\]"),
    "a bit on the first rank": (lambda: one_bit(0, 1), r"b must be equal.*on ranks \[1, 2, 3\] than on rank 0"),
    "a bit of a shard": (lambda: one_bit_of_a_shard(5), r"b must be equal on ranks \[1, 3, 5\].* on ranks \[5\]"),
    "a bit of a plain tensor": (
        lambda: one_bit(1, 0, replicated=False),
        r"w \(6, 4\) is the same part .*must be equal on all ranks; found other values on ranks \[1\].*"
        + PREFIX
        + "wrap",
    ),
    "a plain tensor on some ranks": (
        lambda: world_of(*[[held(B), *([held(W, replicated=False)] if r in {1, 3} else [])] for r in range(4)]),
        r"w \(6, 4\) is the same part of a tensor on ranks \[1, 3\] of 4.*found it missing on the others.*"
        + PREFIX
        + "wrap",
    ),
    "stages of equal names": (
        lambda: [layout([replace(held(W), content=torch.full((6, 4), r // 2)), held(B)]) for r in range(4)],
        r"w must be equal on ranks \[0, 1, 2, 3\].*on ranks \[2, 3\]",
    ),
    "stages of equal names, sharded otherwise": (
        lambda: world_of(*[rows(W, r, 2) for r in range(2)], *[rows(W, r, 3) for r in range(3)]),
        "w .* has shards that overlap.*" + PREFIX,
    ),
    "nothing to average": (lambda: world_of([held(buffer("c", 3))], [held(buffer("c", 3))]), "must have parameters"),
    "no tensor": (lambda: world_of([], []), "must have parameters"),
    "many ranks": (lambda: one_bit(19, 0, 20), r"on ranks \[0, 1, 2, 3, 4, 5, 6, 7, ..., 19\] \(20 of them\)"),
}


@pytest.mark.parametrize("at_once", [1, 1 << 16])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_alike_on_every_rank(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "_BOXES_AT_ONCE", at_once)
    make, pattern = MISTAKES[name]
    told = [outcome for outcome, _ in in_threads(make())]
    for outcome in told:
        assert isinstance(outcome, LayoutError), outcome
        assert re.search(pattern, str(outcome)), str(outcome)
    assert len({re.sub(r"^rank \d+: ", "", str(outcome)) for outcome in told}) == 1


def test_a_tensor_that_cannot_be_read_on_one_rank_is_told_on_all() -> None:
    class Gone(Held):
        def local(self) -> torch.Tensor:
            raise LayoutError("w must stay as it was.")

    broken = layout([Gone(W, whole(W.shape), torch.zeros(6, 4))])
    for outcome, _ in in_threads([layout([held(W)]), broken, layout([held(W)])]):
        assert isinstance(outcome, LayoutError)
        assert "w must stay as it was" in str(outcome)


def test_buffers_may_differ() -> None:
    c = held(buffer("c", 3), replicated=False)
    layouts = [layout([held(W), replace(c, content=torch.full((3,), float(rank)))]) for rank in range(3)]
    found = owned(layouts)
    assert [p.local().tolist() for mine in found for p in mine.pieces if p.info.fqn == "c"] == [[0.0, 0.0, 0.0]]


# -- many


def five_thousand() -> tuple[float, int, list[tuple[str, Box]]]:
    """Agree on shards, then on replicas; the seconds, and which replicas are this rank's."""
    ranks = join()
    model = [parameter(f"layers.{i}.weight", 8 + i % 5, 2 + i % 3) for i in range(5000)]
    shards = layout([t for info in model for t in rows(info, ranks.rank, ranks.size)])
    replicas = layout(map(held, model))
    begin = time.monotonic()
    check = agree(shards, ranks)
    shared = agree(replicas, ranks)
    seconds = time.monotonic() - begin
    assert [(p.info, p.box) for p in check.pieces] == [(t.info, t.box) for t in shards.tensors if t.box.numel]
    return seconds, num_bytes(shared.pieces), [(p.info.fqn, p.box) for p in shared.pieces]


def test_real_ranks_agree_on_five_thousand_tensors() -> None:
    found = processes.run(4, five_thousand)
    print([seconds for seconds, _, _ in found])  # noqa: T201
    sizes = [size for _, size, _ in found]
    assert max(sizes) - min(sizes) <= 2 * 4 * 4
    elements = [
        (fqn, box.offsets[0] + row) for _, _, pieces in found for fqn, box in pieces for row in range(box.num_rows)
    ]
    assert elements == [(f"layers.{i}.weight", row) for i in range(5000) for row in range(8 + i % 5)]


@pytest.mark.parametrize(
    ("shards", "replicas", "tensors"), [(1024, 1, 5000), (128, 8, 500), (1, 1024, 500)], ids=["FSDP2", "HSDP", "DDP"]
)
def test_a_thousand_ranks_agree_in_little_memory(shards: int, replicas: int, tensors: int) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "construction.py"
    options = {"shards": shards, "replicas": replicas, "tensors": tensors, "rank": 5}
    command = [sys.executable, str(script), *(word for name, n in options.items() for word in (f"--{name}", str(n)))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # it checks who owns what
    assert json.loads(done.stdout)["megabytes"] < 100
