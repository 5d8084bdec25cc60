"""Synthesized averages as whole tensors in memory, or as safetensors files that any program loads."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phema_dist.errors import SettingsError
from phema_dist.ranks import ALONE
from phema_dist.shard import Box, flat_span, intersect, whole
from phema_dist.storage.manifest import PARAMETER
from phema_dist.storage.snapshot import DTYPE_NAMES, encode_header
from phema_dist.storage.store import open_store
from phema_dist.synthesis.request import Request, fulfil
from phema_dist.synthesis.stream import num_bytes, stream
from phema_dist.synthesis.tiles import result_dtype
from phema_dist.target import Power

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.recipe import Certificate, Recipe
    from phema_dist.synthesis.stream import Sink

Progress = Callable[[int, int], object]  # bytes read since the last call, bytes in all; called from any thread


@dataclass(frozen=True, eq=False)
class Synthesis:
    """An average of some length: float32 parameters, and buffers, under the names of the bare model."""

    sigma_rel: float
    t: int
    state_dict: dict[str, torch.Tensor]
    certificate: Certificate


def synthesize(
    checkpoint_dir: str | os.PathLike[str],
    sigma_rels: Sequence[float],
    *,
    t: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    calculation_dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> list[Synthesis]:
    """Make averages of several lengths in one pass over the stored bytes, as full CPU tensors.

    Needs no process group, and communicates with none.

    Args:
        checkpoint_dir: where the run lives: a folder or any fsspec URL.
        sigma_rels: the lengths, each in (0, 0.28867].
        t: their end, as the run counts it; None: the newest complete snapshot.
        storage_options: for the store, as in `PostHocEMA.from_model`.
        calculation_dtype: of the sums, float32 or float64.
        progress: told the bytes read since the last call, and how many there are; called from any thread.

    Returns:
        One Synthesis for each sigma_rel, in that order. Names of a tied tensor share one tensor.

    Raises:
        ProfileError: a sigma_rel that does not exist.
        RunError: there is no run, or no complete snapshot at or before t.
        StorageError: storage that does not answer.
    """
    states: list[dict[str, torch.Tensor]] = []

    @contextmanager
    def tensors(info: RunInfo, recipes: Sequence[Recipe]) -> Iterator[Sink]:
        states[:] = [empty_state(info) for _ in recipes]
        yield fill_states(states)

    store = open_store(checkpoint_dir, storage_options)
    recipes = _read_once(store, sigma_rels, t, tensors, calculation_dtype, progress)
    return [Synthesis(_sigma_rel(r), r.t, s, r.certificate) for r, s in zip(recipes, states, strict=True)]


def synthesize_files(
    checkpoint_dir: str | os.PathLike[str],
    outputs: Mapping[float, Path],
    *,
    t: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Recipe]:
    """Make averages in one pass and write each to one .safetensors file, as they are read.

    A file appears whole or not at all. Its metadata holds the recipe and the certificate, as JSON under `phema_dist`.
    Tied tensors are written under each of their names, so that `load_state_dict(strict=True)` takes the file.

    Args:
        checkpoint_dir: where the run lives: a folder or any fsspec URL.
        outputs: sigma_rel -> the file to write; missing folders are made.
        t: end of the averages, as the run counts it; None: the newest complete snapshot.
        storage_options: for the store.
        dtype: of the parameters in the file; float64 and complex64 ones keep theirs.
        overwrite: whether to replace files that exist.
        progress: told the bytes read since the last call, and how many there are; called from any thread.

    Raises:
        SettingsError: a file exists, and `overwrite` is False.
        ProfileError, RunError, StorageError: as `synthesize`.
    """
    for path in outputs.values():
        if path.exists() and not overwrite:
            raise SettingsError(f"{path} exists and would be overwritten; choose another name, or say so with --force.")

    @contextmanager
    def files(info: RunInfo, recipes: Sequence[Recipe]) -> Iterator[Sink]:
        with ExitStack() as stack:
            opened = [
                stack.enter_context(_checkpoint_file(outputs[_sigma_rel(recipe)], info, recipe, dtype))
                for recipe in recipes
            ]
            yield lambda k, fqn, box, values: opened[k](fqn, box, values)

    store = open_store(checkpoint_dir, storage_options)
    return _read_once(store, list(outputs), t, files, torch.float32, progress)


def empty_state(info: RunInfo) -> dict[str, torch.Tensor]:
    """Uninitialised tensors for a whole state dict; tied names share one."""
    with torch.inference_mode(mode=False):  # or no other thread could fill them
        state = {
            fqn: torch.empty(facts.shape, dtype=result_dtype(facts), device="cpu")
            for fqn, facts in info.tensors.items()
        }
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


def _read_once(
    store: Store,
    sigma_rels: Sequence[float],
    t: int | None,
    destination: Callable[[RunInfo, Sequence[Recipe]], AbstractContextManager[Sink]],
    calculation_dtype: torch.dtype,
    progress: Progress | None,
) -> list[Recipe]:
    def make(info: RunInfo, recipes: Sequence[Recipe]) -> None:
        total = num_bytes(recipes)
        report = None if progress is None else lambda n: progress(n, total)
        with destination(info, recipes) as sink:
            stream(store, info, recipes, sink, calculation_dtype=calculation_dtype, progress=report)

    return fulfil(store, ALONE, Request(tuple(map(Power, sigma_rels)), t, calculation_dtype), make)


@contextmanager
def _checkpoint_file(
    path: Path, info: RunInfo, recipe: Recipe, dtype: torch.dtype
) -> Iterator[Callable[[str, Box, torch.Tensor], None]]:
    """A safetensors file that is written box by box, in any order, and appears when all went well."""
    names = list(info.tensors) + list(info.aliases)
    table: dict[str, Any] = {"__metadata__": {"format": "pt", "phema_dist": json.dumps(_describe(recipe))}}
    starts: dict[str, list[int]] = {}
    dtypes: dict[str, torch.dtype] = {}
    position = 0
    for name in names:
        fqn = info.aliases.get(name, name)
        facts = info.tensors[fqn]
        dtypes[fqn] = result_dtype(facts)
        if facts.kind == PARAMETER and dtypes[fqn] == torch.float32:
            dtypes[fqn] = dtype
        stop = position + whole(facts.shape).numel * dtypes[fqn].itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtypes[fqn]], "shape": facts.shape, "data_offsets": [position, stop]}
        starts.setdefault(fqn, []).append(position)
        position = stop
    header = encode_header(table)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.pwrite(fd, header, 0)
        os.truncate(fd, len(header) + position)

        def write(fqn: str, box: Box, values: torch.Tensor) -> None:
            cast = values.to(dtypes[fqn])
            if cast.dtype != values.dtype and not bool(cast.isfinite().all()) and bool(values.isfinite().all()):
                raise SettingsError(
                    f"{fqn} exceeds the range of {str(cast.dtype)[6:]}; write the average in bfloat16 or float32."
                )
            for start in starts[fqn]:
                _write_box(fd, len(header) + start, box, whole(info.tensors[fqn].shape), cast)

        yield write
        os.fsync(fd)
        temporary.replace(path)
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)


def _write_box(fd: int, position: int, box: Box, tensor: Box, values: torch.Tensor) -> None:
    """Write a box of a row-major tensor that begins at a position of the file."""
    first, _, dense = flat_span(box, tensor)
    if not dense:
        for i in range(box.sizes[0]):
            _write_box(fd, position, box.rows(i, i + 1), tensor, values[i : i + 1])
        return
    view = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
    offset = position + first * values.itemsize
    while view:
        written = os.pwrite(fd, view, offset)  # at most 2 GiB a call
        view, offset = view[written:], offset + written


def _sigma_rel(recipe: Recipe) -> float:
    assert isinstance(recipe.target, Power)
    return recipe.target.sigma_rel


def _describe(recipe: Recipe) -> dict[str, Any]:
    return {"library": f"phema-dist {version('phema-dist')}", **recipe.describe()}
