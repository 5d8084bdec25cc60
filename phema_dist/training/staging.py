"""From the model to host memory: the one moment when the training thread waits for us.

What a rank owns is copied, in its own dtype, into flat host buffers of two slots: while the averages take in one slot,
training can already fill the other. The buffers are made once and reused for the whole run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from phema_dist.storage.manifest import PARAMETER

if TYPE_CHECKING:
    from phema_dist.training.ownership import Piece

NUM_SLOTS = 2


@dataclass(frozen=True, eq=False)
class Segment:
    """Pieces of one dtype and kind, laid end to end: the flat buffers of staging, averages and snapshots follow it."""

    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors in the model."""
        return self.pieces[0].info.dtype

    @property
    def average_dtype(self) -> torch.dtype:
        """Of their averages."""
        return self.pieces[0].info.average_dtype

    @property
    def averaged(self) -> bool:
        """Whether they are averaged; buffers are only copied."""
        return self.pieces[0].info.kind == PARAMETER

    @property
    def numel(self) -> int:
        """Elements of all pieces."""
        return sum(piece.box.numel for piece in self.pieces)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each piece's part of a flat buffer of this segment, in the piece's shape."""
        ends = list(accumulate(piece.box.numel for piece in self.pieces))
        return [
            flat[end - piece.box.numel : end].view(piece.box.sizes)
            for piece, end in zip(self.pieces, ends, strict=True)
        ]


def segments(pieces: Iterable[Piece]) -> tuple[Segment, ...]:
    """Group pieces into segments, keeping their order inside each; parameters come first."""
    groups: dict[tuple[bool, torch.dtype], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault((piece.info.kind != PARAMETER, piece.info.dtype), []).append(piece)
    return tuple(Segment(tuple(groups[key])) for key in sorted(groups, key=lambda key: (key[0], str(key[1]))))


class Staging:
    """Host copies of what this rank owns: `slots[i][s]` is slot i's flat buffer of segment s."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.slots = [[torch.empty(s.numel, dtype=s.dtype, device="cpu") for s in segments] for _ in range(NUM_SLOTS)]
        self._views = [[s.views(flat) for s, flat in zip(segments, slot, strict=True)] for slot in self.slots]

    @torch.no_grad()
    def fill(self, slot: int, pieces: Sequence[Sequence[Piece]]) -> None:
        """Copy the model into a slot that nobody reads.

        `pieces` are those of each segment, from the model as it is passed now. Runs on the training thread and
        returns when the model may change again. Raises LayoutError if a tensor is not what it was at construction.
        """
        for views, sources in zip(self._views[slot], pieces, strict=True):
            torch._foreach_copy_(views, [piece.local() for piece in sources])  # one call, not 5 000
