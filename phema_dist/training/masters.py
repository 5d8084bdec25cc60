"""float32 masters of 16-bit parameters, in the optimizers that keep them: where else a new value must be written.

Such an optimizer steps on its masters and rounds them into the model. A value that is written into the model alone is
gone after the next step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from phema_dist.errors import SettingsError
from phema_dist.shard import Box, intersect
from phema_dist.storage.manifest import PARAMETER
from phema_dist.training.parts import Flattened, Sharded, is_dtensor
from phema_dist.training.swap import is_writable

if TYPE_CHECKING:
    from phema_dist.training.layout import Layout, LocalTensor
    from phema_dist.training.swap import Write

Pair = tuple["LocalTensor", torch.Tensor]
_Key = tuple[torch.Size, torch.dtype, int]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Stranger(NamedTuple):
    """A float32 parameter that an optimizer steps on, and that is not the model's."""

    group: tuple[int, int]  # which optimizer, and which of its groups
    values: torch.Tensor


@dataclass
class _Equals:
    """Parameters that have the same bits, and strangers that have them when rounded; by number, in their order."""

    values: torch.Tensor
    trained: list[int] = field(default_factory=list)
    masters: list[int] = field(default_factory=list)


def find_masters(layout: Layout, optimizers: Sequence[torch.optim.Optimizer]) -> list[Pair]:
    """The float32 masters that optimizers keep of what this rank holds of a model.

    Known are an optimizer's state with "master" in its name (`state[p]["master_param"]`), and float32 parameters that
    an optimizer steps on instead of the model's. Either must be what the parameter is, before rounding.

    Raises:
        SettingsError: it keeps parameters that may be masters, and which of which cannot be told.
    """
    tensors = [tensor for tensor in layout.tensors if tensor.info.kind == PARAMETER and tensor.box.numel]
    at = {_place(tensor.local()): tensor for tensor in tensors}
    storages = {tensor.local().untyped_storage().data_ptr() for tensor in layout.tensors}
    pairs: list[Pair] = []
    strangers: list[_Stranger] = []
    spans: list[tuple[float, float]] = []  # of memory that optimizers step on
    for group, optimizer, parameter in _parameters(optimizers):
        local = _local(parameter)
        if not local.numel():
            continue
        if local.untyped_storage().data_ptr() not in storages:
            if local.dtype == torch.float32:
                strangers.append(_Stranger(group, local))
            continue
        spans.append((local.data_ptr(), local.data_ptr() + local.nbytes))
        for name, master in _named_masters(optimizer, parameter):
            tensor = at.get(_place(local))
            if tensor is None or not _is_master(master, tensor):
                raise SettingsError(
                    f"optimizer= keeps {name!r} of a parameter of shape {tuple(local.shape)}, which is not what that "
                    f"parameter is before rounding; found {master.dtype} {tuple(master.shape)}. {_ADVICE}"
                )
            pairs.append((tensor, master))
    low = [tensor for tensor in tensors if tensor.info.dtype.itemsize < torch.float32.itemsize]
    spans.sort()
    pairs += _paired([tensor for tensor in low if not _is_in(tensor.local(), spans)], strangers)
    for tensor, master in pairs:
        if not is_writable(master):
            raise SettingsError(
                f"optimizer= keeps a master of {tensor.info.fqn} that cannot be written; it is an expanded tensor, or "
                "was made in inference mode. Replace it by a clone."
            )
    return pairs


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


def _paired(low: Sequence[LocalTensor], strangers: Sequence[_Stranger]) -> list[Pair]:
    """Strangers, and the parameters that they are when rounded; no optimizer steps on these.

    What is not trained has no master. Either all strangers are masters, or all that is trained has one, and the others
    have other shapes. Parameters that are equal have one each, in their order.
    """
    if not low or not strangers:
        return []
    classes = _classes(low)
    found = [equals for some in classes.values() for equals in some]
    others = _assign(strangers, classes)
    expected = {equals.values.shape for equals in found if equals.trained}
    lacking = any(equals.trained and not equals.masters for equals in found)
    wrong = [(n, "is none") for n in others if lacking or strangers[n].values.shape in expected]
    wrong += [
        (equals.masters[-1], f"is one of {len(equals.masters)} that fit {len(equals.trained)} equal ones")
        for equals in found
        if equals.masters and len(equals.masters) != len(equals.trained)
    ]
    pairs = sorted((n, i) for equals in found for n, i in zip(equals.masters, equals.trained, strict=False))
    in_groups = [(strangers[n].group, i) for n, i in pairs]
    for equals in found if [i for _, i in pairs] != sorted(i for _, i in pairs) else ():
        is_in_one = len({strangers[n].group for n in equals.masters}) == 1
        if len(equals.masters) > 1 and not (is_in_one and in_groups == sorted(in_groups)):
            wrong.append(
                (
                    equals.masters[0],
                    f"fits any of {len(equals.masters)}, which are equal, and the order is not the model's",
                )
            )
    if wrong:
        number, why = wrong[0]
        raise SettingsError(
            f"optimizer= steps on {len(strangers)} float32 parameters that are not the model's, which may be masters "
            f"of 16-bit parameters of it that require gradients. Number {number}, of shape "
            f"{tuple(strangers[number].values.shape)}, {why}. {_ADVICE}"
        )
    return [(low[i], strangers[number].values) for number, i in pairs]


def _classes(low: Sequence[LocalTensor]) -> dict[_Key, list[_Equals]]:
    """Parameters by what they are."""
    classes: dict[_Key, list[_Equals]] = {}
    for i, tensor in enumerate(low):
        values = tensor.local().detach()
        equals = _find(classes, values)
        if equals is None:
            equals = _Equals(values)
            classes.setdefault(_key(values), []).append(equals)
        if _is_trained(tensor):
            equals.trained.append(i)
    return classes


def _assign(strangers: Sequence[_Stranger], classes: Mapping[_Key, Sequence[_Equals]]) -> list[int]:
    """Note strangers where parameters are what they are when rounded; the numbers of all others."""
    shapes, dtypes = {shape for shape, _, _ in classes}, {dtype for _, dtype, _ in classes}
    others = []
    for number, (_, master) in enumerate(strangers):
        rounded = (master.detach().to(dtype) for dtype in dtypes if master.shape in shapes)
        fits = [equals for values in rounded if (equals := _find(classes, values)) is not None]
        for equals in fits:
            equals.masters += [number] * len(fits)  # one that fits in two dtypes is too many in either
        if not fits:
            others.append(number)
    return others


def _find(classes: Mapping[_Key, Sequence[_Equals]], values: torch.Tensor) -> _Equals | None:
    return next((equals for equals in classes.get(_key(values), ()) if _are_same(equals.values, values)), None)


def _key(values: torch.Tensor) -> _Key:
    return values.shape, values.dtype, int(_bits(values).sum(dtype=torch.int64))


_ADVICE = (
    "Pass only optimizers whose masters are equal to the parameters when rounded, one for each, and nothing else of "
    "their shapes; for others, leave optimizer= out and copy the parameters into the masters after this call."
)


def _is_master(master: torch.Tensor, tensor: LocalTensor) -> bool:
    own = tensor.local().detach()
    return (
        master.dtype == tensor.info.average_dtype
        and master.shape == own.shape
        and _are_same(own, master.detach().to(own.dtype))
    )


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(_bits(one), _bits(other.to(one.device)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """To compare by; any NaN is equal to another, for who switches to get rid of them."""
    return tensor.nan_to_num(nan=0.0, posinf=inf, neginf=-inf).view(_INTEGERS[tensor.dtype.itemsize])


def _is_trained(tensor: LocalTensor) -> bool:
    part = tensor.part
    if isinstance(part, Flattened):
        flat = part.handle.flat_param
        return bool((flat if flat._params is None else flat._params[part.index]).requires_grad)  # noqa: SLF001
    return part.last.requires_grad if isinstance(part, Sharded) else tensor.local().requires_grad


def _is_in(tensor: torch.Tensor, spans: Sequence[tuple[float, float]]) -> bool:
    i = bisect_right(spans, (tensor.data_ptr(), inf)) - 1
    return i >= 0 and tensor.data_ptr() < spans[i][1]


def _parameters(optimizers: Iterable[Any]) -> Iterator[tuple[tuple[int, int], Any, torch.Tensor]]:
    for i, optimizer in enumerate(optimizers):
        if not hasattr(optimizer, "param_groups"):
            raise SettingsError(
                f"optimizer= takes a torch.optim.Optimizer, or several; got {type(optimizer).__name__}."
            )
        for j, group in enumerate(optimizer.param_groups):
            yield from (((i, j), optimizer, parameter) for parameter in group["params"])


def _named_masters(optimizer: Any, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in optimizer.state.get(parameter, {}).items():
        if "master" in str(name) and isinstance(value, torch.Tensor):
            yield str(name), _local(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # noqa: SLF001  see parts.Sharded


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape
