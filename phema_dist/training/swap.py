"""Other values in a live model for a while, and its own back afterwards, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from phema_dist.training.layout import Layout, reshard

if TYPE_CHECKING:
    from phema_dist.shard import Box


@contextmanager
def swapped(model: nn.Module, layout: Layout) -> Iterator[Callable[[str, Box, torch.Tensor], None]]:
    """Put the model in eval mode and yield a function that writes a box of a tensor into this rank's storage.

    On any exit the model gets back its parameters, all its buffers and every module's training flag. The own values
    wait in host memory, so the accelerator holds nothing more. No communication, here or in the way back.
    """
    held = {tensor.info.fqn: tensor for tensor in layout.tensors}
    reshard(model)
    with torch.no_grad():
        backup = {fqn: tensor.local().to("cpu", copy=True) for fqn, tensor in held.items()}
        buffers = [
            (module, name, buffer, buffer.to("cpu", copy=True))
            for module in model.modules()
            for name, buffer in module._buffers.items()  # noqa: SLF001  a forward may replace them, persistent or not
            if buffer is not None
        ]
    flags = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def write(fqn: str, box: Box, values: torch.Tensor) -> None:
        tensor = held[fqn]
        tensor.local()[box.relative_to(tensor.box)].copy_(values)

    try:
        model.eval()
        yield write
    finally:
        reshard(model)  # or the root would go on with what it gathered from the average
        with torch.no_grad():
            for module, name, buffer, own in buffers:
                module._buffers[name] = buffer  # noqa: SLF001
                buffer.copy_(own)
            for fqn, own in backup.items():
                held[fqn].local().copy_(own)
        for module, flag in flags:
            module.training = flag
