"""A run as many ranks would leave it, made without training: every file is real, and tiny.

Each rank holds one row of one tensor. Its shards are the same in all snapshots, so that a folder of hundreds of
thousands of files is made in seconds.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from phema_dist.shard import Box
from phema_dist.storage.manifest import (
    BLOCK_BYTES,
    FORMAT,
    INDEX_NAME,
    RUN_KEY,
    Attempt,
    Index,
    Manifest,
    RunInfo,
    ShardFile,
    TensorFacts,
    attempt_key,
    manifest_name,
    shard_name,
    snapshot_folder,
    to_json,
)
from phema_dist.storage.snapshot import Image

SIGMA_RELS = (0.05, 0.28)
SPACING = 1000  # of the snapshots
_COLUMNS = 4
_TOKEN = "0123456789abcdef"  # noqa: S105  of an attempt


def files(num_ranks: int, num_snapshots: int, *, with_index: bool = True) -> Iterator[tuple[str, bytes]]:
    """All keys and what they hold: a run as it is while training goes on, so without an index for the newest."""
    tensors = {"w": TensorFacts((num_ranks, _COLUMNS), "F32", "parameter")}
    yield (
        RUN_KEY,
        to_json(RunInfo(FORMAT, "0.1.0", SIGMA_RELS, "steps", 0, only_save_diff=False, tensors=tensors, aliases={})),
    )
    yield attempt_key(0), to_json(Attempt(0, None, 0, num_ranks, _TOKEN))
    images = [_image(rank) for rank in range(num_ranks)]
    for t in range(SPACING, SPACING * num_snapshots + 1, SPACING):
        folder = snapshot_folder(t, 0)
        manifests = []
        for rank, (header_bytes, data, checksums) in enumerate(images):
            shards = tuple(
                ShardFile(shard_name(sigma_rel, rank), sigma_rel, header_bytes, len(data) - header_bytes, checksums)
                for sigma_rel in SIGMA_RELS
            )
            yield from ((f"{folder}/{shard.name}", data) for shard in shards)
            manifests.append(
                Manifest(
                    FORMAT,
                    t,
                    0,
                    _TOKEN,
                    rank,
                    num_ranks,
                    t,
                    ((t, t // 10),) if rank == 0 else (),
                    "F32",
                    BLOCK_BYTES,
                    shards,
                )
            )
        for manifest in manifests:
            yield f"{folder}/{manifest_name(manifest.rank, num_ranks)}", to_json(manifest)
        if with_index and t < SPACING * num_snapshots:
            yield f"{folder}/{INDEX_NAME}", to_json(Index(FORMAT, tuple(manifests)))


def unsealed(document: bytes) -> bytes:
    """A document as it was before there were checksums in front: for one who changes it."""
    return b"{" + document.partition(b'",')[2]


def write(folder: Path, num_ranks: int, num_snapshots: int, *, with_index: bool = True) -> None:
    """Make it on a local disk."""
    made: set[Path] = set()
    for key, data in files(num_ranks, num_snapshots, with_index=with_index):
        path = folder / key
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_bytes(data)


def _image(rank: int) -> tuple[int, bytes, tuple[str, ...]]:
    image = Image([("w", torch.float32, Box((rank, 0), (1, _COLUMNS)))])
    image.views[0].copy_(torch.arange(_COLUMNS) + rank)
    return image.header_bytes, bytes(image.buffer), image.checksums()
