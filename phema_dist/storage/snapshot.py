"""Shards as safetensors files: the bytes of one rank's part of one profile, and back.

A file is its header (length, then JSON) and the data without gaps. The header never changes during an attempt, so an
image of the whole file is made once, and a snapshot only fills in the data. The key `DCP_SHARDING_INFO` lets torch's
own HuggingFaceStorageReader open a folder of them.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xxhash

from phema_dist.errors import SnapshotError
from phema_dist.shard import Box, intersect, whole
from phema_dist.storage.document import counts, parse_json, shown
from phema_dist.storage.manifest import (
    BLOCK_BYTES,
    PARAMETER,
    Manifest,
    ShardFile,
    manifest_name,
    snapshot_folder,
    to_json,
)

if TYPE_CHECKING:
    from phema_dist.storage.manifest import RunInfo, TensorFacts
    from phema_dist.storage.store import Store

# torch's dtypes by the names that safetensors gives them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What an average can be made of, and the dtype it is kept and returned in.
AVERAGE_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.complex64,
}
# Rounding to nearest errs by at most half a unit in the last place, this much of the number.
HALF_ULP = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_LONGEST_REASON = 300
_ALIGNMENT = 64  # of the data in the file, so that it can be viewed as any dtype


@dataclass(frozen=True)
class Entry:
    """A box of a tensor inside a shard file: its data are the bytes `start` to `stop` after the header."""

    fqn: str
    dtype: torch.dtype
    box: Box
    start: int
    stop: int


class Image:
    """A whole shard file in memory, reused for every snapshot.

    `boxes` are what it holds, each tensor once; `views` are their writable data, row-major, in the order given.
    """

    def __init__(self, boxes: Sequence[tuple[str, torch.dtype, Box]]) -> None:
        entries: dict[int, Entry] = {}
        position = 0
        # Wide elements first: then each begins at a multiple of its element, without padding.
        for i in sorted(range(len(boxes)), key=lambda i: -boxes[i][1].itemsize):
            fqn, dtype, box = boxes[i]
            stop = position + box.numel * dtype.itemsize
            entries[i] = Entry(fqn, dtype, box, position, stop)
            position = stop
        header = _build_header(list(entries.values()))
        self.header_bytes = len(header)
        self.buffer = bytearray(len(header) + position)
        self.buffer[: len(header)] = header
        self.views = [self._view(entries[i]) for i in range(len(boxes))]

    def _view(self, entry: Entry) -> torch.Tensor:
        if not entry.box.numel:
            return torch.empty(entry.box.sizes, dtype=entry.dtype, device="cpu")
        start = self.header_bytes + entry.start
        flat = torch.frombuffer(self.buffer, dtype=entry.dtype, count=entry.box.numel, offset=start)
        return flat.view(entry.box.sizes)

    def checksums(self) -> tuple[str, ...]:
        """xxh3-64 of the header, then of each block of the data."""
        view = memoryview(self.buffer)
        starts = range(self.header_bytes, len(view), BLOCK_BYTES)
        parts = [view[: self.header_bytes], *(view[start : start + BLOCK_BYTES] for start in starts)]
        return tuple(xxhash.xxh3_64_hexdigest(part) for part in parts)


def make_images(boxes: Sequence[tuple[str, torch.dtype, Box]]) -> tuple[list[Image], list[torch.Tensor]]:
    """One rank's part of a profile as files, and the data of each box, in the order given.

    A safetensors file has a tensor once. Where FSDP1 cuts a tensor into several boxes, the second go to a second file.
    """
    numbers: list[int] = []
    seen: Counter[str] = Counter()
    for fqn, _, _ in boxes:
        numbers.append(seen[fqn])
        seen[fqn] += 1
    images = [
        Image([box for box, number in zip(boxes, numbers, strict=True) if number == n])
        for n in range(max(numbers, default=-1) + 1)
    ]
    views = [iter(image.views) for image in images]
    return images, [next(views[number]) for number in numbers]


def write_snapshot(store: Store, manifest: Manifest, images: Iterable[tuple[str, float, Image]]) -> int:
    """Put one rank's files of a snapshot, then its manifest: until that last put the rank has written nothing.

    Args:
        store: where the run lives.
        manifest: everything but its files.
        images: file name inside the snapshot, sigma_rel, and contents; one may be filled when its turn comes.

    Returns:
        The number of bytes written.
    """
    folder = snapshot_folder(manifest.t, manifest.attempt)
    files = []
    for name, sigma_rel, image in images:
        checksums = image.checksums()  # before any client sees the bytes
        store.put(f"{folder}/{name}", image.buffer)
        data_bytes = len(image.buffer) - image.header_bytes
        files.append(ShardFile(name, sigma_rel, image.header_bytes, data_bytes, checksums))
    facts = Manifest(**{**manifest.__dict__, "files": tuple(files)})
    text = to_json(facts)
    store.put(f"{folder}/{manifest_name(manifest.rank, manifest.world_size)}", text)
    return sum(file.header_bytes + file.data_bytes for file in files) + len(text)


def parse_header(header: bytes, file: ShardFile, run: RunInfo, where: str) -> tuple[Entry, ...]:
    """The entries of a shard file, in the order of their bytes.

    Raises:
        SnapshotError: the header is not the one that was written, or does not fit the run.
    """
    if xxhash.xxh3_64_hexdigest(header) != file.checksums[0]:
        raise SnapshotError(f"{where}: the header is not the one that was written (its checksum differs).")
    try:
        entries = _parse_entries(header)
        entries.sort(key=lambda entry: entry.start)
        _check_entries(entries, file, run)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        said = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
        raise SnapshotError(f"{where}: the header does not describe shards of this run ({said}).") from error
    return tuple(entries)


def _parse_entries(header: bytes) -> list[Entry]:
    if struct.unpack_from("<Q", header) != (len(header) - 8,):
        raise ValueError("its length is another one than it says")
    table = parse_json(header[8:])
    offsets = parse_json(table.pop("__metadata__")["DCP_SHARDING_INFO"])
    if table.keys() != offsets.keys():
        raise ValueError("DCP_SHARDING_INFO is of other tensors")
    return [_entry(fqn, facts, offsets[fqn]["saved_offsets"]) for fqn, facts in table.items()]


def _entry(fqn: str, facts: Mapping[str, object], offsets: object) -> Entry:
    if facts.keys() != {"dtype", "shape", "data_offsets"} or facts["dtype"] not in DTYPE_NAMES.values():
        raise ValueError(f"{shown(fqn)} has other facts than a dtype, a shape and data_offsets")
    start, stop = counts(fqn, facts["data_offsets"])
    return Entry(fqn, DTYPES[str(facts["dtype"])], Box(counts(fqn, offsets), counts(fqn, facts["shape"])), start, stop)


def _check_entries(entries: Sequence[Entry], file: ShardFile, run: RunInfo) -> None:
    position = 0
    for entry in entries:
        if entry.fqn not in run.tensors:
            raise ValueError(f"the run has no tensor {shown(entry.fqn)}")
        facts = run.tensors[entry.fqn]
        bounds = whole(facts.shape)
        same_dims = len(entry.box.offsets) == len(entry.box.sizes) == len(bounds.sizes)
        if not same_dims or (entry.box.numel and intersect(entry.box, bounds) != entry.box):
            raise ValueError(f"{entry.fqn} has a box outside of the tensor")
        if not _can_store(facts, entry.dtype):
            raise ValueError(f"{entry.fqn}, a {facts.kind} of {facts.dtype}, is stored as {DTYPE_NAMES[entry.dtype]}")
        size = entry.dtype.itemsize
        if (entry.start, entry.stop - entry.start) != (position, entry.box.numel * size):
            raise ValueError(f"{entry.fqn} has the bytes {entry.start} to {entry.stop}")
        if entry.box.numel and entry.start % size:
            raise ValueError(f"{entry.fqn} begins at byte {entry.start}, which no element of {size} bytes does")
        position = entry.stop
    if position != file.data_bytes:
        raise ValueError(f"{position} bytes of data instead of {file.data_bytes}")


def _can_store(facts: TensorFacts, stored: torch.dtype) -> bool:
    """Whether values of a tensor may be kept as that: averages in any real dtype, what is copied in its own kind."""
    dtype = DTYPES[facts.dtype]
    if facts.kind == PARAMETER and not dtype.is_complex:
        return DTYPE_NAMES[stored] in HALF_ULP
    return stored == dtype or (stored.is_floating_point and dtype.is_floating_point)


def _build_header(entries: Sequence[Entry]) -> bytes:
    table: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "DCP_SHARDING_INFO": json.dumps({e.fqn: {"saved_offsets": list(e.box.offsets)} for e in entries}),
        }
    }
    for e in entries:
        table[e.fqn] = {
            "dtype": DTYPE_NAMES[e.dtype],
            "shape": list(e.box.sizes),
            "data_offsets": [e.start, e.stop],
        }
    return encode_header(table)


def encode_header(table: Mapping[str, object]) -> bytes:
    """The first bytes of a safetensors file: length, JSON, and spaces up to where data of any dtype may begin."""
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
