"""Who owns what: ranks compare what they hold, and elect one owner for every element of every tensor.

The owner averages and stores. Everything here happens once, at construction; afterwards no rank needs another one.

A thousand ranks may hold five million boxes between them. So boxes are columns of tables here (see `shard`), objects
only where they lie on this rank, and never in memory all at once: they travel compressed, in chunks of some tensors
each, and a rank keeps what it holds itself and, of all the others, sums. What is told is told once: ranks that hold the
same notice that by a digest, and the lowest of them speaks for all.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from phema_dist.errors import LayoutError
from phema_dist.shard import (
    PRIME,
    Box,
    Int64s,
    UInt64s,
    boxes_of,
    check_exact_cover,
    cut_rows,
    distinct,
    fill_levels,
    fingerprints,
    in_order,
    offsets_and_sizes,
    scramble,
    table_of,
    whole,
)
from phema_dist.storage.manifest import PARAMETER
from phema_dist.training.layout import Piece, TensorInfo

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.training.layout import Layout, LocalTensor

_log = logging.getLogger("phema_dist")
_BOXES_AT_ONCE = 1 << 16  # in a chunk of tensors, if every rank holds one box of each
_OF_RANK = 1001  # a seed
_MANY_RANKS = 16  # more of them are not listed one by one
_APART = (
    "If these are different modules (pipeline stages, local experts), give each a prefix, "
    "PostHocEMA.from_model(..., prefix=...); otherwise"
)


@dataclass(frozen=True, eq=False)
class Ownership:
    """What all ranks agreed on: every tensor of the run, and this rank's pieces of them."""

    tensors: tuple[TensorInfo, ...]
    aliases: dict[str, str]
    pieces: tuple[Piece, ...]
    assumed: tuple[LocalTensor, ...]  # taken for replicas because they were equal on all ranks, no wrapper says so


@dataclass(eq=False)
class Group:
    """The boxes that the same ranks hold, all of them; for these to share out."""

    ranks: tuple[int, ...]  # ascending
    num_bytes: int = 0  # of their averages, which are most of what a rank keeps and stores
    tables: list[Int64s] = field(default_factory=list)  # the boxes themselves, on these ranks only

    @property
    def table(self) -> Int64s:
        """The boxes in an order that all ranks of the group agree on."""
        return in_order(np.concatenate(self.tables, axis=1))


def agree(layout: Layout, ranks: Ranks) -> Ownership:
    """Collective: compare what the ranks hold, check that replicas are replicas, and elect owners.

    What the same ranks hold is laid end to end, in the order of tensors, and cut at whole rows, so that the bytes of
    these ranks level out like water in connected vessels. Where all ranks share it, none exceeds the larger of what it
    alone holds and the mean, by more than about one row; where groups nest (replicas of shards), that mean is of the
    group. A buffer is stored whole by the lowest rank that holds it: ranks may disagree on it, and it is small.

    Raises LayoutError on every rank if one tensor has two shapes, if an element is held nowhere, or if ranks hold
    equal names with different content (pipeline stages or local experts, which are not replicas of each other).
    """
    tensors, aliases = _agree_on_tensors(layout, ranks)
    index = {tensor.fqn: i for i, tensor in enumerate(tensors)}
    # An uneven shard may come out empty; a tensor without elements has an owner all the same.
    sources = {(index[t.info.fqn], t.box): t for t in layout.tensors if t.box.numel or 0 in t.info.shape}

    def say() -> list[bytes]:
        return pack(table_of(sources, _num_dims(tensors)), len(tensors), ranks.size)

    groups = group_boxes(tensors, *_tell(ranks, say), ranks.rank)
    assumed = _check_replicas(tensors, groups, sources, ranks, _family(layout.kin, ranks))
    owned = sorted(_share_out(tensors, groups, ranks))
    return Ownership(tensors, aliases, tuple(Piece(sources[i, held], box) for i, box, held in owned), assumed)


def tell_apart(assumed: Sequence[LocalTensor], ranks: Ranks) -> None:
    """Collective: warn if tensors that were taken for replicas are no longer equal on all ranks."""
    if ranks.size == 1 or len(set(ranks.together(lambda: _digest(assumed)))) == 1:
        return
    each = ranks.together(lambda: [_digest([tensor]) for tensor in assumed])
    odd = [tensor for k, tensor in enumerate(assumed) if len({digests[k] for digests in each}) > 1]
    if ranks.rank == 0:
        _log.warning(
            "%d plain tensors were equal on all ranks at construction and taken for replicas, but are not any more; "
            "the first is %s: its average mixes rows of several ranks. Different modules need a prefix, and a new run.",
            len(odd), odd[0].info.fqn,
        )  # fmt: skip


def _family(kin: Iterable[int], ranks: Ranks) -> set[int]:
    """Collective: the ranks that hold this rank's model with it, as far as wrappers name each other's ranks."""
    answers, by = _tell(ranks, lambda: [json.dumps(sorted(kin)).encode()])
    families: list[set[int]] = []
    for (answer,), sayers in zip(answers, by, strict=True):
        named = {local for rank in json.loads(answer) if (local := ranks.local(rank)) is not None}
        # Plain modules name nobody, so those who say nothing have nothing in common.
        for family in [named | set(sayers)] if named else [{rank} for rank in sayers]:
            joined = family.union(*(other for other in families if other & family))
            families = [other for other in families if not other & family] + [joined]
    return next(family for family in families if ranks.rank in family)


def _tell(ranks: Ranks, say: Callable[[], list[bytes]]) -> tuple[list[list[bytes]], list[tuple[int, ...]]]:
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


def _agree_on_tensors(layout: Layout, ranks: Ranks) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """Collective: every tensor that some rank has, in an order all ranks agree on, and all aliases."""
    facts: dict[str, tuple[list[int], str, str]] = {}
    first: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    for (answer,), by in zip(*_tell(ranks, lambda: [pack_tensors(layout)]), strict=True):
        more_facts, more_aliases = json.loads(zlib.decompress(answer))
        for fqn, fact in more_facts.items():
            first.setdefault(fqn, by)
            if facts.setdefault(fqn, fact) != fact:
                raise LayoutError(
                    f"{fqn} must be the same tensor on all ranks; found {_info(fqn, facts[fqn])} on ranks "
                    f"{_listed(first[fqn])} and {_info(fqn, fact)} on ranks {_listed(by)}. {_APART} make them alike."
                )
        aliases.update(more_aliases)
    if not any(kind == PARAMETER for _, _, kind in facts.values()):
        raise LayoutError("the model must have parameters to average; all are frozen and left out, or there are none.")
    return tuple(_info(fqn, fact) for fqn, fact in facts.items()), aliases


def pack_tensors(layout: Layout) -> bytes:
    """The tensors of a rank's model, and its aliases, as bytes."""
    facts = {i.fqn: (i.shape, str(i.dtype).removeprefix("torch."), i.kind) for i in layout.infos.values()}
    return zlib.compress(json.dumps([facts, layout.aliases]).encode())


def _info(fqn: str, fact: tuple[Sequence[int], str, str]) -> TensorInfo:
    shape, dtype, kind = fact
    return TensorInfo(fqn, tuple(shape), getattr(torch, dtype), kind)


def _num_dims(tensors: Iterable[TensorInfo]) -> int:
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
    num_dims = _num_dims(tensors)
    itemsize = np.array([tensor.average_dtype.itemsize for tensor in tensors])
    averaged = np.array([tensor.kind == PARAMETER for tensor in tensors])
    # A set of ranks is known by the sum of random numbers, one for each rank.
    all_holders = np.array([scramble(np.array(by), _OF_RANK).sum() for by in holders])
    lowest_holder = scramble(np.array([by[0] for by in holders]), _OF_RANK)
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
        keys = np.where(undivided, lowest_holder[origin[begins]], np.add.reduceat(all_holders[origin], begins))
        found, example, which = np.unique(keys, return_index=True, return_inverse=True)
        num_bytes = np.zeros(len(found), dtype=np.int64)
        np.add.at(num_bytes, which, numel * itemsize[boxes[0]])
        for n, (key, k) in enumerate(zip(found.tolist(), example.tolist(), strict=True)):
            if key not in groups:
                by = [holders[i] for i in np.split(origin, begins[k : k + 2])[1].tolist()]  # whoever holds box k
                groups[key] = Group(by[0][:1] if undivided[k] else tuple(sorted(chain(*by))))
            groups[key].num_bytes += int(num_bytes[n])
            if rank in groups[key].ranks:
                groups[key].tables.append(boxes[:, which == n])
    _check_cover(tensors, tables, holders, covered)
    return sorted(groups.values(), key=lambda group: (len(group.ranks), group.ranks))


def _check_cover(
    tensors: Sequence[TensorInfo],
    tables: Sequence[Sequence[bytes]],
    holders: Sequence[tuple[int, ...]],
    covered: UInt64s,
) -> None:
    """Compare sums of fingerprints with those of whole tensors; where they differ, say what is wrong with the boxes."""
    num_dims, shapes = _num_dims(tensors), [tensor.shape for tensor in tensors]
    bounds = table_of(((i, whole(shape)) for i, shape in enumerate(shapes)), num_dims)
    sums = np.array([((upper << 32) + lower) % PRIME for upper, lower in covered.T.tolist()], dtype=np.uint64)
    for i in np.flatnonzero(sums != fingerprints(*offsets_and_sizes(bounds))).tolist():
        table, origin = unpack(tables, i // _tensors_at_once(sum(map(len, holders))), num_dims)
        of_tensor = table[0] == i
        by = set(chain.from_iterable(holders[k] for k in origin[of_tensor].tolist()))
        try:
            check_exact_cover(tensors[i].fqn, shapes[i], {box for _, box in boxes_of(table[:, of_tensor], shapes)})
        except LayoutError as error:
            raise LayoutError(f"{error} It lies on ranks {_listed(sorted(by))}. {_APART} shard it alike.") from error


def _check_replicas(
    tensors: Sequence[TensorInfo],
    groups: Sequence[Group],
    sources: Mapping[tuple[int, Box], LocalTensor],
    ranks: Ranks,
    family: set[int],
) -> tuple[LocalTensor, ...]:
    """Collective: what several ranks hold must be equal to the last bit now, or it would never be one average.

    Returns what is taken for replicas only because it is equal on all ranks.
    """
    shapes = [tensor.shape for tensor in tensors]
    shared = {n: group for n, group in enumerate(groups) if len(group.ranks) > 1}
    mine = {n: [sources[place] for place in boxes_of(g.table, shapes)] for n, g in shared.items() if g.tables}

    # Held by more ranks than a wrapper calls replicas.
    strays = {n: [t for t in r if not (t.replicated and family >= set(shared[n].ranks))] for n, r in mine.items()}

    def digests() -> dict[int, bytes]:
        for n, found in strays.items():
            _refuse_strays(found, shared[n].ranks, ranks.size)
        return {n: _digest(replicas) for n, replicas in mine.items()}

    by_rank = ranks.together(digests)
    odd = [n for n, group in shared.items() if len({by_rank[rank][n] for rank in group.ranks}) > 1]
    if odd:
        _name_odd_one(mine.get(odd[0], []), shared[odd[0]].ranks, ranks)
    assumed = tuple(t for found in strays.values() for t in found)
    if assumed and ranks.rank == 0:
        _log.warning(
            "%d plain tensors, the first is %s, are equal on all ranks and taken for replicas. If they are "
            "different modules (local experts), give each a prefix.", len(assumed), assumed[0].info.fqn,
        )  # fmt: skip
    return assumed


def _refuse_strays(strays: Iterable[LocalTensor], by: Sequence[int], num_ranks: int) -> None:
    for tensor in strays:
        if len(by) < num_ranks:
            raise _not_replicas(tensor, by, num_ranks, "it missing on the others", declared=False)
        if tensor.replicated:
            raise _not_replicas(tensor, by, num_ranks, "wrappers that group these otherwise", declared=False)


def _name_odd_one(replicas: Sequence[LocalTensor], by: Sequence[int], ranks: Ranks) -> None:
    """Collective: raise LayoutError for the first tensor that is not equal on the ranks `by`."""
    each = ranks.together(lambda: [_digest([tensor]) for tensor in replicas])

    def name() -> None:
        for k, tensor in enumerate(replicas):
            if others := [rank for rank in by if each[rank][k] != each[by[0]][k]]:
                values = f"other values on ranks {_listed(others)} than on rank {by[0]}"
                raise _not_replicas(tensor, by, ranks.size, values, declared=tensor.replicated)

    ranks.together(name)


def _not_replicas(tensor: LocalTensor, by: Sequence[int], num_ranks: int, found: str, *, declared: bool) -> LayoutError:
    if declared:
        return LayoutError(
            f"{tensor.info.fqn} must be equal on ranks {_listed(by)}, which DDP or its placements call replicas; found "
            f"{found}, in {tensor.box} of shape {tensor.info.shape}. {_APART} start them from the same values."
        )
    return LayoutError(
        f"{tensor.info.fqn} {tensor.info.shape} is the same part of a tensor on ranks {_listed(by)} of {num_ranks}, "
        f"and no DDP or mesh calls them replicas: they must be equal on all ranks; found {found}. {_APART} wrap the "
        "model in DDP, or in one mesh, before."
    )


def _digest(tensors: Iterable[LocalTensor]) -> bytes:
    """Of the content of all of them, as it is now."""
    content = xxhash.xxh3_64()
    for tensor in tensors:
        flat = tensor.local().cpu().contiguous().reshape(-1)
        content.update(flat.view(torch.uint8).numpy().data)
    return content.digest()


def _share_out(tensors: Sequence[TensorInfo], groups: Sequence[Group], ranks: Ranks) -> Iterator[tuple[int, Box, Box]]:
    """What this rank owns: the index of a tensor, rows of a box that is held here, and that box."""
    shapes = [tensor.shape for tensor in tensors]
    itemsize = np.array([tensor.average_dtype.itemsize for tensor in tensors])
    loads = [0] * ranks.size
    for group in groups:
        ends = fill_levels([loads[rank] for rank in group.ranks], group.num_bytes)
        shares = dict(zip(group.ranks, pairwise([0, *ends]), strict=True))
        for rank, (start, stop) in shares.items():
            loads[rank] += stop - start
        if ranks.rank not in shares:
            continue
        held = boxes_of(group.table, shapes)
        if len(shares) == 1:
            yield from ((i, box, box) for i, box in held)
            continue
        sizes = offsets_and_sizes(group.table)[1]
        row_bytes = sizes[1:].prod(axis=0) * itemsize[group.table[0]]
        cuts = np.array(cut_rows(sizes[0], row_bytes, *shares[ranks.rank])).T.tolist()
        yield from ((i, box.rows(a, b), box) for (i, box), (a, b) in zip(held, cuts, strict=True) if a < b)


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) <= _MANY_RANKS:
        return str(list(ranks))
    return f"[{', '.join(map(str, ranks[: _MANY_RANKS // 2]))}, ..., {ranks[-1]}] ({len(ranks)} of them)"
