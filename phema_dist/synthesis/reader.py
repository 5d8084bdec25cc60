"""A synthesized average is a checkpoint: torch.distributed.checkpoint loads it into tensors of any mesh, on any ranks.

Rank 0 plans, once for all; each rank then reads its own boxes. What ranks tell each other goes with DCP's own plans.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader

from phema_dist.errors import DamagedError, KeyMissingError, PhemaError, RunError, SettingsError
from phema_dist.shard import Box, intersect, whole
from phema_dist.storage.run import load_snapshots, open_run, read_info
from phema_dist.storage.store import open_store
from phema_dist.synthesis.recipe import Recipe, announce, plan
from phema_dist.synthesis.stream import MEMORY_BYTES, stream
from phema_dist.synthesis.tiles import cast, result_dtype
from phema_dist.target import Target, as_target

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

    from phema_dist.storage.manifest import RunInfo
    from phema_dist.storage.run import Run, Snapshot
    from phema_dist.synthesis.stream import Sink

_log = logging.getLogger("phema_dist")
Places = dict[Box, list[torch.Tensor]]  # the tensors that want these boxes of one tensor of the run


class SynthesisReader(StorageReader):
    """An average of a run, as a checkpoint that `dcp.load(state_dict, storage_reader=SynthesisReader(...))` reads.

    The state dict is filled in place, whoever wrote the run: tensors, DTensors of any mesh, sharded state dicts of
    FSDP1, on any number of ranks or with `no_dist=True`. A rank reads the bytes of its own boxes, from each snapshot
    that the average is made of. Values are cast to the dtype of the tensors that they are put in.

    What goes wrong is raised by `dcp.load` on every rank, as its CheckpointException (not an Exception): our error ends
    its text, and is in its `failures`, by rank. The state dict may then be filled in part.

    Args:
        url: where the run lives: a folder or any fsspec URL.
        sigma_rel: the length of the average, or any target.
        t: end of the average, as the run counts it; None: the newest complete snapshot.
        storage_options: for the store, as in `PostHocEMA.from_model`.
        prefix: what stands before the names of the run in the state dict: `"model."` for `dcp.load({"model": ...})`.
        partial: whether the state dict may lack tensors of the run. Whether it may have others is the planner's to say:
            `DefaultLoadPlanner(allow_partial_load=True)` leaves them as they are. With `no_dist=True` on several ranks
            none knows what the others lack, and nothing is refused.
        exclude: t's of snapshots to do without, as one that turned out to be damaged.
        memory_bytes: how much memory a rank uses beside the state dict.
        strict: whether to refuse a run with snapshots, up to t, that cannot be used, instead of leaving them out.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        sigma_rel: Target | float = 0.15,
        t: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        *,
        prefix: str = "",
        partial: bool = False,
        exclude: Sequence[int] = (),
        memory_bytes: int = MEMORY_BYTES,
        strict: bool = False,
    ) -> None:
        self._store, self._storage_options = open_store(url, storage_options), storage_options
        self._target, self._t = as_target(sigma_rel), t
        self._prefix, self._partial, self._exclude = prefix, partial, tuple(exclude)
        self._memory_bytes, self._strict = memory_bytes, strict
        self._info: RunInfo

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read another run, if one is given: what `dcp.load(checkpoint_id=...)` says is a url."""
        if checkpoint_id is not None:
            self._store = open_store(checkpoint_id, self._storage_options)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Every name of the run, tied ones too: one chunk each, so that what a rank reads are its own boxes."""
        try:
            info = read_info(self._store)
        except PhemaError as error:  # torch would forget it, and raise an AssertionError
            return Metadata({}, storage_data=error)
        names = {fqn: fqn for fqn in info.tensors} | info.aliases
        found = _Names(self._store.describe())
        for name, fqn in names.items():
            size = torch.Size(info.tensors[fqn].shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            dtype = result_dtype(info.tensors[fqn])
            found[self._prefix + name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [chunk])
        return Metadata(found, storage_data=info)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:  # noqa: ARG002
        """Take what `read_metadata` found, or raise what it met."""
        if isinstance(metadata.storage_data, PhemaError):
            raise metadata.storage_data
        self._info = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add: its items are this rank's boxes."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On rank 0: find the recipe, and hand it to every rank.

        Raises:
            RunError: no rank asks for some tensor of the run, or the run has no complete snapshot.
            ProfileError: no such average.
        """
        run = open_run(self._store)
        if not self._partial and _all_are_here(plans):
            asked = {item.storage_index.fqn for each in plans for item in each.items}
            self._refuse_a_part({self._stored(name) for name in asked})
        (recipe,) = plan(run, [self._target], self._t, unusable=self._excluded(run), strict=self._strict)
        announce([recipe])
        if len(plans) > 1:  # manifests are many, and each rank can read those that it needs
            recipe = _with_snapshots(recipe, lambda snapshot: replace(snapshot, manifests=()))
        return [replace(each, storage_data=recipe) for each in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Fill this rank's tensors. The future is done.

        Raises:
            DamagedError: a file is not what was written; says how to go on without its snapshot.
            StorageError: a file could not be read; KeyMissingError if it is gone.
            SettingsError: a tensor whose dtype cannot hold the average.
        """
        resolved = [(item, planner.resolve_tensor(item)) for item in plan.items]
        places: dict[str, Places] = {}
        for item, tensor in resolved:
            fqn = self._stored(item.storage_index.fqn)
            dtype = result_dtype(self._info.tensors[fqn])
            if not torch.can_cast(dtype, tensor.dtype):
                raise SettingsError(
                    f"{item.dest_index.fqn} must be of a dtype that holds {_name(dtype)}; it is {_name(tensor.dtype)}."
                )
            box = Box(tuple(item.storage_offsets), tuple(item.lengths))
            places.setdefault(fqn, {}).setdefault(box, []).append(tensor.detach())
        if places:
            self._fill(plan.storage_data, places)
        for item, tensor in resolved:
            planner.commit_tensor(item, tensor)
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a run could live there."""
        try:
            open_store(checkpoint_id)
        except SettingsError:
            return False
        return True

    def _stored(self, name: str) -> str:
        """The name under which the run stores what the state dict calls `name`."""
        bare = name.removeprefix(self._prefix)
        return self._info.aliases.get(bare, bare)

    def _refuse_a_part(self, asked: set[str]) -> None:
        tensors = self._info.tensors.items()
        lacking = [self._prefix + fqn for fqn, facts in tensors if fqn not in asked and whole(facts.shape).numel]
        if lacking:
            others = f", nor are {len(lacking) - 1} others" if lacking[1:] else ""
            raise RunError(
                f"the state dict must have every tensor of {self._store.url}; {lacking[0]} is not in it{others}. "
                "Pass partial=True to load without."
            )

    def _excluded(self, run: Run) -> dict[str, str]:
        times = {snapshot.t for snapshot in run.snapshots}
        for t in self._exclude:
            if t not in times:
                raise SettingsError(f"exclude must name snapshots of the run, at t={sorted(times)}; got {t}.")
        return {s.folder: "excluded" for s in run.snapshots if s.t in self._exclude}

    def _fill(self, recipe: Recipe, places: Mapping[str, Places]) -> None:
        try:
            if not recipe.newest.manifests:
                folders = {snapshot.folder for snapshot in _snapshots(recipe)}
                loaded = load_snapshots(self._store, folders)
                recipe = _with_snapshots(recipe, lambda snapshot: loaded[snapshot.folder])
            boxes = {fqn: list(places_of) for fqn, places_of in places.items()}
            stream(self._store, self._info, [recipe], _sink(places), wanted=boxes, memory_bytes=self._memory_bytes)
        except DamagedError as error:
            t = next((snapshot.t for snapshot in _snapshots(recipe) if snapshot.folder == error.folder), None)
            raise DamagedError(f"{error} Pass exclude=({t},) to go on without that snapshot.", error.folder) from error
        except KeyMissingError as error:
            raise KeyMissingError(
                f"{error} A job that writes may have deleted its snapshot meanwhile: load again to do without it."
            ) from error


class _Names(dict[str, STORAGE_TYPES]):
    """What the run has, by name. Says more than torch of the first name that is asked for in vain."""

    def __init__(self, where: str) -> None:
        super().__init__()
        others = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        self._where = None if others else where  # rank 0 says it for all

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if not found and self._where is not None:
            asked = str(name)
            prefix = next((asked.removesuffix(own) for own in self if asked.endswith(f".{own}")), None)
            near = None if prefix else ", ".join(get_close_matches(asked, self, 3))
            hint = f" Pass prefix={prefix!r} if {asked.removeprefix(prefix)} is meant." if prefix else ""
            _log.warning("%s is not in %s.%s", asked, self._where, f" Its nearest names are {near}." if near else hint)
            self._where = None
        return found


def _all_are_here(plans: Sequence[LoadPlan]) -> bool:
    """Whether these are the plans of all ranks that hold the model, as far as one can know."""
    return len(plans) > 1 or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def _snapshots(recipe: Recipe) -> list[Snapshot]:
    return [recipe.newest, *(term.snapshot for term in recipe.terms)]


def _with_snapshots(recipe: Recipe, change: Callable[[Snapshot], Snapshot]) -> Recipe:
    terms = tuple(replace(term, snapshot=change(term.snapshot)) for term in recipe.terms)
    return replace(recipe, terms=terms, newest=change(recipe.newest))


def _sink(places: Mapping[str, Places]) -> Sink:
    """What is made of a box goes to each tensor that holds it; of boxes that overlap, some of it twice."""

    def fill(_: int, fqn: str, box: Box, values: torch.Tensor) -> None:
        for held, tensors in places[fqn].items():
            if intersect(box, held) == box:
                for tensor in tensors:
                    with torch.inference_mode(tensor.is_inference()):  # the caller's mode is not that of this thread
                        tensor[box.relative_to(held)].copy_(cast(values, tensor.dtype, fqn))

    return fill


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
