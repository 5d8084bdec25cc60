"""float32 masters of 16-bit parameters: where else a new value must be written.

An optimizer that keeps them steps on its masters and rounds them into the model. A value that is written into the model
alone is gone after the next step.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import torch

from phema_dist.errors import SettingsError
from phema_dist.storage.manifest import PARAMETER
from phema_dist.training.parts import is_dtensor
from phema_dist.training.swap import is_writable

if TYPE_CHECKING:
    from phema_dist.training.layout import Layout, LocalTensor
    from phema_dist.training.swap import Place

_NAMED = "masters="


def find_masters(
    layout: Layout, optimizers: Sequence[torch.optim.Optimizer], named: Mapping[torch.Tensor, torch.Tensor]
) -> list[Place]:
    """The masters of what this rank holds of a model: those that are named, and those that optimizers keep.

    In the state of an optimizer they have "master" in their name, as in `state[p]["master_param"]`; apex's FusedAdam
    has them in `param_groups_master`. One of another model is none of ours.

    Raises:
        SettingsError: something named is no master; or an optimizer may step on masters that are not named.
    """
    tensors = [tensor for tensor in layout.tensors if tensor.info.kind == PARAMETER and tensor.box.numel]
    at = sorted((tensor.local().data_ptr(), i) for i, tensor in enumerate(tensors))
    places: list[Place] = []
    for origin, parameter, master in [*((_NAMED, *pair) for pair in named.items()), *_kept(optimizers)]:
        local = _local(parameter)
        start, stop = (bisect_left(at, (local.data_ptr() + n, -1)) for n in (0, local.nbytes))
        inside = [tensors[i] for _, i in at[start:stop]]
        if inside or (local.numel() and origin is _NAMED):
            places += _places(origin, inside, local, _local(master))
    _refuse_unnamed(layout, tensors, places, [_local(parameter) for _, parameter in _parameters(optimizers)], named)
    return places


def _places(origin: str, inside: Sequence[LocalTensor], local: torch.Tensor, master: torch.Tensor) -> list[Place]:
    """Where the tensors of the model that lie in what an optimizer has, `local`, lie in the master of that."""
    parts = [(tensor, part) for tensor in inside if (part := _part(tensor, local, master)) is not None]
    may_be = [{tensor.info.average_dtype, tensor.info.dtype} for tensor, _ in parts]  # or a copy on the host
    if master.shape != local.shape or not parts or not all(master.dtype in dtypes for dtypes in may_be):
        raise SettingsError(
            f"{origin} must hold, of a parameter of the run as it lies here, a float32 tensor of its shape; found "
            f"{tuple(master.shape)}, {master.dtype}, of {'a' if inside else 'another'} parameter of shape "
            f"{tuple(local.shape)}."
        )
    if not is_writable(master):
        raise SettingsError(
            f"{origin} holds a master of {parts[0][0].info.fqn} that cannot be written; it is an expanded tensor, or "
            "was made in inference mode. Replace it by a clone."
        )
    return parts


def _part(tensor: LocalTensor, local: torch.Tensor, master: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """As `_places`, of one tensor. FSDP1 has many, or parts of one, end to end."""
    mine = tensor.local()
    if (mine.data_ptr(), mine.shape) == (local.data_ptr(), local.shape):
        return master.detach  # the same storage
    if local.dim() != 1 or master.shape != local.shape or not (local.is_contiguous() and master.is_contiguous()):
        return None
    first = master.storage_offset() + (mine.data_ptr() - local.data_ptr()) // local.element_size()
    return partial(master.detach().as_strided, mine.shape, mine.stride(), first)


def _refuse_unnamed(
    layout: Layout,
    tensors: Sequence[LocalTensor],
    masters: Sequence[Place],
    stepped: Sequence[torch.Tensor],
    named: Mapping[torch.Tensor, torch.Tensor],
) -> None:
    """Refuse a 16-bit parameter that has no master where others have, or an optimizer has tensors that may be one."""
    known = {tensor.local().untyped_storage().data_ptr() for tensor in layout.tensors}
    known |= {master().untyped_storage().data_ptr() for _, master in masters}
    strangers = [t for t in stepped if t.dtype == torch.float32 and t.untyped_storage().data_ptr() not in known]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in stepped if t.numel())
    have = {tensor.info.fqn for tensor, _ in masters}
    for tensor in tensors if strangers or named else ():
        is_low = tensor.info.dtype.itemsize < torch.float32.itemsize
        if is_low and tensor.info.fqn not in have and tensor.requires_grad and not _is_in(tensor.local(), spans):
            steps = f"optimizer= steps on {len(strangers)} float32 tensors that are not the model's, and not on"
            raise SettingsError(
                f"{steps if strangers else 'masters= has masters of other parameters, and none of'} {tensor.info.fqn}, "
                f"of {str(tensor.info.dtype).removeprefix('torch.')}: there may be a master of it. Name all masters, "
                "masters=dict(zip(trained, masters, strict=True)), with the parameters that have one in their order; "
                "or pass all optimizers of the model, and no others."
            )


def _kept(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for optimizer, parameter in _parameters(optimizers):
        for name, value in optimizer.state.get(parameter, {}).items():
            if "master" in str(name) and isinstance(value, torch.Tensor):
                yield f"optimizer.state[...][{name!r}]", parameter, value
    for optimizer in optimizers:
        groups = getattr(optimizer, "param_groups_master", None) or ()  # made at the first step
        for group, masters in zip(optimizer.param_groups, groups, strict=False):
            for parameter, master in zip(group["params"], masters["params"], strict=False):
                if master is not None:
                    yield "optimizer.param_groups_master", parameter, master


def _parameters(optimizers: Sequence[Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    for optimizer in optimizers:
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
            raise SettingsError(
                f"optimizer= takes a torch.optim.Optimizer, or several; got {type(optimizer).__name__}."
            )
        yield from ((optimizer, parameter) for group in optimizer.param_groups for parameter in group["params"])


def _is_in(tensor: torch.Tensor, spans: Sequence[tuple[float, float]]) -> bool:
    i = bisect_right(spans, (tensor.data_ptr(), inf)) - 1
    return i >= 0 and tensor.data_ptr() < spans[i][1]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # noqa: SLF001  see parts.Sharded
