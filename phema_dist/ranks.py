"""Every collective of the library: this rank's place in its group, and what ranks tell each other.

Collectives happen on the main thread and only in calls whose docstring says so; no thread of ours ever enters one.
All of them carry small Python objects, or host memory, over gloo, so no accelerator is touched.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from phema_dist.errors import PhemaError, SettingsError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_log = logging.getLogger("phema_dist")
_SECONDS_TO_MEET, _POLL_SECONDS = 30.0, 0.0005
_twins: WeakKeyDictionary[Any, dist.ProcessGroup] = WeakKeyDictionary()  # over gloo, of the same ranks


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process's rank in the group that averages one model together; a lone process is a group of one."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    def local(self, global_rank: int) -> int | None:
        """The number of a process in this group, or None outside of it."""
        if self.group is None:
            return 0
        members = dist.get_process_group_ranks(self.group)
        return members.index(global_rank) if global_rank in members else None

    def gather(self, value: T) -> list[T]:
        """Collective: the `value` of every rank, by rank, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, step: Callable[[], T]) -> list[T]:
        """Collective: run `step` on every rank and gather what it returns; if it fails on any rank, raise on all.

        Without this, a rank that fails alone leaves the others waiting in the next collective until it times out.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = step()
        except Exception as caught:
            if self.group is None:
                raise
            error = caught
        gathered = self.gather((result, None if error is None else _portable(error)))
        for rank, (_, other) in enumerate(gathered):
            if other is not None:
                if rank == self.rank and error is not None:
                    raise error
                kind, text = other  # the same class on all ranks, so that all of them take the same way out
                raise kind(f"rank {rank}: {text}") from error
        return [value for value, _ in gathered]  # type: ignore[misc]

    def each(self, step: Callable[[], T]) -> T:
        """Collective: run `step` on every rank for its own result; if it fails on any rank, raise on all."""
        results: list[T] = []
        self.together(lambda: results.append(step()))
        return results[0]

    def on_first(self, step: Callable[[], T]) -> T:
        """Collective: run `step` on rank 0 alone; its result on every rank, or its error on every rank."""
        if self.group is None:
            return step()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                answer[0] = step()
            except Exception as caught:  # noqa: BLE001  whatever it was, the other ranks must learn of it
                error, answer[1] = caught, _portable(caught)
        dist.broadcast_object_list(answer, group=self.group, group_src=0)
        if error is not None:
            raise error
        if answer[1] is not None:
            kind, text = answer[1]
            raise kind(f"rank 0: {text}")
        return answer[0]  # type: ignore[no-any-return]

    def meet(self, where: str) -> None:
        """Collective: wait for all ranks, and say `where` if it takes long: perhaps some never come."""
        if self.group is None:
            return
        work = dist.barrier(group=self.group, async_op=True)
        begin, told = time.monotonic(), False
        while work is not None and not work.is_completed():
            time.sleep(_POLL_SECONDS)
            if not told and time.monotonic() - begin > _SECONDS_TO_MEET:
                _log.warning("rank %d waits for the other ranks in %s", self.rank, where)
                told = True
        if work is not None:
            work.wait()

    def swap(self, to: int, sent: torch.Tensor | None, source: int, received: torch.Tensor | None) -> None:
        """Collective of pairs: send flat host memory to one rank while filling some with what another one sends."""
        works = []
        if sent is not None:
            works.append(dist.isend(sent, group=self.group, group_dst=to))
        if received is not None:
            works.append(dist.irecv(received, group=self.group, group_src=source))
        for work in works:
            if work is not None:
                work.wait()


def _portable(error: Exception) -> tuple[type[PhemaError], str]:
    # Foreign exceptions may not survive the journey between processes; ours are made of one text.
    if isinstance(error, PhemaError):
        return type(error), str(error)
    return PhemaError, f"{type(error).__name__}: {error}"


ALONE = Ranks(0, 1, None)


def join(process_group: dist.ProcessGroup | None = None) -> Ranks:
    """Collective: this rank's place in `process_group` (None: the default group, or alone where there is none).

    A group that cannot carry CPU objects (NCCL) gets a gloo twin of the same ranks, once: it lives as long as the job.

    Raises:
        SettingsError: this rank is not in `process_group`.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    group = process_group or dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise SettingsError("process_group must contain this rank; call from_model only on the ranks of the group.")
    size = dist.get_world_size(group)
    if size == 1:
        return ALONE
    if "gloo" not in dist.get_backend_config(group):
        if group not in _twins:
            _twins[group] = dist.new_group(
                dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=process_group is not None
            )
        group = _twins[group]
    return Ranks(dist.get_rank(group), size, group)


@contextmanager
def launched() -> Iterator[Ranks]:
    """Collective: the ranks that torchrun started together with this process; alone if it was not started by that.

    A group that is there already is used as it is.
    """
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Ranks may wait long for the slowest one; torchrun ends all of them if one dies.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        try:
            yield join()
        finally:
            dist.destroy_process_group()
    else:
        yield join()
