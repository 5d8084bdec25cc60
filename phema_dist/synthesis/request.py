"""From what is asked for to the bytes that make it, on one process or on many, around snapshots that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from phema_dist.errors import DamagedError, KeyMissingError
from phema_dist.storage.run import open_run
from phema_dist.synthesis.recipe import Recipe, announce, plan
from phema_dist.synthesis.stream import MEMORY_BYTES, stream

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.shard import Box
    from phema_dist.storage.manifest import RunInfo
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.reading import Progress
    from phema_dist.synthesis.stream import Sink
    from phema_dist.target import Target


_MOST_GONE = 4  # times that a file may have gone before this is given up


@dataclass(frozen=True)
class Request:
    """Averages to make in one pass. `t` is the end of those that do not say theirs; None: the newest snapshot's.

    `memory_bytes` bounds what a process holds beside the results; `strict` refuses a run with snapshots, up to the
    wanted t, that cannot be used, instead of leaving them out.
    """

    targets: tuple[Target, ...]
    t: int | None = None
    calculation_dtype: torch.dtype = torch.float32
    memory_bytes: int = MEMORY_BYTES
    strict: bool = False

    def stream(
        self,
        store: Store,
        info: RunInfo,
        recipes: Sequence[Recipe],
        sink: Sink,
        wanted: Mapping[str, Sequence[Box]] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Make averages as this asks for: `stream`."""
        dtype, memory_bytes = self.calculation_dtype, self.memory_bytes
        stream(
            store, info, recipes, sink,
            wanted=wanted, calculation_dtype=dtype, memory_bytes=memory_bytes, progress=progress,
        )  # fmt: skip


class _Failure(NamedTuple):
    folder: str | None  # of the snapshot at fault, if it is known
    text: str


def fulfil(
    store: Store, ranks: Ranks, request: Request, make: Callable[[RunInfo, Sequence[Recipe]], object]
) -> list[Recipe]:
    """Collective: plan on rank 0, then call `make` with the recipes on every rank, until it meets nothing unusable.

    A snapshot that turns out to be damaged is left out, as one that is incomplete, and `make` is called again. So is
    it, a few times, when a file has gone: while a job writes, its retention may delete a snapshot that is being read.

    Raises:
        DamagedError: a stored file is not what was written, and the request is strict or there is no way around it.
        ProfileError, RunError, StorageError: as `plan` and `stream`.
    """
    unusable: dict[str, str] = {}
    num_gone = 0
    while True:
        info, recipes = ranks.on_first(partial(_plan, store, request, unusable))
        failures = [failure for failure in ranks.together(partial(_try, make, info, recipes)) if failure]
        if not failures:
            return recipes
        damaged = {folder: text for folder, text in failures if folder is not None and folder not in unusable}
        if damaged and not request.strict:
            unusable.update(damaged)
        elif any(failure.folder for failure in failures):
            raise DamagedError(next(failure.text for failure in failures if failure.folder))
        elif (num_gone := num_gone + 1) > _MOST_GONE:
            raise KeyMissingError(
                f"{failures[0].text} If a job still writes this run, it deletes snapshots faster than they are read: "
                "wait for its end, give it more max_checkpoints, or read a copy."
            )


def _plan(store: Store, request: Request, unusable: dict[str, str]) -> tuple[RunInfo, list[Recipe]]:
    run = open_run(store)
    recipes = plan(run, request.targets, request.t, unusable=unusable, strict=request.strict)
    announce(recipes)
    return run.info, recipes


def _try(
    make: Callable[[RunInfo, Sequence[Recipe]], object], info: RunInfo, recipes: Sequence[Recipe]
) -> _Failure | None:
    try:
        make(info, recipes)
    except DamagedError as error:
        return _Failure(error.folder, str(error))
    except KeyMissingError as error:
        return _Failure(None, str(error))
    return None
