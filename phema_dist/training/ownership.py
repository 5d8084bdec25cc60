"""Who owns what: ranks compare what they hold, and elect one owner for every element of every tensor.

The owner averages and stores. Everything here happens once, at construction; afterwards no rank needs another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xxhash

from phema_dist.errors import LayoutError
from phema_dist.shard import Box, Held, check_exact_cover, share_out
from phema_dist.storage.manifest import PARAMETER

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.training.layout import Layout, LocalTensor, TensorInfo


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of rows of a local tensor that this rank owns."""

    source: LocalTensor
    box: Box  # in the whole tensor

    @property
    def info(self) -> TensorInfo:
        """The tensor that this is a piece of."""
        return self.source.info

    def local(self) -> torch.Tensor:
        """The rows as they are now, of shape `box.sizes`; a view, not to be kept."""
        local = self.source.local()
        return local[self.box.relative_to(self.source.box)] if self.box != self.source.box else local


@dataclass(frozen=True, eq=False)
class Ownership:
    """What all ranks agreed on: every tensor of the run, and this rank's pieces of them."""

    tensors: tuple[TensorInfo, ...]
    aliases: dict[str, str]
    pieces: tuple[Piece, ...]


def agree(layout: Layout, ranks: Ranks) -> Ownership:
    """Collective: compare what the ranks hold, check that replicas are replicas, and elect owners.

    Raises LayoutError on every rank if one tensor has two shapes, if an element is held nowhere, or if ranks hold
    equal names with different content (pipeline stages or local experts, which are not replicas of each other).
    """
    tables = ranks.together(layout.table)
    infos: dict[str, TensorInfo] = {}
    holders: dict[tuple[str, Box], list[int]] = {}
    declared: set[tuple[str, Box]] = set()
    aliases: dict[str, str] = {}
    for rank, (tensors, alias_items) in enumerate(tables):
        aliases.update(alias_items)
        for info, box, replicated in tensors:
            if not box.numel and 0 not in info.shape:
                continue  # an uneven shard that came out empty
            if infos.setdefault(info.fqn, info) != info:
                raise LayoutError(
                    f"{info.fqn} must be the same tensor on all ranks; found {infos[info.fqn]} and, on rank {rank}, "
                    f"{info}. Give modules that differ between ranks different names."
                )
            holders.setdefault((info.fqn, box), []).append(rank)
            if replicated:
                declared.add((info.fqn, box))
    if not any(info.kind == PARAMETER for info in infos.values()):
        raise LayoutError("the model must have parameters to average; all are frozen and left out, or there are none.")
    _check_replicas(layout, ranks, holders, declared)

    order = {fqn: index for index, fqn in enumerate(infos)}
    held = [
        # A buffer is stored whole by the lowest rank that holds it: ranks may disagree on it, and it is small.
        # Weighed by its averages: they are most of what a rank keeps and stores, and of 16-bit parameters float32.
        Held(order[fqn], box, infos[fqn].average_dtype.itemsize, tuple(by if infos[fqn].kind == PARAMETER else by[:1]))
        for (fqn, box), by in holders.items()
    ]
    boxes: dict[str, list[Box]] = {fqn: [] for fqn in infos}
    for fqn, box in holders:
        boxes[fqn].append(box)
    for fqn, info in infos.items():
        check_exact_cover(fqn, info.shape, boxes[fqn])
    local = {order[t.info.fqn]: t for t in layout.tensors}
    mine = sorted(share_out(held, ranks.size)[ranks.rank])
    return Ownership(tuple(infos.values()), aliases, tuple(Piece(local[index], box) for index, box in mine))


def _check_replicas(
    layout: Layout, ranks: Ranks, holders: dict[tuple[str, Box], list[int]], declared: set[tuple[str, Box]]
) -> None:
    """Collective: what several ranks hold must be equal to the last bit now, or it would never be one average."""

    def digests() -> dict[tuple[str, Box], bytes]:
        averaged = (t for t in layout.tensors if t.info.kind == PARAMETER)
        return {
            (t.info.fqn, t.box): _digest(t.local()) for t in averaged if len(holders.get((t.info.fqn, t.box), ())) > 1
        }

    by_rank = ranks.together(digests)
    for (fqn, box), held_by in holders.items():
        if (fqn, box) not in by_rank[held_by[0]]:
            continue
        odd = [rank for rank in held_by if by_rank[rank][fqn, box] != by_rank[held_by[0]][fqn, box]]
        if (fqn, box) in declared:
            if odd:
                raise LayoutError(
                    f"{fqn} must be equal on ranks {held_by}, which DDP or its placements call replicas; ranks {odd} "
                    f"differ from rank {held_by[0]}. Start them from the same values."
                )
        elif odd or len(held_by) < ranks.size:
            raise LayoutError(
                f"{fqn} is a whole, plain tensor on ranks {held_by} of {ranks.size}, and no group calls them replicas: "
                "they must be equal on all ranks; found "
                + (f"other values on ranks {odd} than on rank {held_by[0]}" if odd else "it missing on the others")
                + ". If these are different modules (pipeline stages, local experts), name them differently; "
                "otherwise wrap the model in DDP before."
            )


def _digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.cpu().contiguous().reshape(-1)
    return xxhash.xxh3_64_digest(flat.view(torch.uint8).numpy().data) if flat.numel() else b""
