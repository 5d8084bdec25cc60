"""What owners have, given to the ranks that hold the same: averages that go back into a model.

A rank owns a part of what it holds with others. Each gives its part to each of them, in messages of a few MiB, and puts
what comes where it belongs, so that no rank needs memory for all of it. Collective, on the main thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeAlias

import torch

from phema_dist.shard import Box, intersect

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.training.layout import TensorInfo
    from phema_dist.training.ownership import Shared
    from phema_dist.training.swap import Write

# Of each tensor, the boxes that this rank owns, and their values in host memory, in `average_dtype`.
Owned: TypeAlias = Mapping[str, Sequence[tuple[Box, torch.Tensor]]]

_MESSAGE_BYTES = 8 << 20
_ALIGNMENT = 16  # of a part in a message: no dtype has larger elements


def exchange(ranks: Ranks, shared: Sequence[Shared], owned: Owned, write: Write) -> None:
    """Collective: call `write` with every part of what this rank holds, its own and those that other ranks own.

    Args:
        ranks: all that hold the model.
        shared: what this rank holds with others, as `agree` or `share` found it.
        owned: what this rank owns.
        write: puts values where they belong; an error of it is raised on all ranks, when all is done.
    """
    errors: list[Exception] = []

    def put(fqn: str, box: Box, values: torch.Tensor) -> None:
        try:  # a rank that stopped here would leave the others waiting
            if not errors:
                write(fqn, box, values)
        except Exception as error:  # noqa: BLE001  raised below, on all ranks
            errors.append(error)

    for fqn, parts in owned.items():
        for box, values in parts:
            put(fqn, box, values)
    for each in shared:  # in one order on all ranks, so that none waits for one that waits for it
        _exchange(ranks, each, owned, put)

    def done() -> None:
        if errors:
            raise errors[0]

    ranks.together(done)


def _exchange(ranks: Ranks, shared: Shared, owned: Owned, put: Write) -> None:
    place, size = shared.ranks.index(ranks.rank), len(shared.ranks)
    mine = list(_messages(_parts(shared, ranks.rank)))
    for step in range(1, size):
        to, source = shared.ranks[(place + step) % size], shared.ranks[(place - step) % size]
        for sent, received in zip_longest(mine, _messages(_parts(shared, source))):
            outgoing = None if sent is None else _filled(sent, owned)
            incoming = None if received is None else torch.empty(_num_bytes(received), dtype=torch.uint8, device="cpu")
            ranks.swap(to, outgoing, source, incoming)
            if received is not None and incoming is not None:
                for (info, box), values in zip(received, _views(received, incoming), strict=True):
                    put(info.fqn, box, values)


def _parts(shared: Shared, rank: int) -> Iterator[tuple[TensorInfo, Box]]:
    """What a rank owns, cut at rows where it is too large for a message."""
    for i, box, _ in shared.owned_by(rank):
        if box.numel:
            info, num_rows = shared.tensors[i], box.num_rows
            step = max(1, _MESSAGE_BYTES * num_rows // (box.numel * info.average_dtype.itemsize))
            yield from ((info, box.rows(a, min(a + step, num_rows))) for a in range(0, num_rows, step))


def _messages(parts: Iterable[tuple[TensorInfo, Box]]) -> Iterator[list[tuple[TensorInfo, Box]]]:
    """Parts that travel together; the same ones on both sides."""
    message: list[tuple[TensorInfo, Box]] = []
    num_bytes = 0
    for part in parts:
        num_bytes += _num_bytes([part])
        if message and num_bytes > _MESSAGE_BYTES:
            yield message
            message, num_bytes = [], _num_bytes([part])
        message.append(part)
    if message:
        yield message


def _filled(message: Sequence[tuple[TensorInfo, Box]], owned: Owned) -> torch.Tensor:
    flat = torch.zeros(_num_bytes(message), dtype=torch.uint8, device="cpu")
    for (info, box), view in zip(message, _views(message, flat), strict=True):
        held, values = next(pair for pair in owned[info.fqn] if intersect(pair[0], box) == box)
        view.copy_(values[box.relative_to(held)])
    return flat


def _views(message: Iterable[tuple[TensorInfo, Box]], flat: torch.Tensor) -> Iterator[torch.Tensor]:
    start = 0
    for info, box in message:
        num_bytes = box.numel * info.average_dtype.itemsize
        yield flat[start : start + num_bytes].view(info.average_dtype).view(box.sizes)
        start += _aligned(num_bytes)


def _num_bytes(message: Iterable[tuple[TensorInfo, Box]]) -> int:
    return sum(_aligned(box.numel * info.average_dtype.itemsize) for info, box in message)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
