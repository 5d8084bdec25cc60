"""What a checkpoint consists of: its tensors and their names there, and which file holds what of them.

Pure: nothing here reads or writes a byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phema_dist.errors import SettingsError
from phema_dist.shard import Box, cut_rows, whole
from phema_dist.storage.manifest import PARAMETER
from phema_dist.storage.snapshot import DTYPE_NAMES, encode_header
from phema_dist.synthesis.tiles import result_dtype

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo

MAX_FILE_BYTES = 5 * 10**9
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Form:
    """How an average is written.

    `dtype` is that of float32 averages; float64 and complex64 ones, and buffers, keep theirs. Of the run's names, those
    that fit one of `keys` (all, if there are none) lose `strip_prefix`, then get `prefix`. `sharded` means one file for
    each rank, `pickled` one .pt; otherwise it is one safetensors file, or several numbered ones if its tensors have
    more than `max_file_bytes`.
    """

    dtype: torch.dtype = torch.float32
    max_file_bytes: int = MAX_FILE_BYTES
    strip_prefix: str = ""
    prefix: str = ""
    keys: tuple[str, ...] = ()
    sharded: bool = False
    pickled: bool = False

    def describe(self) -> dict[str, Any]:
        """What of it changes the tensors and their names, as plain values."""
        names = {"strip_prefix": self.strip_prefix, "prefix": self.prefix, "keys": list(self.keys)}
        return {"dtype": str(self.dtype).removeprefix("torch."), **names}


@dataclass(frozen=True)
class Item:
    """A tensor of a checkpoint: its name in the run, and all names that it has in the checkpoint."""

    fqn: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Under all of its names: each has its own data."""
        return whole(self.shape).numel * self.dtype.itemsize * len(self.names)


Part = tuple[Item, Box]


@dataclass(frozen=True, eq=False)
class CheckpointFile:
    """A file of a checkpoint: the box of each item that is in it, in the order of their data."""

    name: str
    parts: tuple[Part, ...]
    number: int  # of a sharded checkpoint's file: the rank
    out_of: int  # ... and their number; 0 if it is none
    starts: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)  # by fqn: of the data of each name
    data_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        position = 0
        for item, box in self.parts:
            size = box.numel * item.dtype.itemsize
            self.starts[item.fqn] = tuple(position + i * size for i in range(len(item.names)))
            position += size * len(item.names)
        object.__setattr__(self, "data_bytes", position)

    def is_written_by(self, rank: int) -> bool:
        """Whether a rank writes any of it: all write all files, but each its own shard."""
        return not self.out_of or rank == self.number

    def header(self, facts: Mapping[str, Any]) -> bytes:
        """The first bytes of the file, with these facts about the checkpoint."""
        metadata = {"format": "pt", "phema_dist": json.dumps(self.facts_with_shard(facts))}
        if self.out_of:
            offsets = {name: {"saved_offsets": box.offsets} for item, box in self.parts for name in item.names}
            metadata["DCP_SHARDING_INFO"] = json.dumps(offsets)
        table: dict[str, Any] = {"__metadata__": metadata}
        for item, box in self.parts:
            size = box.numel * item.dtype.itemsize
            for name, start in zip(item.names, self.starts[item.fqn], strict=True):
                where = [start, start + size]
                table[name] = {"dtype": DTYPE_NAMES[item.dtype], "shape": box.sizes, "data_offsets": where}
        return encode_header(table)

    def facts_with_shard(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """These facts, and for a sharded checkpoint what its files must say so that they can be joined."""
        if not self.out_of:
            return dict(facts)
        shapes = {item.names[0]: item.shape for item, _ in self.parts}
        tied = {item.names[0]: item.names[1:] for item, _ in self.parts if item.names[1:]}
        return {**facts, "shard": {"rank": self.number, "world_size": self.out_of, "shapes": shapes, "tied": tied}}


def items_of(info: RunInfo, form: Form) -> list[Item]:
    """The tensors of a run that a checkpoint of that form holds, in its order.

    Empty ones come first, then wide elements: so data of each dtype begin at a multiple of their width.
    """
    all_names = [*info.tensors, *info.aliases]
    for pattern in form.keys:
        if not any(fnmatchcase(name, pattern) for name in all_names):
            raise SettingsError(f"no tensor of the run fits {pattern!r}; it has {_some(all_names)}.")
    names: dict[str, list[str]] = {}
    for name in all_names:
        if not form.keys or any(fnmatchcase(name, pattern) for pattern in form.keys):
            names.setdefault(info.aliases.get(name, name), []).append(name)
    odd = [n for group in names.values() for n in group if not n.startswith(form.strip_prefix)]
    if odd:
        raise SettingsError(
            f"every name must begin with {form.strip_prefix!r} for it to be stripped; {_some(odd)} "
            f"{'do' if odd[1:] else 'does'} not. Choose names with --keys."
        )
    items = []
    for fqn, group in names.items():
        facts = info.tensors[fqn]
        dtype = result_dtype(facts)
        if facts.kind == PARAMETER and dtype == torch.float32:
            dtype = form.dtype
        new_names = tuple(form.prefix + name.removeprefix(form.strip_prefix) for name in group)
        if impossible := {"", "__metadata__"} & set(new_names):
            raise SettingsError(f"no tensor may be named {min(impossible)!r}, as {group[0]} would be; change --prefix.")
        items.append(Item(fqn, new_names, facts.shape, dtype))
    return sorted(items, key=lambda item: (item.num_bytes > 0, -item.dtype.itemsize))


def divide(items: Sequence[Item], form: Form, name: str, num_ranks: int) -> list[list[CheckpointFile]]:
    """Which files a checkpoint has, in the groups that are written in one go: all shards, or one file at a time."""
    if form.sharded:
        parts = [cut([(item, whole(item.shape)) for item in items], rank, num_ranks) for rank in range(num_ranks)]
        names = [shard_name(rank, num_ranks) for rank in range(num_ranks)]
        return [[CheckpointFile(names[rank], tuple(parts[rank]), rank, num_ranks) for rank in range(num_ranks)]]
    groups: list[list[Part]] = [[]]
    filled = 0
    for item in items:
        if groups[-1] and filled + item.num_bytes > form.max_file_bytes and not form.pickled:
            groups.append([])
            filled = 0
        groups[-1].append((item, whole(item.shape)))
        filled += item.num_bytes
    if len(groups) == 1:
        return [[CheckpointFile(name, tuple(groups[0]), 0, 0)]]
    stem, suffix = Path(name).stem, Path(name).suffix
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}{suffix}" for i in range(len(groups))]
    return [[CheckpointFile(name, tuple(group), 0, 0)] for name, group in zip(names, groups, strict=True)]


def cut(parts: Sequence[Part], rank: int, num_ranks: int) -> list[Part]:
    """The part of a rank: rows that follow each other, of about as many bytes as the others'. Rank 0 has empty ones."""
    empty, filled = ([part for part in parts if bool(part[0].num_bytes) is full] for full in (False, True))
    num_rows = np.array([box.num_rows for _, box in filled], dtype=np.int64)
    row_bytes = np.array([item.num_bytes // box.num_rows for item, box in filled], dtype=np.int64)
    total = sum(item.num_bytes for item, _ in filled)
    starts, stops = cut_rows(num_rows, row_bytes, total * rank // num_ranks, total * (rank + 1) // num_ranks)
    mine = [
        (item, box.rows(start, stop))
        for (item, box), start, stop in zip(filled, starts.tolist(), stops.tolist(), strict=True)
        if start < stop
    ]
    return empty + mine if rank == 0 else mine


def index_of(files: Sequence[CheckpointFile]) -> bytes:
    """The model.safetensors.index.json of numbered files."""
    weight_map = {name: file.name for file in files for item, _ in file.parts for name in item.names}
    total = sum(file.data_bytes for file in files)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"


def shard_name(rank: int, num_ranks: int) -> str:
    """A file of a sharded checkpoint."""
    return f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")
