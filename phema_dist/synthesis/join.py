"""One checkpoint from the files, one for each rank, of a sharded one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phema_dist.errors import LayoutError, RunError
from phema_dist.shard import Box, check_exact_cover, flat_range_to_boxes, flat_span, intersect
from phema_dist.storage.document import EXACT, LONGEST_NAME, counts, one_line, parse_json, shown
from phema_dist.storage.snapshot import DTYPES
from phema_dist.storage.store import LocalStore
from phema_dist.synthesis.checkpoint import Form, Item, shard_name
from phema_dist.synthesis.export import SHARD, Missing, Output, alone_in, explain, find_missing, stable, write_missing
from phema_dist.synthesis.files import named_alike, read_header

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.synthesis.stream import Sink

_PIECE_BYTES = 8 << 20
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Place:
    """A box of a tensor in a file."""

    path: Path
    box: Box
    start: int  # in bytes


@dataclass(frozen=True)
class Shards:
    """A sharded checkpoint: its tensors, where their boxes are, and what it says of itself."""

    items: tuple[Item, ...]
    places: dict[str, list[Place]]
    facts: dict[str, Any]


def join_shards(
    ranks: Ranks,
    folder: Path,
    path: Path,
    form: Form,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Missing, Mapping[str, Any]]:
    """Collective: write the checkpoint that the files in `folder` make together, all ranks together, to `path`.

    Returns:
        What had to be done, and what the checkpoint says of itself.

    Raises:
        RunError: files are missing, or of different averages, or do not make whole tensors.
        SettingsError: something else is at `path`, and `overwrite` is False.
    """
    shards = ranks.each(partial(open_shards, folder))
    output = Output(path, shards.facts)
    ours: set[Path] = set()
    look = partial(find_missing, form, shards.items, ranks.size, output, ours, overwrite=overwrite)
    total = sum(item.num_bytes for item in shards.items) // ranks.size

    def read(_: Sequence[int], wanted: Mapping[str, Sequence[Box]], sink: Sink) -> None:
        for fqn, boxes in wanted.items():
            for box in boxes:
                for piece, values in _pieces(shards, fqn, box):
                    sink(0, fqn, piece, values)
                    if progress is not None:
                        progress(values.nbytes, total)

    with alone_in(ranks, [path.parent]):
        missing = ranks.on_first(look)
        write_missing(ranks, form, shards.items, [output], [missing], ours, read)

    return missing, shards.facts


def open_shards(folder: Path) -> Shards:
    """Look at the files that ranks left in a folder: whether all are there, of one average, and make whole tensors."""
    if not folder.is_dir():
        raise RunError(f"{folder} must be a folder that synthesize --sharded wrote; there is none.")
    files = _all_ranks(folder)
    items: dict[str, Item] = {}
    places: dict[str, list[Place]] = {}
    common: dict[str, Any] = {}
    for rank, path in enumerate(files):
        try:
            facts = _read_shard(path, rank, len(files), items, places)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = one_line(repr(error))[:_LONGEST_REASON]
            raise RunError(f"{path} must be a file that --sharded wrote: {said}.") from error
        if common and stable(facts) != stable(common):
            raise RunError(
                f"the files in {folder} must be of one average; compared with {files[0].name}, {path.name} "
                f"{explain(facts, common)}. Make them again with --sharded --force."
            )
        common = common or facts
    for fqn, item in items.items():
        try:
            check_exact_cover(fqn, item.shape, [place.box for place in places[fqn]])
        except LayoutError as error:
            raise RunError(f"the files in {folder} do not make whole tensors: {error}") from error
    return Shards(tuple(items.values()), places, common)


def _all_ranks(folder: Path) -> list[Path]:
    found = {path.name: path for path in named_alike(folder, SHARD)}
    sizes = sorted({int(name[-17:-12]) for name in found})
    if len(sizes) != 1:
        what = f"those of {' and of '.join(map(str, sizes))} ranks" if sizes else "none"
        raise RunError(
            f"{folder} must hold the files of one sharded checkpoint, rank-*-of-*.safetensors; found {what}."
        )
    missing = [name for rank in range(sizes[0]) if (name := shard_name(rank, sizes[0])) not in found]
    if missing:
        raise RunError(
            f"{folder} must hold the files of all {sizes[0]} ranks; {', '.join(missing[:5])} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Run the same synthesize --sharded again to finish it."
        )
    return list(found.values())


def _read_shard(
    path: Path, rank: int, num_ranks: int, items: dict[str, Item], places: dict[str, list[Place]]
) -> dict[str, Any]:
    """Add what a file holds to items and places, in order. Returns what it says of the whole checkpoint."""
    table, begin = read_header(path)
    metadata = table.pop("__metadata__")
    facts = dict(parse_json(metadata["phema_dist"]))
    offsets = parse_json(metadata["DCP_SHARDING_INFO"])
    shard = facts.pop("shard")
    _check_facts(facts)
    if (shard["rank"], shard["world_size"]) != (rank, num_ranks):
        found = [shown(shard[name], quoted=False) for name in ("rank", "world_size")]
        raise ValueError(f"it says that it is of rank {found[0]} of {found[1]}")
    position = 0
    for name, shape in shard["shapes"].items():  # in the order of their data; tied names have the same data again
        entry = table[name]
        item = Item(name, (name, *shard["tied"].get(name, ())), counts(name, shape), DTYPES[entry["dtype"]])
        if items.setdefault(name, item) != item:
            raise ValueError(f"{shown(name)} is another tensor in the files before")
        box = Box(counts(name, offsets[name]["saved_offsets"]), counts(name, entry["shape"]))
        num_dims = len(item.shape)
        inner = (box.offsets[1:], box.sizes[1:]) == ((0,) * (num_dims - 1), item.shape[1:])
        if not inner or len(box.offsets) != num_dims or len(box.sizes) != num_dims:
            raise ValueError(f"{shown(name)} must be cut into rows")
        places.setdefault(name, []).append(Place(path, box, begin + position))
        for again in item.names:
            _check_name(again)
            size = box.numel * item.dtype.itemsize
            if table.pop(again) != {**entry, "data_offsets": [position, position + size]}:
                raise ValueError(f"{shown(again)} has other data than its shape and place say")
            position += size
    if table:
        raise ValueError(f"it does not say of what tensor {shown(min(table))} is a part")
    return facts


def _check_name(name: object) -> None:
    if type(name) is not str or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"{shown(name)} is no name of a tensor")


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise unless they say what is told of a checkpoint."""
    certificate = facts["certificate"]
    _check_name(facts["target"])
    numbers = (facts["t"], *(certificate[name] for name in ("num_snapshots", "profile_error", "rounding_noise")))
    if not all(type(number) in {int, float} and abs(number) < EXACT for number in numbers):
        raise ValueError("its certificate is none")


def _pieces(shards: Shards, fqn: str, wanted: Box) -> Iterator[tuple[Box, torch.Tensor]]:
    """A box of a tensor, a few MiB at a time, in memory that is used again."""
    item = next(item for item in shards.items if item.fqn == fqn)
    room = bytearray(_PIECE_BYTES)
    for place in shards.places[fqn]:
        shared = intersect(place.box, wanted)
        if shared is None:
            continue
        store = LocalStore(os.fspath(place.path.parent))
        step = _PIECE_BYTES // item.dtype.itemsize
        for start in range(0, shared.numel, step):
            for piece in flat_range_to_boxes(shared, start, min(start + step, shared.numel)):
                first, _, _ = flat_span(piece, place.box)
                values = torch.frombuffer(room, dtype=item.dtype, count=piece.numel).view(piece.sizes)
                position = place.start + first * item.dtype.itemsize
                store.read_into(place.path.name, position, memoryview(room)[: values.nbytes])
                yield piece, values
