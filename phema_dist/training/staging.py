"""From the model to host memory: all that the training thread does for an update.

What a rank owns is copied, in its own dtype and memory order, into flat host buffers of two slots: while the averages
take in one slot, training can already fill the other. The buffers are made once and reused for the whole run. From an
accelerator the copy only begins here, and goes on beside training; from the CPU it is done at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from phema_dist.storage.manifest import PARAMETER
from phema_dist.training import device

if TYPE_CHECKING:
    from phema_dist.training.layout import Piece

NUM_SLOTS = 2
_SMALL = 1 << 26  # bytes of which as many again do not matter


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

    @cached_property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Of each piece in a flat buffer: as in the model when this was asked first, so that copies are plain.

        A channels_last parameter is averaged in its own order. A piece with gaps in memory gets row-major strides.
        """
        return tuple(_strides(piece.local()) for piece in self.pieces)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each piece's part of a flat buffer of this segment, in the piece's shape and with its strides."""
        ends = list(accumulate(piece.box.numel for piece in self.pieces))
        return [
            flat[end - piece.box.numel : end].as_strided(piece.box.sizes, strides)
            for piece, strides, end in zip(self.pieces, self.strides, ends, strict=True)
        ]


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    like = torch.empty_like(tensor, device="meta").stride()  # the tensor's own strides, if they leave no gaps
    return like if like == tensor.stride() else torch.empty(tensor.shape, device="meta").stride()


def segments(pieces: Iterable[Piece]) -> tuple[Segment, ...]:
    """Group pieces into segments, keeping their order; parameters come first."""
    groups: dict[tuple[bool, torch.dtype], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault((piece.info.kind != PARAMETER, piece.info.dtype), []).append(piece)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: (key[0], str(key[1])))]
    return tuple(Segment(part) for group in ordered for part in _parts(group))


def _parts(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Cut pieces into runs of almost 2^n bytes: PyTorch rounds pinned memory up to that, to almost twice of one run."""
    sizes = [piece.box.numel * piece.info.dtype.itemsize for piece in pieces]
    part: list[Piece] = []
    filled, left = 0, sum(sizes)
    room = 1 << left.bit_length() >> 1
    for piece, size in zip(pieces, sizes, strict=True):
        if part and filled + size > room and left > _SMALL:
            yield tuple(part)
            left -= filled
            part, filled, room = [], 0, 1 << left.bit_length() >> 1
        part.append(piece)
        filled += size
        room = max(room, _rounded(filled))
    yield tuple(part)


def _rounded(num_bytes: int) -> int:
    """What PyTorch takes for pinned memory of so many bytes."""
    return 1 << max(0, num_bytes - 1).bit_length()


@dataclass
class Copies:
    """What is to be copied: `targets[i]` becomes `sources[i]`."""

    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)

    def by_device(self) -> dict[torch.device, Copies]:
        """Grouped by where the sources are now: storage may move, and lie on several devices."""
        places = [device.of(source) for source in self.sources]
        if len(set(places)) == 1:
            return {places[0]: self}
        groups: dict[torch.device, Copies] = {}
        for where, target, source in zip(places, self.targets, self.sources, strict=True):
            group = groups.setdefault(where, Copies())
            group.targets.append(target)
            group.sources.append(source)
        return groups


class Staging:
    """Host copies of what this rank owns: `slots[i][s]` is slot i's flat buffer of segment s.

    The training thread fills a slot, the averages thread waits for it and reads it; who has a slot is theirs to agree.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = tuple(segments)
        places = [{device.of(piece.local()) for piece in s.pieces} for s in segments]
        pinned = [any(map(device.has_streams, on)) for on in places]
        self.slots = [
            [device.host_buffer(s.numel, s.dtype, pinned=p) for s, p in zip(segments, pinned, strict=True)]
            for _ in range(NUM_SLOTS)
        ]
        self._views = [[s.views(flat) for s, flat in zip(segments, slot, strict=True)] for slot in self.slots]
        self._skips = [device.host_buffer(2, torch.int64, pinned=any(pinned)) for _ in range(NUM_SLOTS)]
        accelerators = filter(device.has_streams, set().union(*places))
        self._side_streams = {where: device.SideStream(where, NUM_SLOTS) for where in accelerators}

    @torch.no_grad()
    def fill(self, slot: int, pieces: Sequence[Sequence[Piece]], skips: torch.Tensor | None = None) -> None:
        """Begin to copy the model into a slot that nobody reads; on the training thread, which does not wait.

        `pieces` are those of each segment, from the model as it is passed now, `skips` is what `Attachment` tells.
        Buffers and `skips` may change at once, parameters only after `fence`. What is on the CPU is copied on return.

        Raises:
            LayoutError: a tensor is not what it was at construction.
            SettingsError: in the capture of a graph.
        """
        changed_by_forward, changed_by_step = Copies(), Copies()
        for segment, views, sources in zip(self._segments, self._views[slot], pieces, strict=True):
            copies = changed_by_step if segment.averaged else changed_by_forward
            copies.targets += views
            copies.sources += [piece.local() for piece in sources]
        if skips is None:
            self._skips[slot].zero_()
        else:
            changed_by_forward.targets.append(self._skips[slot])
            changed_by_forward.sources.append(skips)
        self._begin(slot, changed_by_forward)
        self.fence()
        self._begin(slot, changed_by_step)

    def fence(self) -> None:
        """Let what the training thread asks of a device from now on wait for the copies; returns at once.

        Raises SettingsError in the capture of a graph.
        """
        for side_stream in self._side_streams.values():
            side_stream.fence()

    def wait(self, slot: int) -> None:
        """Return when what was begun with `fill` is in the slot; on the averages thread."""
        for side_stream in tuple(self._side_streams.values()):  # training may meet another device meanwhile
            side_stream.wait(slot)

    def skips(self, slot: int) -> tuple[int, bool]:
        """How many rounds of optimizer steps told so far were none, and whether the latest was; after `wait`."""
        num_skipped, latest = self._skips[slot].tolist()
        return num_skipped, bool(latest)

    def _begin(self, slot: int, copies: Copies) -> None:
        by_device = copies.by_device()
        for where in sorted(by_device, key=device.has_streams, reverse=True):  # what runs by itself begins first
            targets, sources = by_device[where].targets, by_device[where].sources
            if not device.has_streams(where):
                torch._foreach_copy_(targets, sources)  # one call, not 5 000
                continue
            if where not in self._side_streams:
                self._side_streams[where] = device.SideStream(where, NUM_SLOTS)
            self._side_streams[where].begin(slot, targets, sources)
