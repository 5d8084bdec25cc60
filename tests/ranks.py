"""Run a function, or a script, on several real processes at once, as torchrun would, without paying for their start.

The processes are forked from one that has imported torch, and stay for the whole session; each call gives them a fresh
gloo group on the loopback interface. The function must stand in a module (it is found by name), takes its arguments
pickled, and asks torch.distributed who it is. Processes that raise or hang are replaced before the next call. A script
has processes of its own, forked from the same one, with the environment that torchrun gives.
"""

import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_COLLECTIVE_SECONDS = 30  # how long a rank waits for the others: shorter than a call, so that a hang shows its place
_SECONDS_AFTER_AN_ERROR = 3.0  # for the other ranks, once one has raised
_STREAMS = ("out", "err")
# What forked processes would otherwise import one by one. There is one such server, also of those who take no ranks
# from here: its list counts only before it begins, so it stands where this is imported.
multiprocessing.set_forkserver_preload(
    [
        "torch._dynamo",  # by the first wrapper, or the first step of an optimizer
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.checkpoint.hf_storage",
        "phema_dist.synthesis.consolidate",
        "phema_dist.synthesis.join",
        "phema_dist.synthesis.reader",
        "phema_dist.cli",
        "phema_dist.ema",
        "hypothesis.strategies",
        "pytest",
        "s3fs",
    ]
)


class RanksFailedError(AssertionError):
    """Some ranks raised, or did not come back."""


class _Pool:
    """Processes that act as ranks; more are made as they are needed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def process(self, step: Callable[..., Any], *args: Any) -> BaseProcess:
        """Start one that calls `step(*args)`."""
        process = self._context.Process(target=step, args=args, daemon=True)
        process.start()
        return process

    def run(self, world_size: int, step: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self.process(_serve, theirs)
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


def launch(
    world_size: int, script: str, *arguments: str, folder: Path, timeout: float = 150, **environment: str
) -> str:
    """Run a script, or a module if it has no suffix, on as many ranks in a folder; what all of them print.

    Raises:
        RanksFailedError: some rank did not return, or not with 0; with all that was said.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as logs:
        free.bind(("127.0.0.1", 0))
        shared = {
            "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo", **environment,
        }  # fmt: skip
        free.close()
        processes = [
            _pool().process(_program, script, arguments, folder, f"{logs}/{rank}", shared | ranked)
            for rank, ranked in enumerate({"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world_size))
        ]
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        said = ["".join(Path(f"{logs}/{rank}.{name}").read_text() for rank in range(world_size)) for name in _STREAMS]
    if any(process.exitcode for process in processes):
        raise RanksFailedError("\n".join([f"exit codes {[process.exitcode for process in processes]}", *said]))
    return said[0]


def without_waiting(fd: int) -> None:
    """Stands for os.fsync: no test cuts the power, and to sync each small file takes longer than all else with it."""


def _program(script: str, arguments: tuple[str, ...], folder: Path, log: str, environment: dict[str, str]) -> None:
    gc.freeze()  # or it takes a second to collect all of torch
    for number, name in enumerate(_STREAMS, 1):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


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
    os.fsync = without_waiting
    gc.freeze()
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
