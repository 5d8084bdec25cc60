"""Snapshot buffers: the averages of one moment, as the bytes of the files that the storage thread will put.

There is one set of them, made once and reused, so a snapshot costs a copy and no allocation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from phema_dist.storage.snapshot import Image, make_images

if TYPE_CHECKING:
    from phema_dist.training.staging import Segment
    from phema_dist.training.tracker import Tracker

_BLOCK = 1 << 20  # elements that are measured at a time
_STILL = 2.0**-20  # movement by the size of a tensor


class SnapshotBuffers:
    """The shard files of this rank: `files[k]` are the images of profile k, most often one.

    Float32 averages are stored in `checkpoint_dtype`, all others in their own dtype.
    """

    def __init__(self, segments: Sequence[Segment], tracker: Tracker, checkpoint_dtype: torch.dtype | None) -> None:
        self._segments, self._tracker = tuple(segments), tracker
        self._narrow = checkpoint_dtype or torch.float32
        self._wide: set[tuple[int, int]] = set()  # segment and piece, stored as float32 all the same
        self._sources = [
            [s.views(flat) for s, flat in zip(tracker.segments, flats, strict=True)] for flats in tracker.averages
        ]
        self._make()

    @torch.no_grad()
    def fill(self, staged: Sequence[torch.Tensor]) -> list[str]:
        """Copy the averages, and buffers of the model from a staging slot, into `files`.

        Returns:
            The names of tensors whose averages are beyond the range of `checkpoint_dtype`, too large for it or too
            small to keep its digits: from now on they are stored as float32.
        """
        widened = self._widen()
        for sources, targets in zip(self._sources, self._targets, strict=True):
            left = iter(sources)
            values = [
                view
                for segment, flat in zip(self._segments, staged, strict=True)
                for view in (next(left) if segment.averaged else segment.views(flat))
            ]
            if values:
                torch._foreach_copy_(targets, values)  # one call, not 5 000
        return widened

    @torch.no_grad()
    def measure(self) -> tuple[int, float, float, float, float]:
        """Numel and sums as in `Measured`, of the float32 averages that are stored in `checkpoint_dtype`.

        Tensor by tensor: the time of reading them once, and memory for a part of one.
        """
        numel, squares, moved, moving_squares, moving_moved = 0, 0.0, 0.0, 0.0, 0.0
        ends = self._tracker.averages[0], self._tracker.averages[-1]
        for s, (segment, *flats) in enumerate(zip(self._tracker.segments, *ends, strict=True)):
            sizes = [piece.box.numel for piece in segment.pieces]
            for p, (first, last) in enumerate(zip(*(torch.split(flat, sizes) for flat in flats), strict=True)):
                if not first.numel() or not self._is_narrow(segment, s, p):
                    continue
                square, way = _squares(first, last)
                numel, squares, moved = numel + first.numel(), squares + square, moved + way
                moving_squares += way / first.numel() * square
                moving_moved += way / first.numel() * way
        return numel, squares, moved, moving_squares, moving_moved

    def _make(self) -> None:
        """Lay out the files anew."""
        self.files: list[list[Image]] = []  # first, so that old and new ones are never there together
        self._targets: list[list[torch.Tensor]] = []
        boxes = [
            (piece.info.fqn, self._dtype(s, p), piece.box)
            for s, segment in enumerate(self._segments)
            for p, piece in enumerate(segment.pieces)
        ]
        for _ in self._sources:
            images, views = make_images(boxes)
            self.files.append(images)
            self._targets.append(views)

    def _dtype(self, s: int, p: int) -> torch.dtype:
        segment = self._segments[s]
        return self._narrow if segment.averaged and self._is_narrow(segment, s, p) else segment.average_dtype

    def _is_narrow(self, segment: Segment, s: int, p: int) -> bool:
        """Whether a piece's averages are stored in `checkpoint_dtype`."""
        return segment.average_dtype == torch.float32 and (s, p) not in self._wide

    def _widen(self) -> list[str]:
        if self._narrow == torch.float32:
            return []
        found = set()
        for averages, views in zip(self._tracker.averages, self._sources, strict=True):
            for s, (segment, flat, pieces) in enumerate(zip(self._tracker.segments, averages, views, strict=True)):
                if segment.average_dtype != torch.float32:
                    continue
                if _exceeds(flat, self._narrow):
                    found |= {(s, p) for p, piece in enumerate(pieces) if _exceeds(piece, self._narrow)}
                found |= {(s, p) for p in _vanishing(pieces, self._narrow)}
        new = sorted(found - self._wide)
        if new:
            self._wide |= found
            self._make()
        return [self._segments[s].pieces[p].info.fqn for s, p in new]


def _squares(first: torch.Tensor, last: torch.Tensor) -> tuple[float, float]:
    """Sums of squares of an average, and of its way to another, block by block."""
    square, way = 0.0, 0.0
    for a, b in zip(torch.split(first, _BLOCK), torch.split(last, _BLOCK), strict=True):
        square += _sum_of_squares(a)
        way += _sum_of_squares(a - b)
    # What seems to move less is at rest: two float32 averages of one number differ by their rounding.
    return square, way if way > square * _STILL**2 else 0.0


def _sum_of_squares(block: torch.Tensor) -> float:
    total = float(block.dot(block))
    return total if math.isfinite(total) else float(block.double().square_().sum())  # above 1e19 they overflow


def _exceeds(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    if not tensor.numel():
        return False
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high)) > torch.finfo(dtype).max


def _vanishing(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[int]:
    """Which tensors are so small, as a rule, that they have fewer digits than others: 2^-14 in float16."""
    norms = torch.stack(torch._foreach_norm(tensors)) if tensors else torch.empty(0)  # noqa: SLF001  one call, not 5 000
    rms = norms / torch.tensor([max(1, tensor.numel()) for tensor in tensors]).sqrt()
    small: list[int] = ((rms > 0) & (rms < torch.finfo(dtype).tiny)).nonzero().flatten().tolist()
    return small
