"""What torch's wrappers do to a model's tensors: where a rank's part of a tensor really lies.

    plain, DDP         in the module, under its name                                       Registered
    FSDP2, HSDP, TP    in a DTensor, in whose place FSDP2 puts gathered tensors at times   Sharded
    FSDP1              among others in the flat parameter of a unit                        Flattened

Wrappers are walked, never called: nothing here gathers a parameter, or talks to another rank. Local storage is looked
up at every use, because wrappers replace it (at the first forward, at load_state_dict).
"""

# ruff: noqa: SLF001  private attributes of torch are what this module is about

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import nn

from phema_dist.errors import LayoutError
from phema_dist.shard import Box, flat_range_to_boxes, flat_span, whole

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

# Names that wrappers insert, and that the bare model's state dict does not have.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


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


def walk(model: nn.Module, prefix: str = "") -> Iterator[Found]:
    """Every parameter and persistent buffer in the model's order, `prefix` before its name; tied ones each time."""
    return _walk(model, prefix, _Books(model), replicated=False)


def reshard(model: nn.Module) -> None:
    """Make every FSDP module of `model` hold its shards again, without communication.

    After a forward without gradients the root stays gathered: its forward would not look at the shards again. A forward
    that was left by an error is over. Raises LayoutError inside FSDP1's `summon_full_params`.
    """
    _reshard_fsdp2(model)
    for unit, handle in _fsdp1_units(model):
        _reshard_fsdp1(unit, handle)


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is in parts, or will be again once it is re-sharded: a forward then needs all ranks."""
    return (
        any(map(is_dtensor, model.parameters()))
        or bool(_instances(model, "FSDPModule"))
        or any(handle is not None and handle.uses_sharded_strategy for _, handle in _fsdp1_units(model))
    )


class _Books:
    """What FSDP writes down about parameters, by the module and the name under which the bare model has them."""

    def __init__(self, model: nn.Module) -> None:
        self.flattened: dict[nn.Module, dict[str, tuple[Any, int]]] = {}  # FSDP1: a unit's handle, an index in it
        self.flattened_by_id: dict[int, tuple[Any, int]] = {}
        self.flat_parameters: set[int] = set()  # their ids
        for handle in [handle for _, handle in _fsdp1_units(model) if handle is not None]:
            flat = handle.flat_param
            self.flat_parameters.add(id(flat))
            for index, (name, module, _) in enumerate(flat._param_infos):
                self.flattened.setdefault(module, {})[name] = (handle, index)
            for name, module, _, first_name, first_module, _ in flat._shared_param_infos:
                self.flattened.setdefault(module, {})[name] = self.flattened[first_module][first_name]
            for index, parameter in enumerate(flat._params or ()):
                self.flattened_by_id[id(parameter)] = (handle, index)
        self.fsdp2 = _fsdp2_parameters(model)


def _walk(module: nn.Module, prefix: str, books: _Books, *, replicated: bool) -> Iterator[Found]:
    ddp = isinstance(module, nn.parallel.DistributedDataParallel)
    replicated = replicated or ddp
    if replicated:
        _refuse_localized(module, prefix)
    flattened = books.flattened.get(module, {})
    for name, (handle, index) in flattened.items():
        yield _find_flattened(prefix + name, module, name, handle, index)
    persistent = {
        name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
    }
    for name, tensor in (module._parameters | persistent).items():
        if tensor is None or name in flattened or id(tensor) in books.flat_parameters:
            continue
        if id(tensor) in books.flattened_by_id:  # tied to a parameter of another unit
            yield _find_flattened(prefix + name, module, name, *books.flattened_by_id[id(tensor)])
        elif is_dtensor(tensor):
            yield _find_sharded(prefix + name, module, name, tensor, books)
        else:
            yield _find_registered(prefix + name, module, name, tensor, replicated=replicated)
    for name, child in module._modules.items():
        if child is not None:
            transparent = name in _TRANSPARENT or (ddp and name == "module")
            yield from _walk(child, prefix if transparent else f"{prefix}{name}.", books, replicated=replicated)


def _refuse_localized(module: nn.Module, prefix: str) -> None:
    """Refuse DDP over tensor parallelism: from the first forward on, torch knows nothing of such parameters."""
    lost = {name: tensor for name, tensor in vars(module).items() if is_dtensor(tensor)}
    for name, tensor in (module._parameters | lost).items():
        if (spec := tensor._spec if is_dtensor(tensor) else getattr(tensor, "_st_info", None)) is not None:
            raise LayoutError(
                f"{_describe(prefix + name, spec)} must not be wrapped by DDP, which takes tensor-parallel parameters "
                "out of their modules. Wrap the model with fully_shard over the same mesh axis instead."
            )


def _instances(model: nn.Module, name: str) -> list[Any]:
    """The modules of a class of torch.distributed.fsdp."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: then there are none
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, getattr(fsdp, name))]


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


def _find_registered(fqn: str, module: nn.Module, name: str, tensor: torch.Tensor, *, replicated: bool) -> Found:
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
            if is_dtensor(tensor) and (tensor.placements, tensor.device_mesh) == (self.spec.placements, self.spec.mesh):
                self.last = tensor
            elif not self.gathers:
                return tensor  # something else, which the caller refuses
            elif self.book is not None:
                self.last = self.book.sharded_param
        return self.last._local_tensor  # 15 times cheaper than to_local(), which enters autograd


def _find_sharded(fqn: str, module: nn.Module, name: str, tensor: DTensor, books: _Books) -> Found:
    spec, local = tensor._spec, tensor._local_tensor

    def parts() -> list[tuple[Box, Part]]:
        box = _block(fqn, spec)
        if box is None or (not box.numel and 0 not in spec.shape):
            return []
        if tuple(local.shape) != box.sizes:
            raise LayoutError(
                f"{_describe(fqn, spec)} must hold {box.sizes} on this rank; found {tuple(local.shape)}. Give "
                "DTensor.from_local the shape and the stride of the whole tensor."
            )
        book = None if books.fsdp2 is None else books.fsdp2.get((module, name))
        return [(box, Sharded(module, name, spec, tensor, books.fsdp2 is None or book is not None, book))]

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
                    f"{_describe(fqn, spec)} must lie in one block on each rank; {placement} on a mesh of shape "
                    f"{tuple(spec.mesh.shape)} interleaves it. Shard it with Shard, or with the split_factor that "
                    f"later axes undo: {later.get(placement.dim, 1)}."
                )
        elif type(placement) not in (Shard, Replicate):
            raise LayoutError(
                f"{_describe(fqn, spec)} must be sharded or replicated to be averaged; found {placement}. Redistribute "
                "it to Shard or Replicate before."
            )
        if isinstance(placement, Shard | _StridedShard):
            later[placement.dim] = later.get(placement.dim, 1) * size
    sizes, offsets = compute_local_shape_and_global_offset(spec.shape, spec.mesh, spec.placements)
    return Box(tuple(offsets), tuple(sizes)) if len(offsets) == len(sizes) else None


def _describe(fqn: str, spec: DTensorSpec) -> str:
    return f"{fqn} of shape {tuple(spec.shape)} with placements {tuple(spec.placements)}"


def _reshard_fsdp2(model: nn.Module) -> None:
    for module in _instances(model, "FSDPModule"):
        # A forward that was left by an error would be taken for one that goes on, and stay gathered.
        state = module._get_fsdp_state()
        if state._is_root and state._training_state.name == "FORWARD" and hasattr(module, "reset_iter_state"):
            module.reset_iter_state()
        for group in _fsdp2_groups(module):  # before torch had reset_iter_state
            if group._training_state.name == "FORWARD":
                group._training_state = type(group._training_state).IDLE
    for module in _instances(model, "FSDPModule"):
        module.reshard()


def _fsdp2_groups(module: Any) -> list[Any]:
    """The parameters of a module by how FSDP2 shards them; up to torch 2.9 it had one group."""
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _fsdp2_parameters(model: nn.Module) -> dict[tuple[nn.Module, str], Any] | None:
    """FSDP2's own record of each parameter; None where this version of torch keeps it in another way."""
    books = {}
    try:
        groups = [group for module in _instances(model, "FSDPModule") for group in _fsdp2_groups(module)]
        for book in [book for group in groups for book in group.fsdp_params]:
            info, _ = book._module_info, book.sharded_param
            books[info.module, info.param_name] = book
            books.update(dict.fromkeys(zip(info.shared_modules, info.shared_param_names, strict=True), book))
    except AttributeError:
        return None
    return books


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


def _find_flattened(fqn: str, module: nn.Module, name: str, handle: Any, index: int) -> Found:
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


def _fsdp1_units(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The modules of FSDP1, and their handles: None for one that has no parameters of its own."""
    for unit in _instances(model, "FullyShardedDataParallel"):
        if not _is_known(unit):
            raise LayoutError(
                f"FSDP1 must keep its shards as torch 2.9 to 2.13 do; torch {torch.__version__} does not. Wrap the "
                "model with torch.distributed.fsdp.fully_shard instead."
            )
        yield unit, unit._handle


def _is_known(unit: Any) -> bool:
    """Whether all is there that is used of torch's FlatParamHandle and FlatParameter."""
    used = "flat_param uses_sharded_strategy _training_state _use_orig_params _skip_writeback_check"
    methods = "_reset_flat_param_grad_info_if_needed _writeback_orig_params"
    flat = "_param_infos _shared_param_infos _shard_param_infos _shapes _strides _params _param_extensions"
    handle: Any = getattr(unit, "_handle", "unknown")
    return handle is None or (
        all(hasattr(handle, name) for name in f"{used} {methods}".split())
        and all(hasattr(handle.flat_param, name) for name in flat.split())
    )


def _reshard_fsdp1(unit: Any, handle: Any) -> None:
    from torch.distributed.fsdp._runtime_utils import _reshard  # noqa: PLC0415

    if unit.training_state.name == "SUMMON_FULL_PARAMS":
        raise LayoutError("an FSDP1 model must hold its shards; leave summon_full_params before.")
    unit.training_state = type(unit.training_state).IDLE  # whatever an error has left is over
    if handle is None or getattr(handle.flat_param, "_local_shard", None) is None:
        return  # before the first forward nothing was gathered
    if handle._training_state.name != "IDLE":
        handle._training_state = type(handle._training_state).IDLE
    elif handle._use_orig_params and not handle._skip_writeback_check:
        # What somebody set is taken in as the next forward would, or it would be lost.
        handle._reset_flat_param_grad_info_if_needed()
        handle._writeback_orig_params()
    _reshard(unit, handle, handle.uses_sharded_strategy)
