"""float32 masters of 16-bit parameters: where else a new value must be written.

An optimizer that keeps them steps on its masters and rounds them into the model. A value that is written into the model
alone is gone after the next step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
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


def find_masters(
    layout: Layout, optimizers: Sequence[torch.optim.Optimizer], named: Mapping[torch.Tensor, torch.Tensor]
) -> list[Place]:
    """The masters of what this rank holds of a model: those that are named, and those in the state of optimizers.

    In the state of an optimizer they have "master" in their name, as in `state[p]["master_param"]`.

    Raises:
        SettingsError: something named is no master; or an optimizer may step on masters that are not named.
    """
    tensors = [tensor for tensor in layout.tensors if tensor.info.kind == PARAMETER and tensor.box.numel]
    at = {_place(tensor.local()): tensor for tensor in tensors}
    places: list[Place] = []
    for origin, parameter, master in [*(("masters=", *pair) for pair in named.items()), *_in_state(optimizers)]:
        local, master = _local(parameter), _local(master)  # noqa: PLW2901
        if not local.numel():
            continue
        tensor = at.get(_place(local))
        if tensor is None or master.shape != local.shape or master.dtype != tensor.info.average_dtype:
            raise SettingsError(
                f"{origin} must hold, of a parameter of the model, a float32 tensor of its shape; found "
                f"{tuple(master.shape)}, {master.dtype}, of {'another' if tensor is None else 'a'} parameter of shape "
                f"{tuple(local.shape)}."
            )
        if not is_writable(master):
            raise SettingsError(
                f"{origin} holds a master of {tensor.info.fqn} that cannot be written; it is an expanded tensor, or "
                "was made in inference mode. Replace it by a clone."
            )
        places.append((tensor, master.detach))  # the same storage
    _refuse_unnamed(layout, tensors, places, [_local(parameter) for _, parameter in _parameters(optimizers)])
    return places


def _refuse_unnamed(
    layout: Layout, tensors: Sequence[LocalTensor], masters: Sequence[Place], stepped: Sequence[torch.Tensor]
) -> None:
    """Refuse float32 tensors that are stepped on instead of 16-bit parameters."""
    known = {tensor.local().untyped_storage().data_ptr() for tensor in layout.tensors}
    known |= {master().untyped_storage().data_ptr() for _, master in masters}
    strangers = [t for t in stepped if t.dtype == torch.float32 and t.untyped_storage().data_ptr() not in known]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in stepped if t.numel())
    have = {tensor.info.fqn for tensor, _ in masters}
    for tensor in tensors if strangers else ():
        is_low = tensor.info.dtype.itemsize < torch.float32.itemsize
        if is_low and tensor.info.fqn not in have and tensor.requires_grad and not _is_in(tensor.local(), spans):
            raise SettingsError(
                f"optimizer= steps on {len(strangers)} float32 tensors that are not the model's, and not on "
                f"{tensor.info.fqn}, of {str(tensor.info.dtype).removeprefix('torch.')}: they may be masters. Name "
                "them, masters=dict(zip(model.parameters(), masters)), or pass the optimizers of the model only."
            )


def _in_state(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for optimizer, parameter in _parameters(optimizers):
        for name, value in optimizer.state.get(parameter, {}).items():
            if "master" in str(name) and isinstance(value, torch.Tensor):
                yield f"optimizer.state[...][{name!r}]", parameter, value


def _parameters(optimizers: Sequence[Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise SettingsError(
                f"optimizer= takes a torch.optim.Optimizer, or several; got {type(optimizer).__name__}."
            )
        yield from ((optimizer, parameter) for group in optimizer.param_groups for parameter in group["params"])


def _is_in(tensor: torch.Tensor, spans: Sequence[tuple[float, float]]) -> bool:
    i = bisect_right(spans, (tensor.data_ptr(), inf)) - 1
    return i >= 0 and tensor.data_ptr() < spans[i][1]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # noqa: SLF001  see parts.Sharded


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape
