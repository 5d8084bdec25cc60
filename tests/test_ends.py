"""How processes end: real ones, by every way out, and what they leave in storage.

This file is also the program that they run. `python tests/test_ends.py` serves the tests: it forks a process for each
job, which then ends as any interpreter does, without paying for torch each time. With arguments it is one job, for
torchrun.
"""

import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chaos_proxy import ChaosProxy
from conftest import Target
from s3_server import S3Server
from torch import nn
from torch.utils.data import DataLoader, Dataset

import phema_dist.ema
from phema_dist import BackgroundError, PostHocEMA, SettingsError
from phema_dist.storage import carrier
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store
from phema_dist.training import ends

FOREVER = 60.0  # far beyond every bound that is tested


# What the processes do. Each has a folder of its own: what it says is in its log, and files there are its signals.


def begin(case: Path, url: str, options: dict[str, Any], *, drains: bool = False, width: int = 4) -> PostHocEMA:
    """15 updates, and a snapshot at t=10 that is stored once the file `gate` is there; then say so."""
    model = nn.Linear(width, width)
    ema = PostHocEMA.from_model(
        nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model,
        url, update_every=1, checkpoint_every=10, storage_options=options, drain_on_sigterm=drains,
    )  # fmt: skip
    kind: Any = type(ema._store)
    put, gate = kind.put, case / "gate"

    def put_after_gate(store: Any, key: str, data: Any) -> None:
        if key.startswith("snapshots/"):
            wait_for(gate)
        put(store, key, data)

    kind.put = put_after_gate
    for _ in range(15):
        ema.update_()
    ema._session.writer._averages.wait_until_fewer(1)  # type: ignore[union-attr]  so that the snapshot is taken
    say(case, "ready")
    return ema


def wait_for(path: Path, text: str = "", seconds: float = FOREVER) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"no {text!r} in {path}"
        time.sleep(0.01)


def say(case: Path, text: str) -> None:
    with (case / "said").open("a") as file:
        file.write(f"{text}\n")


def closes(ema: PostHocEMA, case: Path) -> None:
    ema.close()


def closes_soon(ema: PostHocEMA, case: Path) -> None:
    ema.close(timeout=0.5)


def leaves_with(ema: PostHocEMA, case: Path) -> None:
    with ema:
        pass


def leaves_with_an_exception(ema: PostHocEMA, case: Path) -> None:
    with ema:
        raise ZeroDivisionError


def exits_in_with(ema: PostHocEMA, case: Path) -> None:
    with ema:
        sys.exit(3)


def returns(ema: PostHocEMA, case: Path) -> None:
    pass


def raises(ema: PostHocEMA, case: Path) -> None:
    raise ZeroDivisionError


def exits(ema: PostHocEMA, case: Path) -> None:
    sys.exit(3)


def is_gone(ema: PostHocEMA, case: Path) -> None:
    os._exit(9)


def trains_on(ema: PostHocEMA, case: Path) -> None:
    end = time.monotonic() + FOREVER
    while time.monotonic() < end:  # in Python all the time, holding a lock of ours whenever that happens
        ema._session.writer._averages.wait_until_fewer(5)  # type: ignore[union-attr]


def sleeps(ema: PostHocEMA, case: Path) -> None:
    time.sleep(FOREVER)


def loses_the_handler_and_begins_again(ema: PostHocEMA, case: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a launcher's library may
    PostHocEMA.from_model(nn.Linear(4, 4), case / "another", drain_on_sigterm=True)
    say(case, "again")
    sleeps(ema, case)


def hangs_in_a_collective(ema: PostHocEMA, case: Path) -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)  # never comes
    time.sleep(FOREVER)


def fails_on_one_rank(ema: PostHocEMA, case: Path) -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError
    dist.recv(torch.zeros(1), src=1)


def end_with_big_objects(case: str, url: str, options: dict[str, Any], how: str, drains: bool) -> None:
    carrier._HOME, send = os.getpid(), carrier.send  # this process is a fork, but of one that has sent nothing

    async def told(*arguments: Any) -> str:
        say(Path(case), "obstore")
        return await send(*arguments)

    carrier.send = told
    globals()[how](begin(Path(case), url, options, drains=drains, width=3000), Path(case))


def end(case: str, url: str, options: dict[str, Any], how: str, drains: bool, seconds: float | None = None) -> None:
    if seconds is not None:
        ends._SECONDS_AT_EXIT = ends._SECONDS_AT_SIGTERM = phema_dist.ema._SECONDS_AFTER_ERROR = seconds
    ema = begin(Path(case), url, options, drains=drains)
    globals()[how](ema, Path(case))


def end_as_rank(rank: int, world_size: int, case: str, url: str, how: str, drains: bool) -> None:
    store = dist.FileStore(f"{case}/ranks", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=FOREVER))
    (Path(case) / str(rank)).mkdir()
    end(f"{case}/{rank}", url, {}, how, drains)


# What SIGTERM did before, and what others do with it.


def has_a_handler(case: str, url: str) -> None:
    """Which tells what it finds in storage; then training goes on."""
    told: list[int] = []

    def handler(number: int, _: object) -> None:
        say(Path(case), f"told {complete(url)}")
        told.append(number)

    signal.signal(signal.SIGTERM, handler)
    ema = begin(Path(case), url, {}, drains=True)
    ends.drain_on_sigterm()  # changes nothing
    while not told:
        time.sleep(0.01)
    for _ in range(5):
        ema.update_()
    ema.close()


def has_a_handler_that_raises(case: str, url: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    begin(Path(case), url, {}, drains=True)
    time.sleep(FOREVER)


def ignores_it(case: str, url: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begin(Path(case), url, {}, drains=True).close()


def gets_a_later_handler(case: str, url: str) -> None:
    begin(Path(case), url, {}, drains=True)
    ours: Any = signal.getsignal(signal.SIGTERM)

    def later(number: int, frame: Any) -> None:
        say(Path(case), "told")
        ours(number, frame)

    signal.signal(signal.SIGTERM, later)
    say(Path(case), "now")
    time.sleep(FOREVER)


def is_replaced(case: str, url: str) -> None:
    begin(Path(case), url, {}, drains=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(6))
    say(Path(case), "now")
    time.sleep(FOREVER)


def loses_the_wakeup_fd(case: str, url: str) -> None:
    begin(Path(case), url, {}, drains=True)
    signal.set_wakeup_fd(-1)
    say(Path(case), "now")
    time.sleep(FOREVER)


def is_in_asyncio(case: str, url: str) -> None:
    async def job() -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, say, Path(case), "the other signal")
        loop.add_signal_handler(signal.SIGTERM, lambda: (say(Path(case), f"told {complete(url)}"), told.set()))
        begin(Path(case), url, {}, drains=True)
        await asyncio.wait_for(told.wait(), FOREVER)

    asyncio.run(job())


def spins(case: str, url: str) -> None:
    """All in Python, where the handler comes at once."""
    begin(Path(case), url, {}, drains=True)
    os.kill(os.getpid(), signal.SIGTERM)
    now, held = time.monotonic(), 0.0  # a busy machine can only hold it longer
    end = now + 1
    while now < end:
        before, now = now, time.monotonic()
        held += now - before if now - before > 0.1 else 0.0
    say(Path(case), "waits" if held > 0.4 else "does not wait")
    time.sleep(FOREVER)


def holds_a_lock(case: str, url: str) -> None:
    """One that the drain needs, at the moment when the handler comes."""
    ends._SECONDS_AT_SIGTERM = FOREVER
    ema = begin(Path(case), url, {}, drains=True)
    with ema._session.writer._averages._changed:  # type: ignore[union-attr]
        os.kill(os.getpid(), signal.SIGTERM)
        say(Path(case), "now")
    time.sleep(FOREVER)


def returns_meanwhile(case: str, url: str) -> None:
    ends._SECONDS_AT_EXIT = 0.0  # the end of the program waits for the signal's drain, not the other way round
    begin(Path(case), url, {}, drains=True)
    os.kill(os.getpid(), signal.SIGTERM)


def trains_two(case: str, url: str) -> None:
    begin(Path(case), url, {}, drains=True)
    begin(Path(case), f"{url}-2", {})
    say(Path(case), "now")
    time.sleep(FOREVER)


def waits_long(case: str, url: str) -> None:
    ends._SECONDS_AT_SIGTERM = FOREVER
    begin(Path(case), url, {}, drains=True)
    time.sleep(FOREVER)


# Children.


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return index


def forks(case: str, url: str, options: dict[str, Any]) -> None:
    ema = begin(Path(case), url, options, drains=True)
    ema._session.writer.drain()  # type: ignore[union-attr]

    def child(step: Callable[[], None]) -> int:
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        signal.alarm(20)  # or it would hang for ever
        step()
        raise SystemExit  # and end as any program

    def updates() -> None:
        with pytest.raises(BackgroundError, match="fork"):
            for _ in range(10):
                ema.update_()
        with pytest.raises(BackgroundError, match="fork"):
            ema.close()

    def leaves() -> None:
        with ema:
            sys.exit(4)

    assert child(updates) == 0
    assert child(leaves) == 4
    assert child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM  # and the parent lives
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=time.sleep, args=(0,))  # type: ignore[attr-defined]
        process.start()
        process.join(40)
        assert process.exitcode == 0
        loader = DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context=method)
        assert sum(len(batch) for batch in loader) == 8
        ema.update_()
    for _ in range(3):
        ema.update_()
    ema.close()


# The program.


def serve() -> None:
    """Fork a process per line of stdin: [folder, job, arguments]; tell its pid. [pid]: tell how it ended."""
    import s3fs  # noqa: F401, PLC0415  once, not in each process

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever starts tests in the background has ignored
    gc.freeze()  # or each process takes a second to collect all of torch when it ends
    for line in sys.stdin:
        order = json.loads(line)
        if len(order) == 1:
            print(os.waitstatus_to_exitcode(os.waitpid(order[0], 0)[1]), flush=True)  # noqa: T201
            continue
        case, job, arguments = order
        pid = os.fork()
        if pid:
            print(pid, flush=True)  # noqa: T201
            continue
        log = os.open(f"{case}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        globals()[job](*arguments)
        return  # and end as any program


class Processes:
    """The server, and what it runs."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._running: set[int] = set()

    def start(self, case: Path, job: str, *arguments: object) -> int:
        case.mkdir(exist_ok=True)
        pid = self._ask([str(case), job, arguments])
        self._running.add(pid)
        return pid

    def wait(self, pid: int, seconds: float = 40) -> int:
        """The exit status; None of the ends hangs."""
        killer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
        killer.start()
        try:
            return self._ask([pid])
        finally:
            killer.cancel()
            self._running.discard(pid)

    def _ask(self, order: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.close()


def complete(url: str, options: dict[str, Any] | None = None) -> list[int]:
    return [s.t for s in open_run(open_store(url, options)).complete]


def log_of(case: Path) -> str:
    return (case / "log").read_text()


# Every end, with a store that works.

# How it ends, the signal that it gets, whether SIGTERM drains: exit status, snapshots, and what it says.
EVERY_END: dict[tuple[str, int, bool], tuple[int, list[int], str]] = {
    ("closes", 0, False): (0, [10, 15], ""),
    ("leaves_with", 0, True): (0, [10, 15], ""),
    ("leaves_with_an_exception", 0, False): (1, [10], "left by ZeroDivisionError: storing what is queued"),
    ("exits_in_with", 0, True): (3, [10], "left by SystemExit: storing what is queued"),
    ("returns", 0, False): (0, [10], "PostHocEMA was not closed"),
    ("raises", 0, True): (1, [10], "PostHocEMA was not closed"),
    ("exits", 0, False): (3, [10], "PostHocEMA was not closed"),
    ("sleeps", signal.SIGINT, True): (-signal.SIGINT, [10], "PostHocEMA was not closed"),
    ("sleeps", signal.SIGTERM, False): (-signal.SIGTERM, [], ""),
    ("sleeps", signal.SIGTERM, True): (-signal.SIGTERM, [10], "SIGTERM: storing what is queued"),
    ("trains_on", signal.SIGTERM, True): (-signal.SIGTERM, [10], "SIGTERM: storing what is queued"),
    ("sleeps", signal.SIGKILL, True): (-signal.SIGKILL, [], ""),
    ("is_gone", 0, True): (9, [], ""),
}


def test_every_end_keeps_its_exit_status_and_leaves_whole_snapshots(
    any_store_url: Target, tmp_path: Path, processes: Processes
) -> None:
    url, options = any_store_url
    cases = {key: tmp_path / "-".join(map(str, key)) for key in EVERY_END}
    pids = {
        (how, number, drains): processes.start(case, "end", str(case), f"{url}/{case.name}", options, how, drains)
        for (how, number, drains), case in cases.items()
    }
    for (how, number, drains), case in cases.items():
        wait_for(case / "said", "ready")
        os.kill(pids[how, number, drains], number)
    time.sleep(0.3)  # so that those that would not wait are gone
    for key, case in cases.items():
        if EVERY_END[key][1]:
            (case / "gate").touch()
    found = {key: (processes.wait(pids[key]), complete(f"{url}/{case.name}", options)) for key, case in cases.items()}
    assert found == {key: (status, ts) for key, (status, ts, _) in EVERY_END.items()}
    for key, case in cases.items():
        assert EVERY_END[key][2] in log_of(case), key
        assert "no last snapshot" in log_of(case) or not EVERY_END[key][2], key
    # What is left of the one that was killed is no snapshot, and in nobody's way.
    url = f"{url}/{cases['is_gone', 0, True].name}"
    with PostHocEMA.from_model(nn.Linear(4, 4), url, update_every=1, resume=True, storage_options=options) as ema:
        ema.update_(t=12)
    assert complete(url, options) == [12]


def test_a_handler_that_somebody_took_away_comes_back_with_the_next_object(
    tmp_path: Path, processes: Processes
) -> None:
    case = tmp_path / "case"
    pid = processes.start(case, "end", str(case), str(tmp_path / "run"), {}, "loses_the_handler_and_begins_again", True)
    wait_for(case / "said", "again")
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    (case / "gate").touch()
    assert processes.wait(pid) == -signal.SIGTERM
    assert complete(str(tmp_path / "run"), {}) == [10]
    assert f"{tmp_path / 'run'}, rank 0: SIGTERM: nothing is queued any more" in log_of(case)


@pytest.mark.s3
def test_big_objects_reach_s3_too_when_the_program_ends(s3_url: Target, tmp_path: Path, processes: Processes) -> None:
    url, options = s3_url
    wanted: dict[tuple[str, int, str], int] = {
        ("returns", 0, "s3fs"): 0,
        ("returns", 0, "obstore"): 0,
        ("sleeps", signal.SIGTERM, "obstore"): -signal.SIGTERM,
    }
    for (how, number, client), status in wanted.items():
        case = tmp_path / f"{how}-{client}"
        where, with_client = f"{url}/{case.name}", options | {"client": client}
        pid = processes.start(case, "end_with_big_objects", str(case), where, with_client, how, True)
        wait_for(case / "said", "ready")
        os.kill(pid, number)
        time.sleep(0.3)
        (case / "gate").touch()
        assert (processes.wait(pid), complete(where, options)) == (status, [10])
        assert ("obstore" in (case / "said").read_text()) == (client == "obstore")


# ... with a store that hangs.


HANGING: dict[tuple[str, int], int] = {
    ("closes_soon", 0): 1,
    ("leaves_with_an_exception", 0): 1,
    ("returns", 0): 0,
    ("raises", 0): 1,
    ("exits", 0): 3,
    ("sleeps", signal.SIGINT): -signal.SIGINT,
    ("sleeps", signal.SIGTERM): -signal.SIGTERM,
}


def test_no_end_hangs_when_the_store_does(tmp_path: Path, processes: Processes) -> None:
    url = f"{tmp_path}/run"
    cases = {(how, number): tmp_path / f"{how}-{number}" for how, number in HANGING}
    pids = {
        key: processes.start(case, "end", str(case), f"{url}/{case.name}", {}, key[0], True, 0.5)
        for key, case in cases.items()
    }
    for key, case in cases.items():
        wait_for(case / "said", "ready")
        os.kill(pids[key], key[1])
    assert {key: processes.wait(pid) for key, pid in pids.items()} == HANGING
    assert [complete(f"{url}/{case.name}") for case in cases.values()] == [[]] * len(cases)


@pytest.mark.s3
def test_no_end_hangs_when_s3_takes_everything_and_answers_nothing(
    s3_url: Target, s3_server: S3Server, tmp_path: Path, processes: Processes
) -> None:
    url, options = s3_url
    wanted = {key: HANGING[key] for key in [("closes_soon", 0), ("exits", 0), ("sleeps", signal.SIGTERM)]}
    cases = {(how, number): tmp_path / f"{how}-{number}" for how, number in wanted}
    with ChaosProxy(s3_server.address) as proxy:
        through = options | {"endpoint_url": proxy.endpoint}
        pids = {
            key: processes.start(case, "end", str(case), f"{url}/{case.name}", through, key[0], True, 1.0)
            for key, case in cases.items()
        }
        for case in cases.values():
            wait_for(case / "said", "ready")
        proxy.black_hole = True
        for key, case in cases.items():
            (case / "gate").touch()
            os.kill(pids[key], key[1])
        assert {key: processes.wait(pid) for key, pid in pids.items()} == wanted
    assert [complete(f"{url}/{case.name}", options) for case in cases.values()] == [[]] * len(cases)


# SIGTERM.


def test_after_the_drain_sigterm_does_what_it_did_before(tmp_path: Path, processes: Processes) -> None:
    wanted: dict[str, tuple[int, list[int], list[str]]] = {
        "has_a_handler": (0, [10, 20], ["ready", "told [10]"]),
        "has_a_handler_that_raises": (5, [10], ["ready"]),
        "ignores_it": (0, [10, 15], ["ready"]),
        "gets_a_later_handler": (-signal.SIGTERM, [10], ["ready", "now", "told"]),
        "is_replaced": (6, [10], ["ready", "now"]),
        "loses_the_wakeup_fd": (-signal.SIGTERM, [10], ["ready", "now"]),
        "is_in_asyncio": (0, [10], ["ready", "the other signal", "told [10]"]),
        "spins": (-signal.SIGTERM, [10], ["ready", "waits"]),
        "holds_a_lock": (-signal.SIGTERM, [10], ["ready", "now"]),
        "returns_meanwhile": (-signal.SIGTERM, [10], ["ready"]),
        "trains_two": (-signal.SIGTERM, [10], ["ready", "ready", "now"]),
        "waits_long": (-signal.SIGTERM, [10], ["ready"]),  # here, for the second one
    }
    url = f"{tmp_path}/run"
    pids = {how: processes.start(tmp_path / how, how, str(tmp_path / how), f"{url}/{how}") for how in wanted}
    for how, pid in pids.items():
        if how in {"spins", "holds_a_lock", "returns_meanwhile"}:  # which signal themselves
            continue
        wait_for(tmp_path / how / "said", "now" if "now" in wanted[how][2] else "ready")
        os.kill(pid, signal.SIGTERM)
    for how in ("spins", "holds_a_lock", "returns_meanwhile"):
        wait_for(tmp_path / how / "said", "wait" if how == "spins" else "ready")
    os.kill(pids["is_in_asyncio"], signal.SIGUSR1)
    wait_for(tmp_path / "is_in_asyncio/said", "the other signal")  # at once, also while SIGTERM waits
    wait_for(tmp_path / "waits_long/log", "SIGTERM: storing")
    os.kill(pids["waits_long"], signal.SIGTERM)
    time.sleep(0.3)
    for how in pids:
        (tmp_path / how / "gate").touch()
    found = {
        how: (processes.wait(pid), complete(f"{url}/{how}"), (tmp_path / how / "said").read_text().splitlines())
        for how, pid in pids.items()
    }
    assert found == wanted
    assert complete(f"{url}/trains_two-2") == [10]


@pytest.mark.parametrize(
    ("how", "number", "said", "status"),
    [
        ("sleeps", signal.SIGTERM, "SIGTERM: storing", -signal.SIGTERM),
        ("sleeps", signal.SIGINT, "the program ends", -signal.SIGINT),
        ("returns", 0, "the program ends", 0),
        ("leaves_with_an_exception", 0, "left by ZeroDivisionError", -signal.SIGINT),
    ],
)
def test_ctrl_c_ends_the_drain_at_once(
    tmp_path: Path, processes: Processes, how: str, number: int, said: str, status: int
) -> None:
    pid = processes.start(tmp_path, "end", str(tmp_path), f"{tmp_path}/run", {}, how, True, FOREVER)
    wait_for(tmp_path / "said", "ready")
    os.kill(pid, number)
    wait_for(tmp_path / "log", said)
    os.kill(pid, signal.SIGINT)
    assert processes.wait(pid) == status, log_of(tmp_path)
    assert complete(f"{tmp_path}/run") == []


def test_it_is_asked_for_on_the_main_thread() -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(SettingsError, match=r"must be asked for on the main thread.*call close\(timeout=15\)"),
    ):
        pool.submit(ends.drain_on_sigterm).result()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("drains", [False, True])
def test_a_main_thread_that_is_stuck_in_a_collective_does_not_delay_it(
    tmp_path: Path, processes: Processes, drains: bool
) -> None:
    how, url = "hangs_in_a_collective", f"{tmp_path}/run"
    pids = [processes.start(tmp_path, "end_as_rank", rank, 2, str(tmp_path), url, how, drains) for rank in range(2)]
    for rank in range(2):
        wait_for(tmp_path / str(rank) / "said", "ready")
    time.sleep(0.5)  # into the collective
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    for rank in (1, 0):  # the collective of rank 0 fails while it drains, as rank 1 is gone by then
        if drains:
            time.sleep(0.3)
            (tmp_path / str(rank) / "gate").touch()
        assert processes.wait(pids[rank]) == -signal.SIGTERM
    assert complete(url) == ([10] if drains else [])


def test_a_rank_that_fails_and_those_that_are_stopped_for_it_store_what_was_queued(
    tmp_path: Path, processes: Processes
) -> None:
    how, url = "fails_on_one_rank", f"{tmp_path}/run"
    pids = [processes.start(tmp_path, "end_as_rank", rank, 2, str(tmp_path), url, how, True) for rank in range(2)]
    for rank in range(2):
        wait_for(tmp_path / str(rank) / "said", "ready")
    os.kill(pids[0], signal.SIGTERM)  # as torchrun does
    time.sleep(0.3)
    for rank in range(2):
        (tmp_path / str(rank) / "gate").touch()
    assert processes.wait(pids[0]) == -signal.SIGTERM
    assert processes.wait(pids[1]) in {1, -signal.SIGABRT}  # gloo may abort a process that ends
    assert complete(url) == [10]


def test_torchrun_reports_the_same_with_and_without(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    jobs = {}
    for drains in (False, True):
        case = tmp_path / str(drains)
        case.mkdir()
        command = [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(__file__, "hangs_in_a_collective", str(case), f"{case}/run", str(int(drains))),
        ]
        jobs[drains] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for drains in jobs:
        for rank in range(2):
            wait_for(tmp_path / str(drains) / str(rank) / "said", "ready")
    time.sleep(0.5)
    for job in jobs.values():
        job.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    for rank in range(2):
        (tmp_path / f"True/{rank}/gate").touch()
    reports = [job.communicate(timeout=60)[1] for job in jobs.values()]
    assert [job.returncode for job in jobs.values()] == [1, 1], reports
    assert all("got signal: 15" in report for report in reports), reports
    assert (complete(f"{tmp_path}/False/run"), complete(f"{tmp_path}/True/run")) == ([], [10]), reports


# Children.


def test_children_never_write_and_the_parent_is_unharmed(tmp_path: Path, processes: Processes) -> None:
    (tmp_path / "gate").touch()
    pid = processes.start(tmp_path, "forks", str(tmp_path), f"{tmp_path}/run", {})
    assert processes.wait(pid, 100) == 0, log_of(tmp_path)
    assert complete(f"{tmp_path}/run") == [10, 20]
    assert all("which was forked from" in line for line in log_of(tmp_path).splitlines()), log_of(tmp_path)


if __name__ == "__main__":
    if sys.argv[1:]:
        dist.init_process_group("gloo")
        how, case, url, drains = sys.argv[1:]
        rank_case = Path(case) / str(dist.get_rank())
        rank_case.mkdir()
        end(str(rank_case), url, {}, how, bool(int(drains)))
    else:
        serve()
