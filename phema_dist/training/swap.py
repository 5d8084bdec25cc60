"""Other values in a live model for a while, and its own back afterwards, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from phema_dist.errors import LayoutError
from phema_dist.shard import Box, intersect
from phema_dist.training.wrappers import reshard

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.training.layout import Layout, LocalTensor


Write: TypeAlias = Callable[[str, Box, torch.Tensor], None]


def into(layout: Layout) -> Write:
    """A function that writes a box of a tensor into this rank's storage of a model that holds its shards."""
    held: dict[str, list[LocalTensor]] = {}
    for tensor in layout.tensors:
        held.setdefault(tensor.info.fqn, []).append(tensor)

    @torch.no_grad()
    def write(fqn: str, box: Box, values: torch.Tensor) -> None:
        for tensor in held[fqn]:
            if intersect(tensor.box, box) == box:
                tensor.local()[box.relative_to(tensor.box)].copy_(values)

    return write


@contextmanager
def swapped(model: nn.Module, layout: Layout, ranks: Ranks) -> Iterator[Write]:
    """Put the model in eval mode and yield a function that writes a box of a tensor into this rank's storage.

    On any exit the model gets back its parameters, all its buffers and every module's training flag. The own values
    wait in host memory, so the accelerator holds nothing more. Collective on the way in; the way back never is.
    """
    ranks.each(lambda: reshard(model))
    backup, buffers = ranks.each(lambda: (_own_parameters(layout), _own_buffers(model)))
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield into(layout)
    finally:
        for module, flag in flags:
            module.training = flag
        reshard(model)  # or the root would go on with what it gathered from the average
        for module, name, buffer, _ in buffers:
            module._buffers[name] = buffer  # noqa: SLF001
        with torch.no_grad():
            for tensor, own in backup:
                tensor.local().copy_(own)
            for _, _, buffer, own in buffers:
                if not _equal(buffer, own):  # some buffers cannot be written, and then were not
                    buffer.copy_(own)


@torch.no_grad()
def _own_parameters(layout: Layout) -> list[tuple[LocalTensor, torch.Tensor]]:
    backup = []
    for tensor in layout.tensors:
        if not tensor.is_parameter:  # see below
            continue
        local = tensor.local()
        if local.is_inference() or torch._debug_has_internal_overlap(local) == 1:  # noqa: SLF001
            raise LayoutError(
                f"{tensor.info.fqn} must be writable to hold an average; it is an expanded tensor, or was made in "
                "inference mode. Replace it by a clone."
            )
        backup.append((tensor, local.to("cpu", copy=True)))
    return backup


def _own_buffers(model: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]:
    """All of them, persistent or not: a forward may change or replace them."""
    return [
        (module, name, buffer, buffer.to("cpu", copy=True))
        for module in model.modules()
        for name, buffer in module._buffers.items()  # noqa: SLF001
        if buffer is not None
    ]


def _equal(buffer: torch.Tensor, own: torch.Tensor) -> bool:
    now = buffer.to("cpu").contiguous()
    return now.shape == own.shape and torch.equal(_bits(now), _bits(own.contiguous()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
