"""Which tensors of a model this rank holds: their names in the bare model, and the boxes that lie here.

Wrappers are walked, never called: nothing here gathers a parameter, or talks to another rank. Local storage is looked
up anew at every use, because FSDP replaces it (at the first forward, at load_state_dict): no tensor of a model is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from phema_dist.errors import LayoutError
from phema_dist.shard import Box, whole
from phema_dist.storage.manifest import BUFFER, PARAMETER
from phema_dist.storage.snapshot import AVERAGE_DTYPES, DTYPE_NAMES

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


# Names that a wrapper inserts, and that the bare model's state dict does not have.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class TensorInfo:
    """What is true of a tensor on all ranks. A buffer is copied, a parameter averaged; integers count as buffers."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str

    @property
    def average_dtype(self) -> torch.dtype:
        """The dtype its averages are kept and returned in; a buffer keeps its own."""
        return AVERAGE_DTYPES[self.dtype] if self.kind == PARAMETER else self.dtype


@dataclass(frozen=True, eq=False)
class LocalTensor:
    """A tensor of the model, and the box of it that lies on this rank."""

    info: TensorInfo
    box: Box
    replicated: bool  # a DDP group or a DTensor placement says that other ranks hold the same elements
    module: nn.Module
    name: str
    sharded: DTensor | None  # FSDP2 puts plain, gathered tensors in its place for a while; this one stays

    def local(self) -> torch.Tensor:
        """The tensor's local storage as it is now, of shape `box.sizes`; a view, not to be kept."""
        store = self.module._parameters if self.name in self.module._parameters else self.module._buffers  # noqa: SLF001
        tensor = store.get(self.name)
        if self.sharded is not None:
            # What FSDP2 gathers is a plain tensor or, with tensor parallelism, a DTensor of other placements.
            current = tensor if _is_dtensor(tensor) and tensor.placements == self.sharded.placements else self.sharded
            tensor = current._local_tensor  # noqa: SLF001  15 times cheaper than to_local(), which enters autograd
        if tensor is None or tuple(tensor.shape) != self.box.sizes or tensor.dtype != self.info.dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise LayoutError(
                f"{self.info.fqn} must stay as it was when PostHocEMA was made, {self.info.dtype} {self.box.sizes} "
                f"on this rank; found {found}. Make a new PostHocEMA for a changed model."
            )
        return tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """What this rank holds of a model: tensors in the model's order, and second names of tied ones.

    A tensor has any number of boxes here, FSDP1 cuts it anywhere; `infos` names those without one, too.
    """

    infos: dict[str, TensorInfo]
    tensors: tuple[LocalTensor, ...]
    aliases: dict[str, str]  # further name -> the name it is stored under

    def table(self) -> tuple[Any, ...]:
        """The layout as plain values, equal for equal layouts: what is compared and exchanged."""
        return tuple((t.info, t.box, t.replicated) for t in self.tensors), tuple(sorted(self.aliases.items()))


def read_layout(model: nn.Module, *, only_save_diff: bool = False, among: Container[str] | None = None) -> Layout:
    """Look at what this rank holds of `model`: plain, DDP, FSDP2, compiled, with activation checkpoints.

    `only_save_diff` leaves out parameters that do not require gradients, `among` whatever has another name. Raises
    LayoutError for what cannot be averaged without being wrong. FSDP2 modules are re-sharded first (no communication).
    """
    reshard(model)
    tensors: dict[int, LocalTensor] = {}
    aliases: dict[str, str] = {}
    for found in _walk(model, "", replicated=False):
        fqn, module, name, tensor, replicated = found
        if only_save_diff and isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if among is not None and fqn not in among:
            continue
        if (first := tensors.get(id(tensor))) is not None:
            aliases[fqn] = first.info.fqn
        else:
            tensors[id(tensor)] = _local_tensor(fqn, module, name, tensor, replicated=replicated)
    return Layout({t.info.fqn: t.info for t in tensors.values()}, tuple(tensors.values()), aliases)


def reshard(model: nn.Module) -> None:
    """Make every FSDP2 module of `model` hold its shards again, without communication.

    After a forward without gradients the root stays gathered: its forward would not look at the shards again.
    """
    for module in _fsdp_modules(model):
        module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is a DTensor, or will be one again, so that a forward needs all ranks."""
    return any(map(_is_dtensor, model.parameters())) or any(True for _ in _fsdp_modules(model))


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: then there are none
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            yield module


def select(layout: Layout, shapes: Mapping[str, Sequence[int]], *, partial: bool) -> Layout:
    """The tensors of a layout that a run has, by name and shape; `partial` if the model may have more of them.

    Raises LayoutError naming the first that is missing, differs, or is too many.
    """
    for fqn in [*shapes, *(() if partial else layout.infos)]:
        found = tuple(layout.infos[fqn].shape) if fqn in layout.infos else None
        wanted = tuple(shapes[fqn]) if fqn in shapes else None
        if found != wanted:
            raise LayoutError(
                f"the model must have the tensors of the run: {fqn} is {'not' if wanted is None else wanted} in the "
                f"run and {'not' if found is None else found} in the model. Pass the model that was averaged, wrapped "
                "or not."
            )
    return Layout(
        {fqn: info for fqn, info in layout.infos.items() if fqn in shapes},
        tuple(tensor for tensor in layout.tensors if tensor.info.fqn in shapes),
        layout.aliases,
    )


def _walk(
    module: nn.Module, prefix: str, *, replicated: bool
) -> Iterator[tuple[str, nn.Module, str, torch.Tensor, bool]]:
    """Every tensor of the state dict, under the name that the bare model gives it; tied ones under each name."""
    _refuse_fsdp1(module, prefix)
    ddp = isinstance(module, nn.parallel.DistributedDataParallel)
    replicated = replicated or ddp
    persistent = {
        name: buffer
        for name, buffer in module._buffers.items()  # noqa: SLF001
        if name not in module._non_persistent_buffers_set  # noqa: SLF001
    }
    for name, tensor in (module._parameters | persistent).items():  # noqa: SLF001
        if tensor is not None:
            yield prefix + name, module, name, tensor, replicated
    for name, child in module._modules.items():  # noqa: SLF001
        if child is not None:
            transparent = name in _TRANSPARENT or (ddp and name == "module")
            yield from _walk(child, prefix if transparent else f"{prefix}{name}.", replicated=replicated)


def _local_tensor(fqn: str, module: nn.Module, name: str, tensor: torch.Tensor, *, replicated: bool) -> LocalTensor:
    if nn.parameter.is_lazy(tensor):
        raise LayoutError(f"{fqn} must have a shape; it is lazy. Run one forward before.")
    averaged = isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex())
    info = TensorInfo(fqn, tuple(tensor.shape), tensor.dtype, PARAMETER if averaged else BUFFER)
    if averaged and tensor.dtype not in AVERAGE_DTYPES:
        raise LayoutError(
            f"{fqn} must be one of {', '.join(str(d)[6:] for d in AVERAGE_DTYPES)} to be averaged; found "
            f"{tensor.dtype}. Average its master copy, or leave it out with requires_grad=False and only_save_diff."
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise LayoutError(
            f"{fqn} must have a dtype that safetensors can hold; found {tensor.dtype}. A buffer is left out if it is "
            "registered with persistent=False."
        )
    if tensor.device.type == "meta":
        raise LayoutError(f"{fqn} must have storage; it is on the meta device. Call to_empty and initialise it first.")
    if not _is_dtensor(tensor):
        if type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor) or tensor.layout != torch.strided:
            raise LayoutError(
                f"{fqn} must be a plain tensor or a DTensor; found {type(tensor).__name__} with {tensor.layout} layout."
            )
        return LocalTensor(info, whole(info.shape), replicated, module, name, None)
    return LocalTensor(info, _dtensor_box(fqn, tensor), replicated=True, module=module, name=name, sharded=tensor)


def _dtensor_box(fqn: str, tensor: DTensor) -> Box:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    if any(p.is_partial() for p in tensor.placements):
        raise LayoutError(f"{fqn} must be sharded or replicated; found placements {tensor.placements}.")
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tuple(tensor._local_tensor.shape)  # noqa: SLF001
    if local != tuple(sizes):
        raise LayoutError(f"{fqn} with placements {tensor.placements} must hold {tuple(sizes)} here; found {local}.")
    return Box(tuple(offsets), local)


def _is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    # Asked of sys.modules, because importing DTensor costs half a second and no DTensor exists before someone did.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _refuse_fsdp1(module: nn.Module, prefix: str) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        raise LayoutError(
            f"{prefix.rstrip('.') or 'the model'} must be plain, DDP or FSDP2; found FSDP1 (FullyShardedDataParallel). "
            "Wrap it with torch.distributed.fsdp.fully_shard instead."
        )
