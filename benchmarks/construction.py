"""What it costs to agree on who owns what, for worlds larger than one has at hand.

    python benchmarks/construction.py                             1 024 ranks that hold 5 000 tensors, in four ways
    python benchmarks/construction.py --shards 128 --replicas 8   one of these, as JSON

One process plays one of the ranks, and makes, packed, what all the others would send. It checks what comes out against
the ownership that is known for such worlds. Memory is what the process held at most, less what it held before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, cast

import numpy as np
import timing
import torch
import xxhash

from phema_dist.ranks import Ranks
from phema_dist.shard import Box, Int64s, boxes_of
from phema_dist.storage.manifest import BUFFER, PARAMETER
from phema_dist.training import holders, ownership
from phema_dist.training.layout import Layout, LocalTensor, TensorInfo

WORLDS = [(1024, 1), (128, 8), (512, 2), (1, 1024)]  # shards and replicas: FSDP2, HSDP twice, DDP
SHAPES = [(16384, 16384), (1024, 16384), (16384, 53248), (53248, 16384), (16384,), (12, 3, 3, 7)]
NUM_BUFFERS = 10


@dataclass(frozen=True)
class World:
    """A model sharded along dim 0 over `num_shards` ranks, as FSDP2 does it, and this `num_replicas` times."""

    num_shards: int
    num_replicas: int
    num_tensors: int

    @property
    def size(self) -> int:
        """The number of ranks; the replicas of shard s are s, s + num_shards, ..."""
        return self.num_shards * self.num_replicas

    def infos(self) -> list[TensorInfo]:
        """Layers of parameters, and a few buffers at the end that all ranks hold."""
        names = (f"model.layers.{i // len(SHAPES)}.part{i % len(SHAPES)}.weight" for i in range(self.num_tensors))
        parameters = [
            TensorInfo(fqn, SHAPES[i % len(SHAPES)], torch.bfloat16, PARAMETER) for i, fqn in enumerate(names)
        ]
        return parameters + [TensorInfo(f"buffer{i}", (64,), torch.float32, BUFFER) for i in range(NUM_BUFFERS)]

    def tables(self) -> Iterator[Int64s]:
        """What each rank holds."""
        shapes = np.array([info.shape + (1,) * (4 - len(info.shape)) for info in self.infos()]).T
        index = np.arange(len(shapes.T))
        num_shards = np.where(index < self.num_tensors, self.num_shards, 1)
        rows = -(-shapes[0] // num_shards)
        for rank in range(self.size):
            start = np.minimum(rows * (rank % num_shards), shapes[0])
            sizes = np.minimum(rows, shapes[0] - start)
            table = np.stack([index, start, *np.zeros_like(shapes[1:]), sizes, *shapes[1:]])
            yield table[:, sizes > 0]


@dataclass(frozen=True, eq=False)
class Held:
    """Stands for a LocalTensor, with no content worth comparing."""

    info: TensorInfo
    box: Box
    replicated: bool = True

    def local(self) -> torch.Tensor:
        """One element instead of gigabytes."""
        return torch.zeros(1)


@dataclass(frozen=True, eq=False)
class PlayedRanks(Ranks):
    """A rank to which a script plays all the others."""

    script: Iterator[Callable[[Any], list[Any]]]

    def local(self, global_rank: int) -> int:
        """All processes are in the group."""
        return global_rank

    def gather(self, value: Any) -> list[Any]:
        """What the script says that all ranks sent."""
        return next(self.script)(value)


def script(world: World, layout: Layout, packing_seconds: list[float]) -> Iterator[Callable[[Any], list[Any]]]:
    """For each exchange of `agree`: what all ranks send, given what this one sends."""
    yield lambda mine: [mine] * world.size  # a digest of the names
    yield lambda _: [[ownership.pack_tensors(layout)], *[[]] * (world.size - 1)]

    begin = time.perf_counter()
    packed = [holders.pack(table, len(layout.infos), world.size) for table in world.tables()]
    packing_seconds.append(time.perf_counter() - begin)
    digests = [xxhash.xxh3_128_digest(b"".join(chunks)) for chunks in packed]
    yield lambda mine: [(digest, None) for digest in digests[: world.size if mine[0] in digests else 0]]
    first = [digests.index(digest) == rank for rank, digest in enumerate(digests)]
    yield lambda _: [chunks if speaks else [] for chunks, speaks in zip(packed, first, strict=True)]
    yield lambda mine: [mine] * world.size  # a digest of the ranks that wrappers name
    yield lambda _: [[json.dumps(sorted(layout.kin)).encode()], *[[]] * (world.size - 1)]
    yield lambda mine: [(defaultdict(bytes, mine[0]), None)] * world.size  # digests of replicas


def known_ownership(world: World, rank: int, held: list[tuple[int, Box]]) -> list[tuple[int, Box]]:
    """What a rank must own, by plain arithmetic: its part of its shard, and on rank 0 the buffers."""
    owned = [(i, box) for i, box in held if i >= world.num_tensors and rank == 0]
    shared = [(i, box) for i, box in held if i < world.num_tensors]
    buffer_bytes = sum(4 * box.numel for i, box in held if i >= world.num_tensors)
    on_rank_0 = buffer_bytes if rank % world.num_shards == 0 else 0
    level = Fraction(sum(4 * box.numel for _, box in shared) + on_rank_0, world.num_replicas)
    replica = rank // world.num_shards
    ends = [int(level * k - on_rank_0) if k else 0 for k in (replica, replica + 1)]
    position = 0
    for i, box in shared:
        row_bytes = 4 * box.numel // box.num_rows
        a, b = (min(max(round((end - position) / row_bytes), 0), box.num_rows) for end in ends)
        owned += [(i, box.rows(a, b))] if a < b else []
        position += 4 * box.numel
    return sorted(owned)


def measure(world: World, rank: int) -> dict[str, float]:
    """Seconds and megabytes of `agree` on one rank of a world."""
    infos = world.infos()
    held = boxes_of(next(islice(world.tables(), rank, None)), [info.shape for info in infos])
    tensors = tuple(cast("LocalTensor", Held(infos[i], box)) for i, box in held)
    layout = Layout({info.fqn: info for info in infos}, tensors, {}, frozenset(range(world.size)))
    packing_seconds: list[float] = []
    ranks = PlayedRanks(rank, world.size, None, script(world, layout, packing_seconds))
    before, begin = timing.resident_bytes(), time.perf_counter()
    found = ownership.agree(layout, ranks)
    seconds, peak = time.perf_counter() - begin, timing.resident_bytes(peak=True)
    index = {info.fqn: i for i, info in enumerate(found.tensors)}
    pieces = [(index[piece.info.fqn], piece.box) for piece in found.pieces]
    assert pieces == known_ownership(world, rank, held)
    return {"seconds": seconds, "packing": packing_seconds[0], "megabytes": (peak - before) / 1e6}


def main() -> None:
    """Measure the worlds of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, help="ranks that hold different rows")
    parser.add_argument("--replicas", type=int, default=1, help="ranks that hold the same rows")
    parser.add_argument("--rank", type=int, default=0, help="the one to play")
    parser.add_argument("--tensors", type=int, default=5000)
    arguments = parser.parse_args()
    if arguments.shards:
        world = World(arguments.shards, arguments.replicas, arguments.tensors)
        print(json.dumps(measure(world, arguments.rank)))
        return
    print(f"{timing.machine()}; {arguments.tensors} tensors\n")
    rows = []
    for num_shards, num_replicas in WORLDS:
        options = {"shards": num_shards, "replicas": num_replicas, "tensors": arguments.tensors, "rank": 0}
        found = timing.in_child(__file__, *(word for name, n in options.items() for word in (f"--{name}", str(n))))
        seconds = [f"{found['seconds']:.1f} s", f"{found['packing']:.1f} s"]
        rows.append([f"{num_shards} shards, {num_replicas} replicas", *seconds, f"{found['megabytes']:.0f} MB"])
    timing.print_rows(["", "agree", "of this, packing for all", "memory"], rows)


if __name__ == "__main__":
    main()
