"""Other values in a live model for a while, and its own back afterwards, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from phema_dist.errors import LayoutError
from phema_dist.memory import copied
from phema_dist.shard import Box, intersect
from phema_dist.training.parts import Registered
from phema_dist.training.wrappers import reshard

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.training.layout import Layout, LocalTensor


Write: TypeAlias = Callable[[str, Box, torch.Tensor], None]
Place: TypeAlias = tuple["LocalTensor", Callable[[], torch.Tensor]]  # a part of a tensor, and the storage of it


def into(places: Iterable[Place]) -> Write:
    """A function that writes a box of a tensor wherever this rank has it."""
    held: dict[str, list[Place]] = {}
    for tensor, storage in places:
        held.setdefault(tensor.info.fqn, []).append((tensor, storage))

    @torch.no_grad()
    def write(fqn: str, box: Box, values: torch.Tensor) -> None:
        for tensor, storage in held.get(fqn, ()):
            if intersect(tensor.box, box) == box:
                storage()[box.relative_to(tensor.box)].copy_(values)

    return write


def in_model(layout: Layout) -> list[Place]:
    """This rank's storage of a model that holds its shards."""
    return [(tensor, tensor.local) for tensor in layout.tensors]


@dataclass(eq=False)
class _Block:
    """An average that is in a model for now, and the way back."""

    modules: set[nn.Module]
    way_back: list[Callable[[], object]]


_blocks: list[_Block] = []  # in the order in which they were entered


def holds_average(model: nn.Module) -> bool:
    """Whether the parameters of some module of it are an average for now, whoever put it there."""
    return bool(_blocks) and any(not block.modules.isdisjoint(model.modules()) for block in _blocks)


@contextmanager
def swapped(model: nn.Module, layout: Layout, ranks: Ranks) -> Iterator[Write]:
    """Yield a function that writes a box of a tensor into this rank's storage. Evaluate when all is written.

    On any exit the model gets back its parameters, all its buffers and every module's training flag. The own values
    wait in host memory, so the accelerator holds nothing more. Collective on the way in; the way back never is.

    Parameters are exchanged in training mode: some modules (LoRA) merge others into them when they are to evaluate, and
    take them out again when they are to train.
    """
    flags = [(module, module.training) for module in model.modules()]
    block = _Block({module for module, _ in flags}, [partial(_set_flags, flags)])
    _blocks.append(block)

    def begin() -> list[Callable[[], None]]:
        reshard(model)
        check_writable(layout)
        model.train()
        return keep(model, layout)

    try:
        give_back = ranks.each(begin)
        block.way_back[:0] = [
            model.train,
            partial(reshard, model),  # or the root would go on with what it gathered from the average
            *give_back,
            torch.clear_autocast_cache,  # or a forward would go on with what it cast of the average
        ]
        yield into(in_model(layout))
    finally:
        _leave(block)


def _leave(block: _Block) -> None:
    """Go back; a block that was entered later, and is not left yet, goes this way too, when it is."""
    later = _blocks[_blocks.index(block) + 1 :]
    _blocks.remove(block)
    over = next((other for other in later if not other.modules.isdisjoint(block.modules)), None)
    if over is None:
        _do_all(block.way_back)
    else:
        over.modules |= block.modules
        over.way_back += block.way_back


def _set_flags(flags: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        if module.training != flag:
            module.train(flag)
    for module, flag in flags:  # what that has set further in
        module.training = flag


def _do_all(steps: Iterable[Callable[[], object]]) -> None:
    """What cannot be brought back must not keep the rest: the first error is raised at the end."""
    errors = []
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001
            errors.append(error)
    if errors:
        raise errors[0]


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether it can be given other values in place: not one that is expanded, or was made in inference mode."""
    return not (tensor.is_inference() or torch._debug_has_internal_overlap(tensor) == 1)  # noqa: SLF001


def check_writable(layout: Layout) -> None:
    """Raise LayoutError naming the first parameter that cannot be given other values in place."""
    for tensor in layout.tensors:
        if tensor.is_parameter and not is_writable(tensor.local()):  # buffers that are not stay as they are
            raise LayoutError(
                f"{tensor.info.fqn} must be writable to hold an average; it is an expanded tensor, or was made in "
                "inference mode. Replace it by a clone."
            )


@torch.no_grad()
def keep(model: nn.Module, layout: Layout) -> list[Callable[[], None]]:
    """Copy the model's parameters and all its buffers, persistent or not; what brings each of them back.

    A forward may change or replace buffers. Of odd ones, only which they are is kept.
    """
    parameters = [tensor for tensor in layout.tensors if tensor.is_parameter]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()  # noqa: SLF001
        if buffer is not None
    ]
    return [
        *(partial(_give_back, tensor, tensor.local().device, copied(tensor.local())) for tensor in parameters),
        *(partial(_give_buffer_back, *at, at[2].to("cpu", copy=True) if _is_plain(at[2]) else None) for at in buffers),
    ]


@torch.no_grad()
def _give_back(tensor: LocalTensor, where: torch.device, own: torch.Tensor) -> None:
    now = tensor.part.current()
    if isinstance(tensor.part, Registered) and now is not None and (now.dtype, now.device) != (own.dtype, where):
        now.data = own.to(where)  # after model.half() or model.cpu() in the block
    else:
        tensor.local().copy_(own)


@torch.no_grad()
def _give_buffer_back(module: nn.Module, name: str, buffer: torch.Tensor, own: torch.Tensor | None) -> None:
    module._buffers[name] = buffer  # noqa: SLF001
    if own is not None and not _equal(buffer, own):  # some buffers cannot be written, and then were not
        buffer.copy_(own)


def _is_plain(buffer: torch.Tensor) -> bool:
    return buffer.layout == torch.strided and not (buffer.is_meta or buffer.is_quantized or buffer.is_nested)


def _equal(buffer: torch.Tensor, own: torch.Tensor) -> bool:
    now, own = (tensor.to("cpu").resolve_conj().resolve_neg().contiguous() for tensor in (buffer, own))
    return now.shape == own.shape and torch.equal(_bits(now), _bits(own))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
