"""The fault catalogue of docs/reliability.md: each test makes a fault happen, and looks what is left.

Crashes are in test_crash.py, what a store does alone in test_store.py, damaged files in test_stream.py and test_run.py.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import Target
from ranks import outcome, run
from s3_server import S3Server
from soak import SHAPE, SIGMA_RELS, AnsweringProxy, complete, in_new_process, look, s3_error, tracked, values, verified
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import phema_dist.ema
from phema_dist import BackgroundError, PostHocEMA, Power, StorageError, synthesize
from phema_dist.storage.store import LocalStore, Store, open_store

EVERY = 2
FAULTY_T = 6
MOUNT, UMOUNT = (shutil.which(name) or name for name in ("mount", "umount"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SHAPE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@torch.no_grad()
def set_values(model: nn.Module, t: int) -> None:
    next(model.parameters()).copy_(values(t))


class Intercepted:
    """A store whose verbs are told to somebody before and after, who may raise instead."""

    VERBS = frozenset({"put", "get", "get_many", "list", "delete", "unfinished", "discard"})

    def __init__(self, store: Store, told: Callable[[str, str, str], None]) -> None:
        self._store, self._told = store, told

    def __getattr__(self, name: str) -> Any:
        original = getattr(self._store, name)
        return functools.partial(self._tried, name, original) if name in self.VERBS else original

    def _tried(self, verb: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        about = args[0] if args and isinstance(args[0], str) else ""
        self._told("before", verb, about)
        result = original(*args, **kwargs)
        self._told("after", verb, about)
        return result


@contextlib.contextmanager
def stores(change: Callable[[Store], object]) -> Iterator[None]:
    """Every store that PostHocEMA opens inside is another one."""
    with mock.patch.object(phema_dist.ema, "open_store", lambda *args, **kwargs: change(open_store(*args, **kwargs))):
        yield


@contextlib.contextmanager
def log_of(name: str = "phema_dist") -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(name).removeHandler(handler)


def shards(url: str, options: dict[str, Any] | None = None) -> dict[tuple[int, str], str]:
    """The bits of all that a run lists: a digest of each data file, by t and name."""
    store, found = look(url, options or {})
    return {
        (snapshot.t, file.name): hashlib.sha256(store.get(f"{snapshot.folder}/{file.name}")).hexdigest()
        for snapshot in (found.complete if found else ())
        for manifest in snapshot.manifests
        for file in manifest.files
    }


# -- a verb that fails, each in turn


class Story(NamedTuple):
    """What one rank saw."""

    t: int
    failed: int
    last_error: str | None
    log: list[str]
    verbs: list[str]  # of the faulty snapshot


class Fault:
    """Lets the n-th verb of a store raise, once it is armed."""

    def __init__(self, number: int | None, when: str) -> None:
        self.armed, self.verbs = False, list[str]()
        self._number, self._when = number, when

    def __call__(self, when: str, verb: str, about: str) -> None:
        if not self.armed:
            return
        if when == "before":
            self.verbs.append(f"{verb} {about}")
        if when == self._when and len(self.verbs) - 1 == self._number:
            self._number = None
            raise StorageError(f"injected {when} {verb} {about}")


def train(url: str, fault: Fault, last: int, **settings: Any) -> Story:
    """On each rank: train, with a fault in the snapshot at FAULTY_T."""
    model = DistributedDataParallel(Net())
    with log_of() as log, stores(lambda store: Intercepted(store, fault)):
        ema = PostHocEMA.from_model(
            model, url, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=EVERY, **settings
        )
        writer = ema._session.writer  # type: ignore[union-attr]
        for t in range(1, last + 1):
            set_values(model.module, t)
            if t == FAULTY_T:
                # Rank 0 last, so that it finds all snapshots up to this one whole, and the same verbs come each time.
                if dist.get_rank() == 0:
                    dist.barrier()
                fault.armed = True
            ema.update_()
            writer.drain()
            fault.armed = False
            if t == FAULTY_T and dist.get_rank() != 0:
                dist.barrier()
            if t == FAULTY_T - EVERY:
                dist.barrier()
        ema.close()
    return Story(ema.t, ema.status()["snapshots_failed"], ema.status()["last_error"], log, fault.verbs)


def fail_each(folder: str) -> list[tuple[str, int, str, list[Story]]]:
    """Collective: a run for each verb of the faulty snapshot, of each rank, failing before or after it was done."""
    rank = dist.get_rank()

    def together(story: Story) -> list[Story]:
        everybody: list[Any] = [None, None]
        dist.all_gather_object(everybody, story)
        return everybody

    counted = together(train(f"{folder}/counted", Fault(None, ""), FAULTY_T + EVERY, max_checkpoints=2))
    found = []
    for victim, story in enumerate(counted):
        for number in range(len(story.verbs)):
            for when in ("before", "after"):
                name = f"{victim}-{number}-{when}"
                fault = Fault(number if rank == victim else None, when)
                stories = together(train(f"{folder}/{name}", fault, FAULTY_T + EVERY, max_checkpoints=2))
                found.append((name, victim, f"{when} {story.verbs[number]}", stories))
    together(train(f"{folder}/whole", Fault(None, ""), FAULTY_T + EVERY))
    return found


def test_any_verb_may_fail_on_one_rank_and_costs_at_most_that_snapshot(tmp_path: Path) -> None:
    found = run(2, fail_each, str(tmp_path), timeout=150)[0]
    wanted, seen = shards(str(tmp_path / "whole")), set()
    for name, victim, what, stories in found:
        seen.add(f"{victim} {re.sub(r'[^ ]*/', '', what)}")
        listed, story = shards(str(tmp_path / name)), stories[victim]
        ts = {t for t, _ in listed}
        assert listed.items() <= wanted.items(), f"{what}: something listed is not what was trained"
        assert [s.t for s in stories] == [FAULTY_T + EVERY] * 2, f"{what}: training did not go on"
        assert max(ts) == FAULTY_T + EVERY, f"{what}: the next snapshot is not whole"
        assert stories[1 - victim].failed == 0
        assert stories[1 - victim].last_error is None
        lost = any("the snapshot is lost, training goes on: injected" in line for line in story.log)
        assert story.failed == lost
        # A manifest that was written and whose reply was lost makes a whole snapshot, all the same.
        makes_it = what.startswith("before put") and "index" not in what
        if makes_it:
            assert lost, what
            assert FAULTY_T not in ts, f"{what}: listed, and not whole"
        if lost or "delete" in what:
            assert "injected" in str(story.last_error), what
    for victim in (0, 1):
        of_put = {what.split()[-1] for what in seen if what.startswith(f"{victim} before put")}
        indexes = {"index.json"} if victim == 0 else set()
        assert of_put == {f"rank-0000{victim}.safetensors", f"rank-0000{victim}-of-00002.json"} | indexes
    assert any("delete" in what for what in seen)


def begin_badly(folder: str) -> list[str]:
    """Collective: what a start says if one of its verbs fails, and whether the next start works."""
    said = []
    for number in range(100):
        fault = Fault(number if dist.get_rank() == 0 else None, "before")
        fault.armed = True
        with stores(lambda store: Intercepted(store, fault)):  # noqa: B023  used at once
            model = Net()
            begin = functools.partial(PostHocEMA.from_model, model, f"{folder}/{number}", update_every=1, resume=True)
            error = outcome(lambda: begin().close())  # noqa: B023
        with begin() as ema:
            set_values(model, 1)
            ema.update_()
        said.append(error)
        count: list[Any] = [None, None]
        dist.all_gather_object(count, error)
        if not any(count):
            break
    return said


def test_a_start_that_cannot_write_fails_on_all_ranks_and_the_next_one_works(tmp_path: Path) -> None:
    said = run(2, begin_badly, str(tmp_path))
    assert len(said[0]) > 4
    for number, errors in enumerate(zip(*said, strict=True)):
        if number == len(said[0]) - 1:
            assert errors == ("", "")
        else:
            assert all(re.search("StorageError: .*injected before", error) for error in errors), errors
        assert complete(str(tmp_path / str(number)), {}) == [1]
    assert any("put attempts/0.json" in error for error in said[0])
    assert any("put run.json" in error for error in said[0])


# -- a disk that fails


def refuse_half_way(code: int) -> contextlib.AbstractContextManager[object]:
    """A write that gets half of its bytes to the disk, and then the error."""
    original = os.write

    def write(fd: int, data: Any) -> int:
        if "/run/" not in str(Path(f"/proc/self/fd/{fd}").readlink()):
            return original(fd, data)
        original(fd, memoryview(data)[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    return mock.patch.object(os, "write", write)


def refuse_to_sync() -> contextlib.AbstractContextManager[object]:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return mock.patch.object(os, "fsync", fsync)


@contextlib.contextmanager
def limited_file_size() -> Iterator[None]:
    """The kernel itself stops a write in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - 2**13)  # room to begin
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run([MOUNT, "-o", "remount,ro", folder], check=True)
    try:
        yield
    finally:
        subprocess.run([MOUNT, "-o", "remount,rw", folder], check=True)


def begin(url: str, options: dict[str, Any] | None = None, **settings: Any) -> tuple[nn.Module, PostHocEMA]:
    settings = {"sigma_rels": SIGMA_RELS, "update_every": 1, "checkpoint_every": 10, **settings}
    model = Net()
    return model, PostHocEMA.from_model(model, url, storage_options=options, **settings)


def train_to(model: nn.Module, ema: PostHocEMA, last: int) -> None:
    for t in range(ema.t + 1, last + 1):
        set_values(model, t)
        ema.update_()
        ema._session.writer.drain()  # type: ignore[union-attr]


def check_disk(folder: Path, fault: contextlib.AbstractContextManager[object], says: str) -> None:
    with log_of() as log:
        model, ema = begin(str(folder / "run"))
        train_to(model, ema, 19)
        with fault:
            train_to(model, ema, 20)
        assert complete(str(folder / "run"), {}) == [10]
        assert re.search(says, str(ema.status()["last_error"]))
        train_to(model, ema, 30)
        ema.close()
    assert [line for line in log if "t=20: the snapshot is lost, training goes on: " in line and re.search(says, line)]
    assert complete(str(folder / "run"), {}) == [10, 30]
    verified(str(folder / "run"), {})
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (functools.partial(refuse_half_way, errno.ENOSPC), "No space left on device"),
        (functools.partial(refuse_half_way, errno.EIO), "Input/output error"),
        (refuse_to_sync, "Input/output error"),
        (limited_file_size, "File too large"),
    ],
    ids=["no space", "write fails", "sync fails", "file too large"],
)
def test_a_disk_that_fails_costs_the_snapshot_only(fault: Callable[[], Any], says: str, tmp_path: Path) -> None:
    check_disk(tmp_path, fault(), says)


@pytest.mark.parametrize(
    ("fault", "says"),
    [(full, "No space left on device"), (read_only, "Read-only file system")],
    ids=["full", "read-only"],
)
def test_a_real_disk_that_is_full_or_read_only_costs_the_snapshot_only(
    fault: Callable[[Path], Any], says: str, tmp_path: Path
) -> None:
    try:
        subprocess.run([MOUNT, "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        check_disk(tmp_path, fault(tmp_path), says)
    finally:
        subprocess.run([UMOUNT, tmp_path], check=True)


# -- an object store that fails


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[AnsweringProxy]:
    with AnsweringProxy(s3_server.address) as proxy:
        yield proxy


def always(pattern: str, answer: bytes) -> Callable[[bytes], bytes | None]:
    """Answer all such requests, by the first line and the headers, so."""
    return lambda head: answer if re.match(pattern.encode(), head, re.DOTALL) else None


def now_and_then(answer: bytes) -> Callable[[bytes], bytes | None]:
    chance = random.Random(4)  # noqa: S311  no secret
    return lambda _: answer if chance.random() < 0.3 else None


class Trouble(NamedTuple):
    """Attributes of the proxy while the snapshot at 20 is stored, and what becomes of it."""

    changes: dict[str, Any]
    lost: bool
    says: str = ""


TROUBLES = {
    "503 now and then": Trouble({"answer": now_and_then(s3_error(503, "SlowDown"))}, lost=False),
    "500 for ever": Trouble({"answer": always("PUT ", s3_error(500, "InternalError"))}, lost=True),
    "403": Trouble({"answer": always("", s3_error(403, "AccessDenied"))}, lost=True, says="refused"),
    "expired credentials": Trouble({"answer": always("", s3_error(400, "ExpiredToken"))}, lost=True, says="refused"),
    "reset in the body": Trouble({"cut_after_bytes": 4000, "cuts_left": 2}, lost=False),
    "black hole": Trouble({"black_hole": True}, lost=True),
    "no 100-continue": Trouble({"answer": always("PUT ", AnsweringProxy.HANG)}, lost=True),
    "lost reply": Trouble({"lose_reply_to": re.compile(rb"PUT ")}, lost=False),
}
CLIENTS = ["s3fs", "obstore"]


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The client for storage_options; obstore carries also what is as small as here, so that it meets every fault."""
    if request.param == "obstore":
        pytest.importorskip("obstore")
        monkeypatch.setattr("phema_dist.storage.s3._LEAST_CARRIED", 2**12)
    return {"client": request.param}


@pytest.mark.s3
def test_an_object_store_in_trouble_costs_at_most_that_snapshot(
    client: dict[str, str], proxy: AnsweringProxy, s3_server: S3Server, s3_url: Target
) -> None:
    """One run, through one trouble after the other; after each comes a snapshot without."""
    url, direct = s3_url
    model, ema = begin(url, s3_server.options(endpoint=proxy.endpoint) | client, checkpoint_every=1, max_checkpoints=99)
    patient, wanted, num_lost = ema._store.deadline_seconds, [], 0  # type: ignore[attr-defined]
    for name, trouble in TROUBLES.items():
        t, before = ema.t + 1, {change: getattr(proxy, change) for change in trouble.changes}
        vars(proxy).update(trouble.changes)
        ema._store.deadline_seconds = patient if trouble.says or not trouble.lost else 0.4  # type: ignore[attr-defined]
        train_to(model, ema, t)  # this ends: every verb has a deadline
        ema._store.deadline_seconds = patient  # type: ignore[attr-defined]
        vars(proxy).update(before)
        num_lost += trouble.lost
        assert ema.status()["snapshots_failed"] == num_lost, f"{name}: {ema.status()['last_error']}"
        if trouble.lost:
            assert re.search(trouble.says, str(ema.status()["last_error"])), name
            assert "secret" not in str(ema.status()["last_error"])
        train_to(model, ema, t + 1)
        wanted += [t + 1] if trouble.lost else [t, t + 1]
        assert complete(url, direct) == wanted, name
    ema.close()
    assert complete(url, direct) == wanted
    verified(url, direct)
    # Whose beginning was answered into the void, nobody can abort; the next start finds it.
    again = PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=1, storage_options=direct, resume=True)
    with again:
        again.update_()
    assert not list(open_store(url, direct).unfinished()), "uploads are left behind"


@pytest.mark.s3
def test_a_server_that_is_killed_in_a_put_and_comes_back_costs_nothing(tmp_path: Path) -> None:
    with S3Server(tmp_path / "s3") as server, AnsweringProxy(server.address) as proxy:
        server.filesystem().mkdir("bucket")
        url, reached = "s3://bucket/run", threading.Event()

        def notice(head: bytes) -> None:
            if b"PUT" in head and b"000000000020" in head:
                reached.set()
                time.sleep(0.1)  # in the proxy: the server dies before it has the body

        model, ema = begin(url, server.options(endpoint=proxy.endpoint))
        train_to(model, ema, 19)
        proxy.answer = notice
        set_values(model, 20)
        ema.update_()
        assert reached.wait(60)
        server.kill()
        proxy.answer = None
        server.start()
        train_to(model, ema, 30)
        ema.close()
        assert complete(url, server.options()) == [10, 20, 30]
        verified(url, server.options())


@pytest.mark.s3
def test_an_upload_whose_end_is_answered_with_an_error_in_a_200_is_whole_or_not_there(
    client: dict[str, str],
    proxy: AnsweringProxy,
    s3_server: S3Server,
    s3_url: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S3 answers CompleteMultipartUpload with 200 before it knows, and an error may follow in the body."""
    url, direct = s3_url
    body = re.sub(rb"HTTP/1.1 \d+ [^\r]*", b"HTTP/1.1 200 OK", s3_error(500, "InternalError"))
    monkeypatch.setattr("phema_dist.storage.s3._PART_BYTES", 5 * 2**20)
    ema = PostHocEMA.from_model(
        nn.Linear(1700, 1700, bias=False), url, sigma_rels=[0.1], update_every=1, checkpoint_every=1,
        storage_options=s3_server.options(endpoint=proxy.endpoint) | client,
    )  # fmt: skip
    ends = iter([body, body])
    proxy.answer = lambda head: next(ends, None) if re.match(rb"POST \S+uploadId=", head) else None
    ema.update_()
    ema._session.writer.drain()  # type: ignore[union-attr]
    assert proxy.num_answers == 2
    assert ema.status()["snapshots_failed"] == 0
    deadline = ema._store.deadline_seconds  # type: ignore[attr-defined]
    monkeypatch.setattr("phema_dist.storage.remote.SLOWEST_BYTES_PER_SECOND", 2**40)
    for num_failed, pattern in enumerate((r"POST \S+uploadId=", r"PUT \S+partNumber=1"), 1):
        proxy.answer = always(pattern, body if "POST" in pattern else s3_error(500, "InternalError"))
        ema._store.deadline_seconds = 0.4  # type: ignore[attr-defined]
        ema.update_()
        ema._session.writer.drain()  # type: ignore[union-attr]
        assert ema.status()["snapshots_failed"] == num_failed
    ema._store.deadline_seconds, proxy.answer = deadline, None  # type: ignore[attr-defined]
    assert complete(url, direct) == [1]
    ema.update_()
    ema.close()
    assert complete(url, direct) == [1, 4]
    for average in synthesize(url, [Power(0.1, t=1), Power(0.1, t=4)], storage_options=direct):
        assert torch.equal(average.state_dict["weight"], ema._session._model.weight)  # type: ignore[union-attr]


# -- slow storage


def stalled(folder: str) -> tuple[int, int, int]:
    """Ten snapshots come while the first is being put; the host memory that took, what is promised, and the skips."""
    hung, released, original = threading.Event(), threading.Event(), LocalStore.put

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        if "snapshots" in key:
            hung.set()
            assert released.wait(100)
        original(self, key, data)

    elements = 4_000_000
    model = nn.Linear(4000, 1000, bias=False)
    weight = torch.randn(1000, 4000, generator=torch.Generator().manual_seed(0))
    with PostHocEMA.from_model(nn.Linear(1, 1), f"{folder}/small", update_every=1, checkpoint_every=1) as ema:
        ema.update_()  # what is loaded at the first use takes memory too
    before = _bytes_of("VmRSS")
    with mock.patch.object(LocalStore, "put", put):
        ema = PostHocEMA.from_model(model, f"{folder}/run", update_every=1, checkpoint_every=5)
        for t in range(1, 53):
            with torch.no_grad():
                torch.mul(weight, t, out=model.weight.data)
            ema.update_()
            assert t < 5 or hung.wait(100)
        ema._session.writer._averages.wait_until_fewer(1)  # type: ignore[union-attr]
        assert not released.is_set()
        peak = _bytes_of("VmHWM")
        released.set()
        ema.close()
    return peak - before, elements * 4 * (2 + 2 + 2), ema.status()["snapshots_skipped"]


def _bytes_of(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def test_while_storage_stalls_updates_go_on_in_bounded_memory_and_averages_stay_exact(tmp_path: Path) -> None:
    taken, promised, skipped = in_new_process(stalled, str(tmp_path))  # a new one: its peak is of this alone
    assert taken > promised  # all of it is in use, or nothing was measured
    assert skipped == 9
    assert taken < 1.1 * promised + 2**24
    assert complete(str(tmp_path / "run"), {}) == [5, 52]
    weight = torch.randn(1000, 4000, generator=torch.Generator().manual_seed(0))
    for sigma_rel in (0.05, 0.28):
        (average,) = synthesize(tmp_path / "run", [sigma_rel])
        factors = average.state_dict["weight"] / weight
        wanted = mean_of_t(sigma_rel, 52)
        assert torch.allclose(factors, torch.full((), wanted), rtol=1e-4)


def mean_of_t(sigma_rel: float, last: int) -> float:
    """The average of 1, 2, … last: of a parameter that is t."""
    from phema_dist.profile import sigma_rel_to_gamma  # noqa: PLC0415

    gamma, average = sigma_rel_to_gamma(sigma_rel), 0.0
    for t in range(1, last + 1):
        average += (1 - (1 - 1 / t) ** (gamma + 1)) * (t - average)
    return average


def one_is_slow(folder: str) -> tuple[float, bool]:
    """Rank 1's puts do not end before rank 0 is through with all of its training, and closed."""
    rank, done = dist.get_rank(), Path(folder, "rank-0-is-done")
    original = LocalStore.put

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        end = time.monotonic() + 60
        while rank == 1 and "snapshots" in key and not done.exists() and time.monotonic() < end:
            time.sleep(0.01)
        original(self, key, data)

    with mock.patch.object(LocalStore, "put", put):
        model = DistributedDataParallel(Net())
        ema = PostHocEMA.from_model(model, f"{folder}/run", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=10)
        for t in range(1, 61):
            set_values(model.module, t)
            ema.update_()
            if rank == 0:
                ema._session.writer.drain()  # type: ignore[union-attr]
        waited = done.exists()
        if rank == 0:
            ema.close()
            done.touch()
        else:
            ema.close()
    return ema.t, waited


def test_a_slow_rank_keeps_nobody_waiting(tmp_path: Path) -> None:
    assert run(2, one_is_slow, str(tmp_path))[0] == (60, False)
    found = complete(str(tmp_path / "run"), {})
    assert found[-1] == 60
    assert found[0] == 10
    verified(str(tmp_path / "run"), {})


# -- two jobs, and jobs that come again


def at_once(folder: str, begun: bool) -> str:
    """Two jobs of one rank each, told apart by the sign of their values, start on one folder at the same moment."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    sign, model = 1 - 2 * rank, Net()

    def start() -> PostHocEMA:
        return PostHocEMA.from_model(
            model, f"{folder}/run", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=5, resume=True,
            process_group=groups[rank],
        )  # fmt: skip

    def job() -> None:
        with start() as ema:
            for t in range(ema.t + 1, ema.t + 200):
                with torch.no_grad():
                    model.weight.copy_(sign * values(t).abs())
                ema.update_()
                ema._session.writer.drain()  # type: ignore[union-attr]
                time.sleep(0.002)

    if begun and rank == 0:
        start().close()  # a run without a snapshot
    dist.barrier()
    return outcome(job)


@pytest.mark.parametrize("begun", [False, True])
def test_of_two_jobs_that_start_at_once_one_stops_and_nothing_is_mixed(begun: bool, tmp_path: Path) -> None:
    said = run(2, at_once, str(tmp_path), begun)
    assert sorted(bool(error) for error in said) == [False, True], said
    stopped = next(error for error in said if error)
    assert re.search("is superseded by attempt" if begun else "superseded|has just become the run", stopped), stopped
    winner = said.index("")
    _, found = look(str(tmp_path / "run"), {})
    assert found is not None
    assert len(found.complete) > 10
    for snapshot in found.complete:
        for average in synthesize(tmp_path / "run", [Power(sigma_rel, t=snapshot.t) for sigma_rel in SIGMA_RELS]):
            signs = average.state_dict["weight"].sign().unique().tolist()
            assert signs == [1 - 2 * winner], f"t={snapshot.t} mixes two jobs"


def test_the_same_t_again_with_other_values_is_never_mixed_and_takes_over(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    model, first = begin(url)
    train_to(model, first, 38)
    first._session.writer.abandon(5, "a crash")  # type: ignore[union-attr]
    kept = shards(url)
    assert {t for t, _ in kept} == {10, 20, 30}

    model, second = begin(url, resume=20)
    assert {t for t, _ in shards(url)} == {10, 20}  # hidden at once
    for _ in range(21, 41):
        with torch.no_grad():
            model.weight.fill_(100.0)
        second.update_()
    second.close()
    found = shards(url)
    assert {t for t, _ in found} == {10, 20, 30, 40}
    assert all(found[key] == kept[key] for key in kept if key[0] <= 20)
    (average,) = synthesize(url, [Power(0.05, t=40)])
    assert average.state_dict["weight"].min() > 99  # nothing of what the first one did after 20
    for average in synthesize(url, [Power(0.05, t=20), Power(0.28, t=20)]):
        wanted = tracked([average.target.sigma_rel], [20])
        assert torch.allclose(average.state_dict["weight"].double(), torch.tensor(*wanted.values()), atol=1e-5)


def test_a_job_that_a_later_one_supersedes_stops_and_harms_nothing(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    model, first = begin(url)
    train_to(model, first, 20)
    other, second = begin(url, resume=True)
    train_to(other, second, 30)
    before = shards(url)
    with pytest.raises(BackgroundError, match="superseded"):
        for _ in range(1000):
            train_to(model, first, first.t + 10)
    with pytest.raises(BackgroundError, match="superseded"):
        first.close()
    train_to(other, second, 40)
    second.close()
    after = shards(url)
    assert before.items() <= after.items()
    assert {t for t, _ in after} == {10, 20, 30, 40}
    verified(url, {})


# -- parameters that change at once


@pytest.mark.parametrize("how", ["in place", "load_state_dict"])
def test_parameters_may_change_as_soon_as_update_returns(how: str, tmp_path: Path) -> None:
    """On an accelerator too: see test_staging.py, which has one that copies later."""
    model, ema = begin(str(tmp_path / "run"))
    garbage = torch.full(SHAPE, 1e9)
    for t in range(1, 51):
        set_values(model, t)
        ema.update_()
        if how == "in place":
            with torch.no_grad():
                model.weight.fill_(1e9)
        else:
            model.load_state_dict({"weight": garbage})
    ema.close()
    verified(str(tmp_path / "run"), {})


# -- answers that are wrong


@pytest.mark.s3
def test_a_read_that_is_answered_with_too_little_is_an_error(
    proxy: AnsweringProxy, s3_server: S3Server, s3_url: Target
) -> None:
    url, direct = s3_url
    model, ema = begin(url, direct)
    train_to(model, ema, 10)
    ema.close()
    short = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/99999\r\n\r\n0123456789"
    proxy.answer = lambda head: short if re.match(rb"GET \S+safetensors", head) else None
    with pytest.raises(StorageError, match=r"safetensors: .*(too short|failed)"):
        synthesize(url, [0.1], storage_options=s3_server.options(endpoint=proxy.endpoint))


@pytest.mark.parametrize("gone", ["rank-00000.safetensors", "rank-00000-of-00001.json"])
def test_a_stale_listing_is_a_retry_or_an_error_and_never_silent_data(gone: str, tmp_path: Path) -> None:
    """A listing that still names what was deleted."""
    url = str(tmp_path / "run")
    model, ema = begin(url)
    train_to(model, ema, 30)
    ema.close()
    store = open_store(url)
    stale = store.list()
    store.delete([key for key in stale if "000000000030" in key and key.endswith(gone)])
    lists = iter([stale, stale])
    original = LocalStore.list

    def listed(self: LocalStore, prefix: str = "") -> dict[str, int]:
        return original(self, prefix) if prefix else next(lists, None) or original(self)

    with mock.patch.object(LocalStore, "list", listed):
        try:
            (average,) = synthesize(url, [0.05])
        except StorageError as error:
            assert gone in str(error)  # noqa: PT017
            (average,) = synthesize(url, [0.05])
    assert average.t == 20
    assert torch.allclose(
        average.state_dict["weight"].double(), torch.tensor(tracked([0.05], [20])[0.05, 20]), atol=1e-5
    )
