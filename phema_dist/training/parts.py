"""Parts of tensors: where what a rank holds of a tensor really lies, looked up anew at every use.

    plain, DDP         in the module, under its name                                       Registered
    FSDP2, HSDP, TP    in a DTensor, in whose place FSDP2 puts gathered tensors at times   Sharded
    FSDP1              among others in the flat parameter of a unit                        Flattened

Wrappers replace storage (at the first forward, at load_state_dict), so none is kept here. Nothing here gathers a
parameter, or talks to another rank.
"""

# ruff: noqa: SLF001  private attributes of torch are what this module is about

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import nn

from phema_dist.errors import LayoutError
from phema_dist.shard import Box, flat_range_to_boxes, flat_span, whole

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec


class Part(Protocol):
    """Some elements of a tensor, where they lie on this rank."""

    def current(self) -> torch.Tensor | None:
        """Their storage as it is now: a view, not to be kept; None where the tensor is gone."""


@dataclass(frozen=True, eq=False)
class Found:
    """A tensor of the bare model's state dict, as its wrappers left it on this rank."""

    fqn: str  # in the bare model
    module: nn.Module  # that has it there
    name: str  # in this module
    shape: tuple[int, ...]  # of the whole tensor
    like: torch.Tensor  # some local storage of the same kind, dtype and device
    is_parameter: bool
    requires_grad: bool
    identity: Hashable  # the same for every name of a tied tensor
    replicated: bool  # a wrapper or a placement says that other ranks may hold the same elements
    parts: Callable[[], list[tuple[Box, Part]]]  # that lie here; raises LayoutError where they are not boxes


# -- plain tensors


@dataclass(eq=False)
class Registered:
    """All of a tensor, in the module that has it."""

    module: nn.Module
    name: str

    def current(self) -> torch.Tensor | None:
        """See Part."""
        parameters = self.module._parameters
        return parameters[self.name] if self.name in parameters else self.module._buffers.get(self.name)


def find_registered(fqn: str, module: nn.Module, name: str, tensor: torch.Tensor, *, replicated: bool) -> Found:
    """A tensor that is whole, in its module."""
    shape = () if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
    return Found(
        fqn, module, name, shape, tensor, isinstance(tensor, nn.Parameter), tensor.requires_grad, id(tensor),
        replicated=replicated, parts=lambda: [(whole(shape), Registered(module, name))],
    )  # fmt: skip


# -- DTensors: FSDP2, HSDP, tensor parallelism


@dataclass(eq=False)
class Sharded(Registered):
    """The block of a tensor that a DTensor holds here.

    FSDP2 puts what it gathered in the DTensor's place for a while: a plain tensor, or one of other placements. It knows
    its shards itself; where its books cannot be read, the last DTensor that was seen here is the shard.
    """

    spec: DTensorSpec
    last: DTensor
    gathers: bool  # FSDP2 has it
    book: Any  # FSDP2's record of it (FSDPParam), if it can be read

    def current(self) -> torch.Tensor | None:
        """See Part."""
        tensor = super().current()
        if tensor is None:
            return None
        if tensor is not self.last:
            if is_dtensor(tensor) and (tensor.placements, tensor.device_mesh) == (
                self.spec.placements,
                self.spec.mesh,
            ):
                self.last = tensor
            elif not self.gathers:
                return tensor  # something else, which the caller refuses
            elif self.book is not None:
                self.last = self.book.sharded_param
        return self.last._local_tensor  # 15 times cheaper than to_local(), which enters autograd


def find_sharded(
    fqn: str, module: nn.Module, name: str, tensor: DTensor, books: Mapping[tuple[nn.Module, str], Any] | None
) -> Found:
    """A tensor that is a DTensor; `books` is FSDP2's record of it, None if that cannot be read."""
    spec, local = tensor._spec, tensor._local_tensor

    def parts() -> list[tuple[Box, Part]]:
        box = _block(fqn, spec)
        if box is None or (not box.numel and 0 not in spec.shape):
            return []
        if tuple(local.shape) != box.sizes:
            raise LayoutError(
                f"{describe(fqn, spec)} must hold {box.sizes} on this rank; found {tuple(local.shape)}. Give "
                "DTensor.from_local the shape and the stride of the whole tensor."
            )
        book = None if books is None else books.get((module, name))
        return [(box, Sharded(module, name, spec, tensor, books is None or book is not None, book))]

    return Found(
        fqn, module, name, tuple(spec.shape), local, isinstance(tensor, nn.Parameter), tensor.requires_grad, id(tensor),
        replicated=True, parts=parts,
    )  # fmt: skip


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; importing these costs half a second, and none exists before someone did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _block(fqn: str, spec: DTensorSpec) -> Box | None:
    """The one box that lies here, or None on a rank outside of the mesh; raises LayoutError where it is not one."""
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415
    from torch.distributed.tensor.placement_types import _StridedShard  # noqa: PLC0415

    later: dict[int, int] = {}  # into how many parts the mesh axes further on cut a dim
    for placement, size in reversed(list(zip(spec.placements, spec.mesh.shape, strict=True))):
        if isinstance(placement, _StridedShard):  # in torch 2.9 a Shard as well
            if placement.split_factor != later.get(placement.dim, 1):
                raise LayoutError(
                    f"{describe(fqn, spec)} must lie in one block on each rank; {placement} on a mesh of shape "
                    f"{tuple(spec.mesh.shape)} interleaves it. Shard it with Shard, or with the split_factor that "
                    f"later axes undo: {later.get(placement.dim, 1)}."
                )
        elif type(placement) not in (Shard, Replicate):
            raise LayoutError(
                f"{describe(fqn, spec)} must be sharded or replicated to be averaged; found {placement}. Redistribute "
                "it to Shard or Replicate before."
            )
        if isinstance(placement, Shard | _StridedShard):
            later[placement.dim] = later.get(placement.dim, 1) * size
    sizes, offsets = compute_local_shape_and_global_offset(spec.shape, spec.mesh, spec.placements)
    return Box(tuple(offsets), tuple(sizes)) if len(offsets) == len(sizes) else None


def describe(fqn: str, spec: DTensorSpec) -> str:
    """Name, shape and placements, for messages."""
    return f"{fqn} of shape {tuple(spec.shape)} with placements {tuple(spec.placements)}"


# -- FSDP1


@dataclass(frozen=True, eq=False)
class Flattened:
    """Elements of a tensor that lie end to end in FSDP1's flat parameter."""

    handle: Any  # of the unit: torch's FlatParamHandle
    index: int  # which of the unit's parameters
    first: int  # counted from the first element of it that is here
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def current(self) -> torch.Tensor:
        """See Part."""
        flat = self.handle.flat_param
        here = flat._shard_param_infos[self.index]
        source, first = _shard(flat), here.offset_in_shard or 0
        if flat._params is not None:  # use_orig_params=True: what the optimizer steps
            own = flat._params[self.index]
            moved = own.data_ptr() != source.data_ptr() + first * source.element_size()
            if moved and own.numel() == here.numel_in_shard and own.dtype == source.dtype:
                source, first = own.detach(), 0  # somebody set its data; FSDP1 copies that in at the next forward
        return source.as_strided(self.sizes, self.strides, source.storage_offset() + first + self.first)


def find_flattened(fqn: str, module: nn.Module, name: str, handle: Any, index: int) -> Found:
    """A tensor in the flat parameter of a unit of FSDP1, number `index` in its handle."""
    flat = handle.flat_param
    spec: DTensorSpec | None = flat._param_extensions[index]  # under tensor parallelism
    shape = tuple(flat._shapes[index] if spec is None else spec.shape)
    trained = (flat if flat._params is None else flat._params[index]).requires_grad

    def parts() -> list[tuple[Box, Part]]:
        block = whole(shape) if spec is None else _block(fqn, spec)
        return [] if block is None else _flattened_parts(block, handle, index)

    return Found(
        fqn, module, name, shape, _shard(flat), is_parameter=True, requires_grad=trained, identity=(id(flat), index),
        replicated=True, parts=parts,
    )  # fmt: skip


def _flattened_parts(block: Box, handle: Any, index: int) -> list[tuple[Box, Part]]:
    """Cut what lies here of a tensor, or of the block that is flattened; it was laid out as it lay in memory."""
    here, strides = handle.flat_param._shard_param_infos[index], tuple(handle.flat_param._strides[index])
    if not block.numel:
        return [(block, Flattened(handle, index, 0, block.sizes, strides))]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])  # row by row, were the dims in this order
    inner = _with_dims(block, order)
    start, stop = (here.intra_param_start_idx, here.intra_param_end_idx + 1) if here.in_shard else (0, 0)
    parts: list[tuple[Box, Part]] = []
    for cut in flat_range_to_boxes(inner, start, stop):
        box = _with_dims(cut, [order.index(dim) for dim in range(len(order))])
        parts.append((box, Flattened(handle, index, flat_span(cut, inner)[0] - start, box.sizes, strides)))
    return parts


def _with_dims(box: Box, order: Sequence[int]) -> Box:
    return Box(tuple(box.offsets[dim] for dim in order), tuple(box.sizes[dim] for dim in order))


def _shard(flat: Any) -> torch.Tensor:
    """What this rank keeps of a flat parameter, in full precision; before the first forward it is all there is."""
    shard: torch.Tensor | None = getattr(flat, "_local_shard", None)
    return flat.detach() if shard is None else shard
