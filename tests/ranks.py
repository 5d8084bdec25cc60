"""Run a function on several real processes at once, as torchrun would, without paying for its start every time.

The processes are forked from one that has imported torch, and stay for the whole session; each call gives them a fresh
gloo group on the loopback interface. The function must stand in a module (it is found by name), takes its arguments
pickled, and asks torch.distributed who it is. Processes that raise or hang are replaced before the next call.
"""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

_COLLECTIVE_SECONDS = 30  # how long a rank waits for the others: shorter than a call, so that a hang shows its place
_SECONDS_AFTER_AN_ERROR = 3.0  # for the other ranks, once one has raised


class RanksFailedError(AssertionError):
    """Some ranks raised, or did not come back."""


class _Pool:
    """Processes that act as ranks; more are made as they are needed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel"])
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, world_size: int, step: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(workers):
                pipe.send((rank, world_size, f"{folder}/store", step, args))
            answers = _collect([pipe for _, pipe in workers], timeout)
        raised = [f"rank {rank} raised\n{text}" for rank, (text, _) in sorted(answers.items()) if text]
        missing = [rank for rank in range(world_size) if rank not in answers]
        if missing or raised:
            self._replace(workers, missing)
            raise RanksFailedError("\n".join([f"no answer from ranks {missing}" if missing else "", *raised]))
        return [answers[rank][1] for rank in range(world_size)]

    def _replace(self, workers: list[tuple[BaseProcess, Connection]], missing: list[int]) -> None:
        for rank in missing:
            process, _ = workers[rank]
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)  # it prints where it hangs
        time.sleep(0.2 if missing else 0)
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()


_pool = cache(_Pool)


def run(world_size: int, step: Callable[..., Any], *args: Any, timeout: float = 80) -> list[Any]:
    """Call `step(*args)` on each of `world_size` ranks; what they return, by rank.

    Raises:
        RanksFailedError: with the traceback of every rank that raised, and the numbers of those that hang (their stacks
            go to stderr).
    """
    return _pool().run(world_size, step, args, timeout)


def _collect(pipes: list[Connection], timeout: float) -> dict[int, tuple[str, Any]]:
    answers: dict[int, tuple[str, Any]] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            try:
                answers[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                answers[rank] = ("the process died", None)
            if answers[rank][0]:
                deadline = min(deadline, time.monotonic() + _SECONDS_AFTER_AN_ERROR)
    return answers


def _serve(pipe: Connection) -> None:
    import torch  # noqa: PLC0415  here already, in the process that this one was forked from
    import torch.distributed as dist  # noqa: PLC0415

    faulthandler.register(signal.SIGUSR1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, path, step, args = pipe.recv()
        except EOFError:
            return
        text, result = "", None
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(path, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=_COLLECTIVE_SECONDS),
            )
            _forget_groups()
            result = step(*args)
            dist.barrier()  # the others may still need our sockets
            dist.destroy_process_group()
        except BaseException:  # noqa: BLE001  raised again, in words, where the test is
            text = traceback.format_exc()
        pipe.send((text, result))


def _forget_groups() -> None:
    """DTensor remembers how to shard by groups that are gone: what a process that lives on would find."""
    from torch.distributed.tensor import debug  # noqa: PLC0415  the preloaded modules have it, or nobody needs it

    debug._clear_sharding_prop_cache()


def outcome(step: Callable[[], object]) -> str:
    """What became of a call, as text that can travel: "" if it returned, else its error."""
    try:
        step()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""
