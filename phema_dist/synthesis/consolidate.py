"""Synthesized averages as whole tensors in memory, or as checkpoint files that any program loads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phema_dist import __version__
from phema_dist.errors import DamagedError
from phema_dist.memory import empty
from phema_dist.ranks import ALONE
from phema_dist.shard import Box, intersect, whole
from phema_dist.storage.store import open_store
from phema_dist.synthesis.checkpoint import Form, items_of
from phema_dist.synthesis.export import Output, alone_in, find_missing, write_missing
from phema_dist.synthesis.request import Request, fulfil
from phema_dist.synthesis.stream import MEMORY_BYTES, num_bytes
from phema_dist.synthesis.tiles import result_dtype
from phema_dist.target import Power, Target, as_target

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.storage.manifest import RunInfo
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.recipe import Certificate, Recipe
    from phema_dist.synthesis.stream import Sink

Progress = Callable[[int, int], object]  # bytes read since the last call, bytes in all; called from any thread
_LEFT_OUT = re.compile(r"t=(\d+): (.*)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Synthesis:
    """An average of some length: float32 parameters, and buffers, under the names of the bare model."""

    target: Target
    t: int
    state_dict: dict[str, torch.Tensor]
    certificate: Certificate

    @property
    def sigma_rel(self) -> float | None:
        """The length, if the target is a power profile."""
        return self.target.sigma_rel if isinstance(self.target, Power) else None


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk: its file, the index of its files, or its folder; how many there are, and were before."""

    path: Path
    recipe: Recipe
    num_files: int
    num_kept: int


def synthesize(
    checkpoint_dir: str | os.PathLike[str],
    targets: Sequence[Target | float],
    *,
    t: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    calculation_dtype: torch.dtype = torch.float32,
    memory_bytes: int = MEMORY_BYTES,
    strict: bool = False,
    progress: Progress | None = None,
) -> list[Synthesis]:
    """Make several averages in one pass over the stored bytes, as full CPU tensors.

    Needs no process group, and communicates with none.

    Args:
        checkpoint_dir: where the run lives: a folder or any fsspec URL.
        targets: what is wanted; a float is a sigma_rel, in (0, 0.28867].
        t: the end of those that do not say theirs, as the run counts it; None: the newest complete snapshot.
        storage_options: for the store, as in `PostHocEMA.from_model`.
        calculation_dtype: of the sums, float32 or float64.
        memory_bytes: how much memory to use beside the results.
        strict: whether to refuse a run with snapshots, up to t, that cannot be used, instead of leaving them out.
        progress: told the bytes read since the last call, and how many there are; called from any thread.

    Returns:
        One Synthesis for each target, in that order. Names of a tied tensor share one tensor.

    Raises:
        ProfileError: a target that does not exist.
        RunError: there is no run, or no complete snapshot at or before t.
        StorageError: storage that does not answer.
    """
    states: list[dict[str, torch.Tensor]] = []
    store = open_store(checkpoint_dir, storage_options)
    request = Request(tuple(map(as_target, targets)), t, calculation_dtype, memory_bytes, strict)

    def make(info: RunInfo, recipes: Sequence[Recipe]) -> None:
        states[:] = [empty_state(info) for _ in recipes]
        report = _counted(progress, num_bytes(recipes))
        request.stream(store, info, recipes, fill_states(states), progress=report)

    recipes = fulfil(store, ALONE, request, make)
    return [Synthesis(r.target, r.t, s, r.certificate) for r, s in zip(recipes, states, strict=True)]


def synthesize_files(
    checkpoint_dir: str | os.PathLike[str],
    outputs: Mapping[Target, Path] | Mapping[float, Path] | Mapping[Target | float, Path],
    *,
    t: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    memory_bytes: int = MEMORY_BYTES,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Recipe]:
    """Make averages in one pass and write each to a .safetensors file, as they are read.

    A file appears whole or not at all. Its metadata holds the recipe and the certificate, as JSON under `phema_dist`.
    One that is there already, of the same recipe, is kept. Above 5 GB it becomes several numbered ones and an index.
    Tied tensors are written under each of their names, so that `load_state_dict(strict=True)` takes the file.

    Args:
        checkpoint_dir: where the run lives: a folder or any fsspec URL.
        outputs: target (or sigma_rel) -> the file to write; missing folders are made.
        t: end of the averages that do not say theirs, as the run counts it; None: the newest complete snapshot.
        storage_options: for the store.
        dtype: of the parameters in the file; float64 and complex64 ones keep theirs.
        memory_bytes: how much memory to use.
        strict: whether to refuse a run with snapshots, up to t, that cannot be used, instead of leaving them out.
        overwrite: whether to replace files that exist.
        progress: told the bytes read since the last call, and how many there are; called from any thread.

    Raises:
        SettingsError: something else is there, and `overwrite` is False.
        ProfileError, RunError, StorageError: as `synthesize`.
    """
    store = open_store(checkpoint_dir, storage_options)
    request = Request(tuple(map(as_target, outputs)), t, memory_bytes=memory_bytes, strict=strict)
    paths = [Path(path) for path in outputs.values()]
    written = write_checkpoints(store, ALONE, request, paths, Form(dtype), overwrite=overwrite, progress=progress)
    return [checkpoint.recipe for checkpoint in written]


def write_checkpoints(
    store: Store,
    ranks: Ranks,
    request: Request,
    paths: Sequence[Path],
    form: Form,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Written]:
    """Collective: make the averages of a request in one pass, all ranks together, each as a checkpoint at its path.

    What is there already of the same recipe and form is kept. Should a snapshot turn out to be damaged, checkpoints
    that are not whole yet begin again without it.

    Raises:
        SettingsError: something else is there, and `overwrite` is False; a name or a form that cannot be.
        ProfileError, RunError, StorageError: as `synthesize`.
    """
    written: dict[int, Written] = {}
    ours: set[Path] = set()  # files that this call has made, or kept in a checkpoint that was not whole

    def make(info: RunInfo, recipes: Sequence[Recipe]) -> None:
        items = items_of(info, form)
        pending = [k for k in range(len(paths)) if k not in written]
        outputs = [
            Output(paths[k], _facts(recipes[k], form), partial(_require_the_same_left_out, recipes[k])) for k in pending
        ]
        look = partial(find_missing, form, items, ranks.size, ours=ours, overwrite=overwrite)
        missing = ranks.on_first(lambda: [look(output) for output in outputs])
        for k, todo in zip(pending, missing, strict=True):
            if todo.nothing:
                written[k] = Written(todo.shown, recipes[k], todo.num_files, todo.num_kept)

        report = _counted(progress, num_bytes([recipes[k] for k in pending if k not in written]) // ranks.size)

        def read(chosen: Sequence[int], wanted: Mapping[str, Sequence[Box]], sink: Sink) -> None:
            request.stream(store, info, [recipes[pending[k]] for k in chosen], sink, wanted, report)

        write_missing(ranks, form, items, outputs, missing, ours, read)
        for k, todo in zip(pending, missing, strict=True):
            written[k] = Written(todo.shown, recipes[k], todo.num_files, todo.num_kept)

    with alone_in(ranks, [path if form.sharded else path.parent for path in paths]):
        fulfil(store, ranks, request, make)
    return [written[k] for k in range(len(paths))]


def empty_state(info: RunInfo) -> dict[str, torch.Tensor]:
    """Uninitialised tensors for a whole state dict; tied names share one."""
    state = {fqn: empty(facts.shape, result_dtype(facts)) for fqn, facts in info.tensors.items()}
    return state | {alias: state[fqn] for alias, fqn in info.aliases.items()}


def fill_states(states: Sequence[Mapping[str, torch.Tensor]]) -> Sink:
    """A sink that puts what is streamed into one state dict per target."""
    return fill_boxes([{fqn: [(whole(t.shape), t)] for fqn, t in state.items()} for state in states])


def fill_boxes(targets: Sequence[Mapping[str, Sequence[tuple[Box, torch.Tensor]]]]) -> Sink:
    """A sink that puts what is streamed where it belongs: for each target, the boxes of each tensor and their data."""

    def fill(k: int, fqn: str, box: Box, values: torch.Tensor) -> None:
        held, tensor = next(pair for pair in targets[k][fqn] if intersect(box, pair[0]) == box)
        tensor[box.relative_to(held)].copy_(values)

    return fill


def _counted(progress: Progress | None, total: int) -> Callable[[int], object] | None:
    return None if progress is None else lambda count: progress(count, total)


def _facts(recipe: Recipe, form: Form) -> dict[str, Any]:
    return {"library": f"phema-dist {__version__}", **recipe.describe(), "form": form.describe()}


def _require_the_same_left_out(recipe: Recipe, found: Mapping[str, Any]) -> None:
    """Find the recipe again that an existing checkpoint was begun with, if it had to do without a damaged snapshot.

    Planning alone does not see the damage. So this raises what reading would, and the next plan leaves it out.
    """
    snapshots = {s.t: s for s in (recipe.newest, *(term.snapshot for term in recipe.terms))}
    if found.get("target") == recipe.target.name:
        certificate = found.get("certificate", {})
        for text in (*certificate.get("left_out", ()), *certificate.get("ends_before", ())):
            match = _LEFT_OUT.fullmatch(text)
            if match and int(match[1]) in snapshots:
                raise DamagedError(match[2], snapshots[int(match[1])].folder)
