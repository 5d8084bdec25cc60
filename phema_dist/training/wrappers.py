"""What torch's wrappers do to a model: whose module a tensor is, what is gathered, and which ranks hold it together.

Wrappers are walked, never called: nothing here gathers a parameter, or talks to another rank.
"""

# ruff: noqa: SLF001  private attributes of torch are what this module is about

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from phema_dist.errors import LayoutError
from phema_dist.training.parts import Found, describe, find_flattened, find_registered, find_sharded, is_dtensor

# Names that wrappers insert, and that the bare model's state dict does not have.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def walk(model: nn.Module, prefix: str = "") -> Iterator[Found]:
    """Every parameter and persistent buffer in the model's order, `prefix` before its name; tied ones each time."""
    _refuse_units_outside(model, prefix)
    return _walk(model, prefix, _Books(model), replicated=False)


def kin(model: nn.Module) -> set[int]:
    """The processes, by global rank, that wrappers say hold parts or replicas of this model's tensors."""
    ddp = nn.parallel.DistributedDataParallel
    groups: list[Any] = [module.process_group for module in model.modules() if isinstance(module, ddp)]
    for unit, _ in _fsdp1_units(model):
        groups += [unit.process_group, getattr(unit, "_inter_node_pg", None)]
    meshes = {tensor.device_mesh for tensor in chain(model.parameters(), model.buffers()) if is_dtensor(tensor)}
    found = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    return found.union(*(dist.get_process_group_ranks(group) for group in groups if group is not None))


def reshard(model: nn.Module) -> None:
    """Make every FSDP module of `model` hold its shards again, without communication.

    After a forward without gradients the root stays gathered: its forward would not look at the shards again. A forward
    that was left by an error is over. Raises LayoutError inside FSDP1's `summon_full_params`.
    """
    for module in _instances(model, "FSDPModule"):
        with suppress(AttributeError):  # in another version of torch
            _end_forward(module, module._get_fsdp_state())
        module.reshard()
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
        yield find_flattened(prefix + name, module, name, handle, index)
    persistent = {
        name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
    }
    for name, tensor in (module._parameters | persistent).items():
        if tensor is None or name in flattened or id(tensor) in books.flat_parameters:
            continue
        if id(tensor) in books.flattened_by_id:  # tied to a parameter of another unit
            yield find_flattened(prefix + name, module, name, *books.flattened_by_id[id(tensor)])
        elif is_dtensor(tensor):
            yield find_sharded(prefix + name, module, name, tensor, books.fsdp2)
        else:
            yield find_registered(prefix + name, module, name, tensor, replicated=replicated)
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
                f"{describe(prefix + name, spec)} must not be wrapped by DDP, which takes tensor-parallel parameters "
                "out of their modules. Wrap the model with fully_shard over the same mesh axis instead."
            )


def _refuse_units_outside(model: nn.Module, prefix: str) -> None:
    """Refuse a part of an FSDP1 model whose parameters lie in a unit around it, and are only attributes here."""
    modules = {module: name for name, module in model.named_modules()}
    attributes = chain.from_iterable(vars(module).values() for module in modules)
    if "torch.distributed.fsdp" not in sys.modules or not any(isinstance(each, torch.Tensor) for each in attributes):
        return
    unit_type = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel
    for unit in [each for each in gc.get_objects() if issubclass(type(each), unit_type) and each not in modules]:
        for name, module, _ in getattr(getattr(unit._handle, "flat_param", None), "_param_infos", ()):
            if module in modules:
                raise LayoutError(
                    f"{prefix}{modules[module]}.{name} must belong to an FSDP1 module of the model; it lies in one "
                    "around it. Pass the model that FullyShardedDataParallel returned."
                )


def _instances(model: nn.Module, name: str) -> list[Any]:
    """The modules of a class of torch.distributed.fsdp."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: then there are none
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, getattr(fsdp, name))]


def _end_forward(module: Any, state: Any) -> None:
    """Take in what FSDP2 gathers ahead, and close a forward that was left by an error: neither would be re-sharded."""
    if state._is_root and state._training_state.name == "FORWARD" and hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
    for group in _fsdp2_groups(module):
        group.wait_for_unshard()
        if group._training_state.name == "FORWARD":  # older torch has no reset_iter_state
            group._training_state = type(group._training_state).IDLE


def _fsdp2_groups(module: Any) -> list[Any]:
    """The parameters of a module by how FSDP2 shards them; in older torch, all of them."""
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _fsdp2_parameters(model: nn.Module) -> dict[tuple[nn.Module, str], Any] | None:
    """FSDP2's own record of each parameter; None where this version of torch keeps it in another way."""
    books = {}
    try:
        groups = chain.from_iterable(map(_fsdp2_groups, _instances(model, "FSDPModule")))
        for book in [book for group in groups for book in group.fsdp_params]:
            info, _ = book._module_info, book.sharded_param
            books[info.module, info.param_name] = book
            books.update(dict.fromkeys(zip(info.shared_modules, info.shared_param_names, strict=True), book))
    except AttributeError:
        return None
    return books


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
