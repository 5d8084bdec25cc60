"""Who owns what: ranks compare what they hold, and elect one owner for every element of every tensor.

The owner averages and stores. Everything here happens once, at construction; afterwards no rank needs another one.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from phema_dist.errors import LayoutError
from phema_dist.shard import Box, Int64s, boxes_of, cut_rows, fill_levels, offsets_and_sizes, table_of
from phema_dist.storage.manifest import PARAMETER
from phema_dist.training.holders import APART, Group, group_boxes, listed, most_dims, pack, tell
from phema_dist.training.layout import Piece, TensorInfo

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.training.layout import Layout, LocalTensor

_log = logging.getLogger("phema_dist")


@dataclass(frozen=True, eq=False)
class Ownership:
    """What all ranks agreed on: every tensor of the run, and this rank's pieces of them."""

    tensors: tuple[TensorInfo, ...]
    aliases: dict[str, str]
    pieces: tuple[Piece, ...]
    assumed: tuple[LocalTensor, ...]  # taken for replicas because they were equal on all ranks, no wrapper says so
    shared: tuple[Shared, ...]  # of what it holds with others


@dataclass(frozen=True, eq=False)
class Shared:
    """Boxes that the same ranks hold, this one among them, and which of these owns which rows."""

    ranks: tuple[int, ...]  # ascending
    tensors: tuple[TensorInfo, ...]  # of the run
    table: Int64s
    shares: Mapping[int, tuple[int, int]]  # of the ranks that own some: from which byte to which, laid end to end

    def owned_by(self, rank: int) -> list[tuple[int, Box, Box]]:
        """What a rank owns of them: the index of a tensor, rows of a box, and that box."""
        if rank not in self.shares:
            return []
        if len(self.shares) == 1:
            return [(i, box, box) for i, box in self._boxes]
        sizes = offsets_and_sizes(self.table)[1]
        itemsize = np.array([tensor.average_dtype.itemsize for tensor in self.tensors])
        row_bytes = sizes[1:].prod(axis=0) * itemsize[self.table[0]]
        cuts = np.array(cut_rows(sizes[0], row_bytes, *self.shares[rank])).T.tolist()
        return [(i, box.rows(a, b), box) for (i, box), (a, b) in zip(self._boxes, cuts, strict=True) if a < b]

    @cached_property
    def _boxes(self) -> list[tuple[int, Box]]:
        return boxes_of(self.table, [tensor.shape for tensor in self.tensors])


def agree(layout: Layout, ranks: Ranks) -> Ownership:
    """Collective: compare what the ranks hold, check that replicas are replicas, and elect owners.

    What the same ranks hold is laid end to end, in the order of tensors, and cut at whole rows, so that the bytes of
    these ranks level out like water in connected vessels. Where all ranks share it, none exceeds the larger of what it
    alone holds and the mean, by more than about one row; where groups nest (replicas of shards), that mean is of the
    group. A buffer is stored whole by the lowest rank that holds it: ranks may disagree on it, and it is small.

    Raises LayoutError on every rank if one tensor has two shapes, if an element is held nowhere, or if ranks hold
    equal names with different content (pipeline stages or local experts, which are not replicas of each other).
    """
    tensors, aliases, sources, groups = _compare(layout, ranks)
    assumed = _check_replicas(tensors, groups, sources, ranks, _family(layout.kin, ranks))
    shared = _share_out(tensors, groups, ranks)
    owned = sorted(place for each in shared for place in each.owned_by(ranks.rank))
    pieces = tuple(Piece(sources[i, held], box) for i, box, held in owned)
    return Ownership(tensors, aliases, pieces, assumed, tuple(each for each in shared if len(each.ranks) > 1))


def share(layout: Layout, ranks: Ranks) -> tuple[Shared, ...]:
    """Collective: who would own what, if what several ranks hold is as good as equal. Raises LayoutError as `agree`."""
    tensors, _, _, groups = _compare(layout, ranks)
    return tuple(_share_out(tensors, groups, ranks))


def _compare(
    layout: Layout, ranks: Ranks
) -> tuple[tuple[TensorInfo, ...], dict[str, str], dict[tuple[int, Box], LocalTensor], list[Group]]:
    """Collective: the run's tensors and aliases, where their boxes lie on this rank, and who holds which."""
    tensors, aliases = _agree_on_tensors(layout, ranks)
    index = {tensor.fqn: i for i, tensor in enumerate(tensors)}
    # An uneven shard may come out empty; a tensor without elements has an owner all the same.
    sources = {(index[t.info.fqn], t.box): t for t in layout.tensors if t.box.numel or 0 in t.info.shape}

    def say() -> list[bytes]:
        return pack(table_of(sources, most_dims(tensors)), len(tensors), ranks.size)

    return tensors, aliases, sources, group_boxes(tensors, *tell(ranks, say), ranks.rank)


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
    answers, by = tell(ranks, lambda: [json.dumps(sorted(kin)).encode()])
    families: list[set[int]] = []
    for (answer,), sayers in zip(answers, by, strict=True):
        named = {local for rank in json.loads(answer) if (local := ranks.local(rank)) is not None}
        # Plain modules name nobody, so those who say nothing have nothing in common.
        for family in [named | set(sayers)] if named else [{rank} for rank in sayers]:
            joined = family.union(*(other for other in families if other & family))
            families = [other for other in families if not other & family] + [joined]
    return next(family for family in families if ranks.rank in family)


def _agree_on_tensors(layout: Layout, ranks: Ranks) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """Collective: every tensor that some rank has, in an order all ranks agree on, and all aliases."""
    facts: dict[str, tuple[list[int], str, str]] = {}
    first: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    for (answer,), by in zip(*tell(ranks, lambda: [pack_tensors(layout)]), strict=True):
        more_facts, more_aliases = json.loads(zlib.decompress(answer))
        for fqn, fact in more_facts.items():
            first.setdefault(fqn, by)
            if facts.setdefault(fqn, fact) != fact:
                raise LayoutError(
                    f"{fqn} must be the same tensor on all ranks; found {_info(fqn, facts[fqn])} on ranks "
                    f"{listed(first[fqn])} and {_info(fqn, fact)} on ranks {listed(by)}. {APART} make them alike."
                )
        aliases.update(more_aliases)
    if not any(kind == PARAMETER and 0 not in shape for shape, _, kind in facts.values()):
        raise LayoutError(
            "the model must have parameters to average; all are frozen and left out, or have no elements (as DeepSpeed "
            "leaves them), or there are none."
        )
    return tuple(_info(fqn, fact) for fqn, fact in facts.items()), aliases


def pack_tensors(layout: Layout) -> bytes:
    """The tensors of a rank's model, and its aliases, as bytes."""
    facts = {i.fqn: (i.shape, str(i.dtype).removeprefix("torch."), i.kind) for i in layout.infos.values()}
    return zlib.compress(json.dumps([facts, layout.aliases]).encode())


def _info(fqn: str, fact: tuple[Sequence[int], str, str]) -> TensorInfo:
    shape, dtype, kind = fact
    return TensorInfo(fqn, tuple(shape), getattr(torch, dtype), kind)


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
    shared = {n: group for n, group in enumerate(groups) if len(group.owners) > 1}
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
                values = f"other values on ranks {listed(others)} than on rank {by[0]}"
                raise _not_replicas(tensor, by, ranks.size, values, declared=tensor.replicated)

    ranks.together(name)


def _not_replicas(tensor: LocalTensor, by: Sequence[int], num_ranks: int, found: str, *, declared: bool) -> LayoutError:
    if declared:
        return LayoutError(
            f"{tensor.info.fqn} must be equal on ranks {listed(by)}, which DDP or its placements call replicas; found "
            f"{found}, in {tensor.box} of shape {tensor.info.shape}. {APART} start them from the same values."
        )
    return LayoutError(
        f"{tensor.info.fqn} {tensor.info.shape} is the same part of a tensor on ranks {listed(by)} of {num_ranks}, "
        f"and no DDP or mesh calls them replicas: they must be equal on all ranks; found {found}. {APART} wrap the "
        "model in DDP, or in one mesh, before."
    )


def _digest(tensors: Iterable[LocalTensor]) -> bytes:
    """Of the content of all of them, as it is now."""
    content = xxhash.xxh3_64()
    for tensor in tensors:
        flat = tensor.local().cpu().contiguous().reshape(-1)
        content.update(flat.view(torch.uint8).numpy().data)
    return content.digest()


def _share_out(tensors: tuple[TensorInfo, ...], groups: Sequence[Group], ranks: Ranks) -> list[Shared]:
    """What this rank holds, and who owns it; in an order that all ranks agree on."""
    loads = [0] * ranks.size
    shared = []
    for group in groups:
        ends = fill_levels([loads[rank] for rank in group.owners], group.num_bytes)
        shares = dict(zip(group.owners, pairwise([0, *ends]), strict=True))
        for rank, (start, stop) in shares.items():
            loads[rank] += stop - start
        if ranks.rank in group.ranks:
            shared.append(Shared(group.ranks, tensors, group.table, shares))
    return shared
