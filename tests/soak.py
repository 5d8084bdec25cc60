"""Kill a training job at random, and let its storage misbehave at random, for as long as you like: `make soak`.

    python tests/soak.py --loops 200 --minutes 10 --seed 7

First, jobs of two ranks are killed (-9, one rank or all) at random moments and started again, half of them on a local
folder and half in a bucket of a real S3 server. After each kill everything that the run lists is read, with its
checksums, and compared with the averages as the recursion of the paper gives them in float64. Then one job trains
through a proxy that misbehaves, its server is killed now and then, and all that was ever seen complete must be so at
the end. It ends with an error at the first promise that does not hold.

Ranks are forked from a process that has imported everything and has no threads, so that a job starts in 0.2 s.
"""

import argparse
import asyncio
import contextlib
import hashlib
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from chaos_proxy import ChaosProxy
from s3_server import S3Server
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from phema_dist import PostHocEMA, Power, synthesize
from phema_dist.storage import carrier, s3
from phema_dist.storage.run import Run, find_run
from phema_dist.storage.store import Store, open_store
from phema_dist.storage.verify import verify

Options = Mapping[str, Any]
SIGMA_RELS = (0.05, 0.28)
SHAPE = (33, 61)  # what two ranks cannot halve evenly
_COLLECTIVE_SECONDS = 30
_END_SECONDS = 120.0  # after this a job that should end is said to hang


# -- a job whose averages are known


def values(t: int) -> torch.Tensor:
    """The parameters after step t: nothing that two moments have in common."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))


def tracked(sigma_rels: Iterable[float], ts: Iterable[int]) -> dict[tuple[float, int], np.ndarray]:
    """The averages over steps 1, 2, … up to each t, by the recursion of the paper in float64."""
    wanted, sigma_rels = set(ts), tuple(sigma_rels)
    gammas = [max(np.roots([s**2, 7 * s**2, 16 * s**2 - 1, 12 * s**2 - 1]).real) for s in sigma_rels]
    averages, found = [np.zeros(SHAPE) for _ in sigma_rels], {}
    for t in range(1, max(wanted, default=0) + 1):
        now = values(t).double().numpy()
        for i, gamma in enumerate(gammas):
            averages[i] = averages[i] + (1 - (1 - 1 / t) ** (gamma + 1)) * (now - averages[i])
        if t in wanted:
            found.update({(sigma_rel, t): average for sigma_rel, average in zip(sigma_rels, averages, strict=True)})
    return found


class Job(NamedTuple):
    """One start of a training job on a run, as a script does it that may be killed at any moment."""

    url: str
    options: Options
    last: int  # its last step
    checkpoint_every: int = 5
    max_checkpoints: int = 6
    pause: float = 0.0  # between steps; 0: each waits until the one before is stored
    before_step: Callable[[int], bool | None] = lambda _: None  # gets t, 0 before anything; True: no more steps

    def train(self) -> None:
        """On each rank."""
        if self.options.get("client") == "obstore":
            # These ranks are forked, but from a process that has made no request; and their objects are small.
            carrier._HOME, s3._LEAST_CARRIED = os.getpid(), 2**12
        self.before_step(0)
        module = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
        ema = PostHocEMA.from_model(
            DistributedDataParallel(module), self.url, self.max_checkpoints, SIGMA_RELS, 1, self.checkpoint_every,
            storage_options=self.options, resume=True,
        )  # fmt: skip
        for t in range(ema.t + 1, self.last + 1):
            if self.before_step(t):
                break
            with torch.no_grad():
                module.weight.copy_(values(t))
            ema.update_()
            if self.pause:
                time.sleep(self.pause)
            else:
                ema._session.writer.drain()
        ema.close()


# -- processes that may die


def in_new_process(function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
    """What a function returns in a process that has imported everything and has no threads; raises what it raised."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        text, result = ours.recv() if ours.poll(timeout) else (f"no answer in {timeout} s", None)
    except EOFError:
        text, result = "the process died", None
    finally:
        process.kill()
        process.join()
    if text:
        raise AssertionError(text)
    return result


def _answer(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import s3fs  # noqa: F401, PLC0415  what children would otherwise import one by one
    import torch._dynamo  # noqa: PLC0415
    import torch.distributed.fsdp  # noqa: PLC0415

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    logging.getLogger("phema_dist").setLevel(logging.ERROR)
    try:
        pipe.send(("", function(*args)))
    except BaseException:  # noqa: BLE001  raised again, in words, where it was asked for
        pipe.send((traceback.format_exc(), None))


def fork(function: Callable[[], object]) -> int:
    """Call a function in a child; its exit status is 0 if that returned."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:  # noqa: BLE001  a child must not go on with its parent's stack
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def forked(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a child, which may start threads."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    pid = fork(lambda: writer.send(function(*args)))
    writer.close()
    try:
        return reader.recv()
    except EOFError:
        raise AssertionError(f"{function.__name__} raised, see above") from None
    finally:
        os.waitpid(pid, 0)


@contextlib.contextmanager
def ranks(world_size: int, step: Callable[[int], object]) -> Iterator[list[int]]:
    """Children that call `step(rank)` as ranks of a gloo group; what is left of them at the end is killed.

    What they say is shown only if the block raises: in most of them somebody dies, and others tell of it.
    """
    with tempfile.TemporaryDirectory(prefix="phema-ranks-") as folder:
        said = Path(folder, "said")

        def as_rank(rank: int) -> None:
            with said.open("ab") as file:
                os.dup2(file.fileno(), 2)
            store = dist.FileStore(f"{folder}/store", world_size)
            wait = timedelta(seconds=_COLLECTIVE_SECONDS)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=wait)
            step(rank)

        pids = [fork(partial(as_rank, rank)) for rank in range(world_size)]
        try:
            yield pids
        except BaseException:
            sys.stderr.write(said.read_text(errors="replace") if said.exists() else "")
            raise
        finally:
            for pid in pids:
                kill(pid)


def kill(pid: int) -> None:
    """Kill -9 and wait; one that has ended is fine."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def statuses(pids: Iterable[int], seconds: float = _END_SECONDS) -> list[int]:
    """How each child ended: its exit status, or minus the signal that ended it. Raises if one does not end."""
    end, found = time.monotonic() + seconds, []
    for pid in pids:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                raise AssertionError(f"a rank hangs: it has not ended in {seconds} s")
            time.sleep(0.005)
        found.append(os.waitstatus_to_exitcode(ended[1]))
    return found


# -- what a run must be, whatever happened


def look(url: str, options: Options) -> tuple[Store, Run | None]:
    """The run as any stranger finds it."""
    store = open_store(url, options)
    return store, find_run(store)


def complete(url: str, options: Options) -> list[int]:
    """The t of its complete snapshots."""
    _, run = look(url, options)
    return [s.t for s in run.complete] if run else []


def verified(url: str, options: Options, before: Mapping[str, str] | None = None) -> dict[str, str]:
    """Read all that a run lists, and compare it with what was trained; a digest of each snapshot, by its folder.

    Args:
        url: where the run lives.
        options: for the store.
        before: what this returned earlier: what is still there must not have changed, and the newest must be there.
    """
    store, run = look(url, options)
    listed = run.complete if run else ()
    ts = [s.t for s in listed]
    if ts:
        pairs = [(sigma_rel, t) for t in ts for sigma_rel in run.info.sigma_rels]
        wanted = tracked(run.info.sigma_rels, ts)
        targets = [Power(sigma_rel, t=t) for sigma_rel, t in pairs]
        for pair, average in zip(pairs, synthesize(url, targets, storage_options=options), strict=True):
            found = average.state_dict["weight"].double().numpy()
            assert np.abs(found - wanted[pair]).max() < 1e-5, f"{url}: snapshot {pair} is not what was trained"
    if run:
        problems = verify(store).problems
        assert not problems, f"{url}: {problems}"
    digests = {}
    for snapshot in listed:
        sizes = store.list(snapshot.folder)
        names = sorted(key for key in sizes if not key.endswith("/index.json"))  # which comes later
        digest = hashlib.sha256()
        for text in store.get_many(names).values():
            digest.update(text)
        digests[snapshot.folder] = digest.hexdigest()
    for folder in digests.keys() & (before or {}).keys():
        assert digests[folder] == (before or {})[folder], f"{url}/{folder} has changed"
    if before:
        assert ts, f"{url}: all snapshots are lost"
        assert ts[-1] >= max(map(_t_of, before)), f"{url}: the newest snapshot is lost"
    return digests


def _t_of(folder: str) -> int:
    return int(folder.removeprefix("snapshots/").partition("-")[0])


# -- random kills


class Kills(NamedTuple):
    """What came of killing."""

    loops: int
    snapshots_verified: int
    before_the_first: int  # loops after which the run had no snapshot yet


def kill_loops(url: str, options: Options, loops: int, seed: int, loops_per_run: int = 20) -> Kills:
    """Start, kill and look, again and again; without threads in this process."""
    chance = random.Random(seed)  # noqa: S311  no secret
    num_verified = num_empty = 0
    for first in range(0, loops, loops_per_run):
        place, before = f"{url}-{first}", {}
        begun = multiprocessing.RawValue("i", 0)
        job = Job(place, options, last=9_000, pause=0.02 if "://" in url else 0.006, before_step=partial(_note, begun))
        for _ in range(min(loops_per_run, loops - first)):
            begun.value = 0
            with ranks(2, lambda _: job.train()) as pids:  # noqa: B023  forked at once
                end = time.monotonic() + _END_SECONDS
                while chance.random() < 0.999 and not begun.value and time.monotonic() < end:
                    time.sleep(0.001)  # now and then, die before it has begun
                time.sleep(chance.uniform(0.0, 2.5 if "://" in url else 0.8))
                ended = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]]
                assert not ended, f"{place}: a rank ended by itself"
                if chance.random() < 0.5:
                    kill(chance.choice(pids))
                    time.sleep(chance.uniform(0.0, 0.3))
            before = forked(verified, place, options, before)
            num_verified += len(before)
            num_empty += not before
        last = max(map(_t_of, before), default=0) + 12
        with ranks(2, lambda _: Job(place, options, last=last).train()) as pids:  # noqa: B023
            assert statuses(pids) == [0, 0], f"{place}: a job that nobody kills does not end well"
        before = forked(verified, place, options, before)
        assert max(map(_t_of, before)) == last
        num_verified += len(before)
    return Kills(loops, num_verified, num_empty)


def _note(begun: Any, t: int) -> None:
    begun.value = t


# -- random faults


class AnsweringProxy(ChaosProxy):
    """A proxy that also answers requests itself: `answer(head of the request)` is bytes to send, or None to forward.

    What it answers never reaches the server. `HANG` takes the request and answers nothing, ever.
    """

    HANG = b"hang"

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(upstream)
        self.answer: Callable[[bytes], bytes | None] | None = None
        self.num_answers = 0

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super()._connected(reader, writer)
        except ConnectionError:  # the server is down
            writer.transport.abort()

    async def _pump(self, reader: Any, writer: Any, both: Any, *, upward: bool) -> None:
        await super()._pump(_Requests(self, reader, both[0]) if upward else reader, writer, both, upward=upward)


class _Requests:
    """What a client sends, less the requests that are answered here."""

    def __init__(self, proxy: AnsweringProxy, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._proxy, self._reader, self._client = proxy, reader, client

    async def read(self, num_bytes: int) -> bytes:
        while block := await self._reader.read(num_bytes):
            head, end, rest = block.partition(b"\r\n\r\n")
            is_request = end and self._proxy.answer and re.match(rb"[A-Z]{3,6} \S+ HTTP/1", head)
            answer = self._proxy.answer(head) if is_request else None  # type: ignore[misc]
            if answer is None:
                return block
            self._proxy.num_answers += 1
            if answer == AnsweringProxy.HANG:
                await self._reader.read()  # until the client gives up
                return b""
            waits = re.search(rb"(?i)\r\nexpect: *100-continue", head) is not None
            left = 0 if waits else _body_bytes(head) - len(rest)
            while left > 0 and (more := await self._reader.read(min(left, num_bytes))):
                left -= len(more)
            if head.startswith(b"HEAD"):
                answer = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            self._client.write(answer)
            await self._client.drain()
            if b"Connection: close" in answer:
                self._client.write_eof()
                return b""
        return b""


def _body_bytes(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else 0


def s3_error(status: int, code: str) -> bytes:
    """A reply as S3 gives it when it does not do what was asked."""
    body = (
        f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}, injected</Message></Error>"
    )
    lines = [f"HTTP/1.1 {status} {code}", "Content-Type: application/xml", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Connection: close", "", body]).encode()


class Chaos(NamedTuple):
    """What came of an hour of trouble."""

    seconds: float
    faults: dict[str, int]
    complete: int
    profile_error: float
    error: float


def chaos(server: S3Server, bucket: str, seconds: float, seed: int, client: str) -> Chaos:
    """Train through a proxy that misbehaves; the server dies too. Raises if a promise does not hold."""
    chance = random.Random(seed)  # noqa: S311  no secret
    url, direct = f"s3://{bucket}/chaos-{seed}-{client}", server.options() | {"client": client}
    with ChaosOf(server) as proxy:
        options = server.options(endpoint=proxy.endpoint) | {"client": client}
        pipes = multiprocessing.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            stop = Path(folder, "stop")
            trainer = threading.Thread(
                # Beyond t = 10 000 an update waits until dt/t is 1e-4, and the recursion here makes all of them.
                target=_report,
                args=(pipes[1], in_new_process, _train_until, url, options, stop, max(0.05, seconds / 8000)),
            )
            trainer.start()
            faults: dict[str, int] = {}
            seen: set[int] = set()
            end = time.monotonic() + seconds
            while time.monotonic() < end and trainer.is_alive():
                name = chance.choice(sorted(proxy.faults))
                with proxy.faults[name](chance):
                    time.sleep(min(chance.uniform(0.2, 3.0), max(0.0, end - time.monotonic())))
                faults[name] = faults.get(name, 0) + 1
                time.sleep(min(chance.uniform(0.0, 2.0), max(0.0, end - time.monotonic())))
                now = set(complete(url, direct))
                assert seen <= now, f"complete snapshots are lost: {seen - now}"
                seen = now
            stop.touch()
            trainer.join(2 * _END_SECONDS)
            text, last = pipes[0].recv()
            assert not text, text
    lost = seen - set(complete(url, direct))
    assert not lost, f"complete snapshots are lost: {lost}"
    verified(url, direct)
    (average,) = synthesize(url, [0.12], storage_options=direct)
    assert average.t == last, f"close has stored t={last}, and the newest is {average.t}"
    wanted = tracked([0.12], [last])[0.12, last]
    error = np.linalg.norm(average.state_dict["weight"].double().numpy() - wanted) / np.linalg.norm(wanted)
    # Values of different steps have nothing in common, so the parameters are as far off as the profile is.
    certified = average.certificate.profile_error
    assert error < 1.25 * certified + 1e-4, f"{error} off, certified {certified}"
    return Chaos(seconds, faults, len(complete(url, direct)), certified, float(error))


class ChaosOf(AnsweringProxy):
    """A proxy before a server, and what may go wrong with both, by name."""

    def __init__(self, server: S3Server) -> None:
        super().__init__(server.address)
        self._s3 = server
        self.faults: dict[str, Callable[[random.Random], contextlib.AbstractContextManager[None]]] = {
            "slow down": lambda chance: self._set(answer=_some(chance, 0.3, s3_error(503, "SlowDown"))),
            "internal error": lambda chance: self._set(answer=_some(chance, 0.5, s3_error(500, "InternalError"))),
            "silence": lambda chance: self._set(answer=_some(chance, 0.3, self.HANG)),
            "black hole": lambda _: self._set(black_hole=True),
            "no connection": lambda _: self._set(refuse=True),
            "cut": lambda chance: self._set(cut_after_bytes=chance.randrange(20_000), cuts_left=chance.randrange(9)),
            "lost reply": lambda _: self._set(lose_reply_to=re.compile(rb"(PUT|POST) ")),
            "slow line": lambda chance: self._set(latency_seconds=chance.uniform(0.01, 0.1)),
            "server killed": lambda _: self._without_server(),
        }

    @contextlib.contextmanager
    def _set(self, **fault: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in fault}
        self.__dict__.update(fault)
        try:
            yield
        finally:
            self.__dict__.update(before)

    @contextlib.contextmanager
    def _without_server(self) -> Iterator[None]:
        self._s3.kill()
        try:
            yield
        finally:
            self._s3.start()


def _some(chance: random.Random, share: float, answer: bytes) -> Callable[[bytes], bytes | None]:
    return lambda _: answer if chance.random() < share else None


def _report(pipe: Connection, function: Callable[..., Any], *args: Any) -> None:
    try:
        pipe.send(("", function(*args)))
    except BaseException as error:  # noqa: BLE001  for the thread that waits
        pipe.send((str(error), None))


def _train_until(url: str, options: Options, stop: Path, pause: float) -> int:
    """Train on two ranks, a snapshot every 20 steps, until a file is there; returns the last t."""
    fork_context = multiprocessing.get_context("fork")
    ended, reached = fork_context.Value("i", 0), fork_context.Array("i", 2)

    def before_step(t: int) -> bool:
        reached[dist.get_rank()] = t  # nothing else keeps the ranks together
        if t and dist.get_rank() == 0 and stop.exists() and not ended.value:
            ended.value = max(reached) + 20  # far enough ahead for the other rank
        return 0 < ended.value < t

    job = Job(url, options, 100_000, checkpoint_every=20, max_checkpoints=100_000, pause=pause, before_step=before_step)
    with ranks(2, lambda _: job.train()) as pids:
        assert statuses(pids, 10**9) == [0, 0], "a rank ended with an error, see above"
    return int(ended.value)


# -- the long version


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill jobs and break their storage at random, and look.")
    parser.add_argument("--loops", type=int, default=200, help="random kills, half of them on S3")
    parser.add_argument("--minutes", type=float, default=10.0, help="of random faults")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311
    parser.add_argument("--client", choices=["s3fs", "obstore"], default="obstore", help="for S3")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    print(f"seed {arguments.seed}", flush=True)  # noqa: T201  a script speaks so
    folder = Path(tempfile.mkdtemp(prefix="phema-soak-"))
    with S3Server(folder / "s3") as server:
        server.filesystem().mkdir("soak")
        options = server.options() | {"client": arguments.client}
        places = {str(folder / "run"): {}, "s3://soak/run": options} if arguments.loops else {}
        for url, each in places.items():
            begin = time.monotonic()
            kills = in_new_process(kill_loops, url, each, arguments.loops // 2, arguments.seed)
            print(f"{url}: {kills}, {time.monotonic() - begin:.0f} s", flush=True)  # noqa: T201
        if arguments.minutes:
            print(chaos(server, "soak", 60 * arguments.minutes, arguments.seed, arguments.client), flush=True)  # noqa: T201
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
