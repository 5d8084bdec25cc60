"""float32 masters of 16-bit parameters, in the optimizers that keep them: where else a new value must be written.

Such an optimizer steps on its masters and rounds them into the model. A value that is written into the model alone is
gone after the next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from phema_dist.errors import SettingsError
from phema_dist.shard import Box, intersect
from phema_dist.storage.manifest import PARAMETER
from phema_dist.training.parts import is_dtensor

if TYPE_CHECKING:
    from phema_dist.training.layout import Layout, LocalTensor
    from phema_dist.training.swap import Write

Pair = tuple["LocalTensor", torch.Tensor]


def find_masters(layout: Layout, optimizers: Sequence[torch.optim.Optimizer]) -> list[Pair]:
    """The float32 masters that optimizers keep of what this rank holds of a model.

    Known are an optimizer's state with "master" in its name (`state[p]["master_param"]`), and float32 parameters that
    an optimizer steps on instead of the model's, in their order. Either must be what the parameter is, before rounding.

    Raises:
        SettingsError: it keeps parameters that may be masters, and which of which cannot be told.
    """
    low = [t for t in layout.tensors if t.info.kind == PARAMETER and t.info.dtype.itemsize < torch.float32.itemsize]
    at = {_place(tensor.local()): tensor for tensor in low if tensor.box.numel}
    storages = {tensor.local().untyped_storage().data_ptr() for tensor in layout.tensors}
    found: list[Pair] = []
    strangers: list[torch.Tensor] = []
    for optimizer, parameter in _parameters(optimizers):
        local = _local(parameter)
        if local.untyped_storage().data_ptr() not in storages:
            if local.dtype == torch.float32 and local.numel():
                strangers.append(local)
            continue
        for name, master in _named_masters(optimizer, parameter):
            tensor = at.get(_place(local))
            if tensor is None or not _is_master(master, tensor):
                raise SettingsError(
                    f"optimizer= keeps {name!r} of a parameter of shape {tuple(local.shape)}, which is not what that "
                    f"parameter is before rounding; found {master.dtype} {tuple(master.shape)}. {_ADVICE}"
                )
            found.append((tensor, master))
    known = {id(tensor) for tensor, _ in found}
    return found + _paired([tensor for tensor in low if id(tensor) not in known and tensor.box.numel], strangers)


def into_masters(masters: Sequence[Pair]) -> Write:
    """A function that writes a box of a tensor into the masters that are kept of it here."""
    held: dict[str, list[Pair]] = {}
    for tensor, master in masters:
        held.setdefault(tensor.info.fqn, []).append((tensor, master))

    @torch.no_grad()
    def write(fqn: str, box: Box, values: torch.Tensor) -> None:
        for tensor, master in held.get(fqn, ()):
            if intersect(tensor.box, box) == box:
                master[box.relative_to(tensor.box)].copy_(values)

    return write


def _paired(low: Sequence[LocalTensor], strangers: Sequence[torch.Tensor]) -> list[Pair]:
    """Both in their order; parameters may be without a master (frozen ones are), masters not without a parameter."""
    pairs: list[Pair] = []
    rest = iter(low)
    for master in strangers if low else ():  # else they are of another model
        tensor = next((tensor for tensor in rest if _is_master(master, tensor)), None)
        if tensor is None:
            raise SettingsError(
                f"optimizer= steps on {len(strangers)} float32 parameters that are not the model's, and number "
                f"{len(pairs)} of them, of shape {tuple(master.shape)}, is not the master of a 16-bit parameter of it, "
                f"in the model's order. {_ADVICE}"
            )
        pairs.append((tensor, master))
    return pairs


_ADVICE = (
    "Pass only optimizers whose masters are equal to the parameters when rounded, one for each; for others, leave "
    "optimizer= out and copy the parameters into the masters after this call."
)


def _is_master(master: torch.Tensor, tensor: LocalTensor) -> bool:
    low = tensor.local()
    return (
        master.dtype == torch.float32
        and master.shape == low.shape
        and torch.equal(master.detach().to(low.device, low.dtype), low.detach())
    )


def _parameters(optimizers: Iterable[Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise SettingsError(
                f"optimizer= takes a torch.optim.Optimizer, or several; got {type(optimizer).__name__}."
            )
        for group in optimizer.param_groups:
            yield from ((optimizer, parameter) for parameter in group["params"])


def _named_masters(optimizer: Any, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in optimizer.state.get(parameter, {}).items():
        if "master" in str(name) and isinstance(value, torch.Tensor):
            yield str(name), _local(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # noqa: SLF001  see parts.Sharded


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape
