"""What the background path does when storage is slow or broken, when updates come too fast, and when a thread dies."""

import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from torch import nn

from phema_dist import BackgroundError, PostHocEMA, SettingsError, StorageError
from phema_dist.profile import sigma_rel_to_gamma
from phema_dist.storage.run import open_run
from phema_dist.storage.store import LocalStore, open_store
from phema_dist.training import ends
from phema_dist.training.buffers import SnapshotBuffers
from phema_dist.training.tracker import Tracker

Put = Callable[[LocalStore, str, "bytes | bytearray"], None]
ANY_KEY = "snapshots/"


@contextmanager
def puts(before: Callable[[str], None]) -> Iterator[None]:
    """Call `before` with the key of each object of a snapshot that is put."""
    original: Put = LocalStore.put

    def put(store: LocalStore, key: str, data: bytes | bytearray) -> None:
        if key.startswith(ANY_KEY):
            before(key)
        original(store, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put", put)
        yield


def failing(error: BaseException, *ts: int) -> Callable[[str], None]:
    def fail(key: str) -> None:
        if any(f"/{t:012d}-" in key for t in ts):
            raise error

    return fail


def begun(folder: Path | str, model: nn.Module, **settings: Any) -> PostHocEMA:
    return PostHocEMA.from_model(model, folder, **{"update_every": 1, "checkpoint_every": 5, **settings})


def drained(*emas: PostHocEMA) -> None:
    """As Writer.drain, but lost snapshots are left to be raised by what is tested."""
    for ema in emas:
        ema._session.writer._wait(None)  # type: ignore[union-attr]


def averages(ema: PostHocEMA) -> list[torch.Tensor]:
    """The flat average of each profile; there is one segment."""
    return [flat for (flat,) in ema._session.tracker.averages]  # type: ignore[union-attr]


def steps(ema: PostHocEMA, number: int, *, wait: bool = True) -> None:
    for _ in range(number):
        ema.update_()
        if wait:
            drained(ema)


def complete(folder: Path | str) -> list[int]:
    return [s.t for s in open_run(open_store(folder)).complete]


# -- status


def test_status_is_there_at_any_time_and_can_be_logged(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    ema = begun(tmp_path / "run", model)
    before = ema.status()
    assert set(before.values()) <= {0, None}
    steps(ema, 12)
    during = ema.status()
    stored = sum(file.stat().st_size for file in (tmp_path / "run/snapshots").rglob("rank-*"))
    assert during == before | {
        "t": 12, "updates": 12, "snapshots_written": 2, "bytes": stored, "last_written_snapshot": 10,
        "last_complete_snapshot": 10, "stall_seconds": during["stall_seconds"],
    }  # fmt: skip
    ema.close()
    after = ema.status()
    assert (after["t"], after["lag"], after["last_complete_snapshot"], after["snapshots_written"]) == (12, 0, 12, 3)
    reader = PostHocEMA.from_path(tmp_path / "run", model)
    assert reader.status() == before
    again = begun(tmp_path / "run", model, resume=True)
    assert again.status() == before | {"t": 12, "last_complete_snapshot": 12}
    again.close()
    for status in (before, during, after):
        assert json.loads(json.dumps(status)) == status


def test_status_tells_of_what_was_lost_and_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with puts(failing(StorageError("the disk is full"), 5)), begun(tmp_path / "run", model) as ema:
        steps(ema, 5)
        with torch.no_grad():
            model.weight[0, 0] = torch.nan
        steps(ema, 5)
        with torch.no_grad():
            model.weight.zero_()
        steps(ema, 5)
        found = ema.status()
        names = ("updates", "updates_refused", "snapshots_written", "snapshots_failed", "last_complete_snapshot")
        assert [found[name] for name in names] == [10, 5, 1, 2, 15]
        assert found["last_error"] == "t=10: its parameters are not finite"


# -- on_error


@pytest.mark.parametrize("error", [StorageError("the disk is full."), TypeError("an odd client")])
@pytest.mark.parametrize("attached", [False, True])
def test_a_lost_snapshot_is_raised_once_and_nothing_else_is_missing(
    tmp_path: Path, error: Exception, attached: bool
) -> None:
    """The update that raises is made all the same: averages and clock are those of a run that is only warned."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, twin = (begun(tmp_path / name, model, on_error=name) for name in ("raise", "warn"))
    if attached:
        ema.attach(optimizer)
    raised: list[tuple[int, StorageError]] = []
    with puts(failing(error, 5, 10)):
        for t in range(1, 17):
            with torch.no_grad():
                model.weight.normal_()
            try:
                optimizer.step() if attached else ema.update_(model)
            except StorageError as caught:
                raised.append((t, caught))
            twin.update_(model)
            drained(ema, twin)
    assert [t for t, _ in raised] == [6, 11]
    assert [caught.__cause__ for _, caught in raised] == [error, error]
    assert str(raised[0][1]).startswith("rank 0 could not store its part of the snapshot at t=5: ")
    assert str(error) in str(raised[0][1])
    assert str(error) in str(ema.status()["last_error"])
    assert ema.t == twin.t == 16
    for one, other in zip(averages(ema), averages(twin), strict=True):
        assert torch.equal(one, other)
    ema.close()
    twin.close()
    assert complete(tmp_path / "raise") == complete(tmp_path / "warn") == [15, 16]


def test_a_lost_snapshot_is_raised_by_whichever_call_comes_next(tmp_path: Path) -> None:
    """With the averages of the one before, or after all the rest is stored."""
    model = nn.Linear(4, 4)
    ema, error, go_on = begun(tmp_path / "run", model, on_error="raise"), StorageError("a full disk"), threading.Event()

    def fail_late(key: str) -> None:
        if "000000000015-" in key:
            assert go_on.wait(60)
        failing(error, 10, 15)(key)

    with puts(fail_late):
        steps(ema, 10)
        with pytest.raises(StorageError, match="t=10: a full disk"), ema.state_dict(0.1):
            pass
        with ema.state_dict(0.1) as state:
            assert set(state) == {"weight", "bias"}
        steps(ema, 4)
        steps(ema, 2, wait=False)
        go_on.set()
        with pytest.raises(StorageError, match="t=15: a full disk"):
            ema.close()
    assert complete(tmp_path / "run") == [5, 16]
    ema.close()


def test_a_last_snapshot_that_is_lost_is_one_error_with_its_cause(tmp_path: Path) -> None:
    for on_error in ("warn", "raise"):
        ema = begun(tmp_path / on_error, nn.Linear(4, 4), on_error=on_error)
        error = StorageError("the disk is full")
        with puts(failing(error, 3)), pytest.raises(BackgroundError, match="last snapshot could not be") as caught:
            steps(ema, 3)
            ema.close()
        assert caught.value.__cause__ is error
        ema.close()


def test_a_run_that_cannot_be_read_meanwhile_costs_no_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only another job that took over stops this one."""
    with begun(tmp_path / "run", nn.Linear(4, 4)) as ema:
        (tmp_path / "run/run.json").rename(tmp_path / "run/moved")
        steps(ema, 6)
        assert "older snapshots could not be deleted: " in str(ema.status()["last_error"])
        (tmp_path / "run/moved").rename(tmp_path / "run/run.json")
    assert complete(tmp_path / "run") == [5, 6]
    assert ema.status()["last_complete_snapshot"] == 6
    assert "there is no run.json" in caplog.text


# -- retention


@pytest.mark.parametrize(("retention", "kept"), [("last", [55, 60, 63]), ("best", None)])
def test_the_newest_are_kept_where_that_is_wanted_and_the_best_otherwise(
    tmp_path: Path, retention: str, kept: list[int] | None
) -> None:
    settings = {} if retention == "best" else {"retention": retention}
    with begun(tmp_path / "run", nn.Linear(4, 4), max_checkpoints=3, **settings) as ema:
        steps(ema, 33)
    assert len(complete(tmp_path / "run")) == 3
    again = PostHocEMA.from_path(
        tmp_path / "run", nn.Linear(4, 4), 3, update_every=1, checkpoint_every=5, retention=retention
    )
    with again as ema:
        steps(ema, 30)
    found = complete(tmp_path / "run")
    assert found == kept if kept else found[0] < 30 and found[-1] == 63 and len(found) == 3


def test_an_unknown_retention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"retention must be one of \('best', 'last'\); got 'first'"):
        begun(tmp_path / "run", nn.Linear(4, 4), retention="first")


# -- on_busy


@contextmanager
def slow_averages() -> Iterator[threading.Semaphore]:
    """No update is taken in before it is allowed."""
    allowed, original = threading.Semaphore(0), Tracker.update

    def update(tracker: Tracker, staged: list[torch.Tensor], t: int) -> bool:
        assert allowed.acquire(timeout=60)
        return original(tracker, staged, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "update", update)
        yield allowed


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("attached", [False, True])
def test_an_update_that_comes_too_soon_is_skipped_exactly(tmp_path: Path, attached: bool, counted: bool) -> None:
    """The profile is that of the updates that were made, each covering the time since the one before."""
    model = nn.Linear(30, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = 0

    def now() -> int:
        return 7 * calls

    ema = begun(tmp_path / "run", model, on_busy="skip", checkpoint_every=8)
    if attached:
        ema.attach(optimizer, t=None if counted else now)

    def step() -> None:
        nonlocal calls
        calls += 1
        with torch.no_grad():
            model.weight.zero_()
            model.weight[0, calls] = 1
        if attached:
            optimizer.step()
        else:
            ema.update_(t=None if counted else now())

    with slow_averages() as allowed:
        for _ in range(7):  # 1 is being taken in, 2 is queued, 3 to 7 are skipped
            step()
        assert (ema.status()["updates_skipped"], ema.status()["lag"]) == (5, 2)
        assert ema.status()["stall_seconds"] < 20  # type: ignore[operator]
        waiting = threading.Thread(target=step)  # 8, a snapshot's own
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        allowed.release()
        waiting.join(60)
        assert ema.status()["stall_seconds"] > 0.1  # type: ignore[operator]
        for _ in range(50):
            allowed.release()
        drained(ema)
        for _ in range(9, 13):
            step()
            drained(ema)
    made = [1, 2, 8, 9, 10, 11, 12]
    times = [t if counted else 7 * t for t in made]
    assert ema._session.tracker.history.times().tolist() == times  # type: ignore[union-attr]
    assert ema.t == times[-1]
    for sigma_rel, average in zip((0.05, 0.28), averages(ema), strict=True):
        gamma, before = sigma_rel_to_gamma(sigma_rel), 0
        wanted = np.zeros(30)
        for call, t in zip(made, times, strict=True):
            keep = (before / t) ** (gamma + 1)
            wanted *= keep
            wanted[call], before = 1 - keep, t
        np.testing.assert_allclose(average.numpy(), wanted, atol=1e-6)
    ema.close()
    assert complete(tmp_path / "run") == [times[2], times[-1]]


def test_close_brings_skipped_updates_up_to_the_last_call(tmp_path: Path) -> None:
    """Not to a model that holds an average, and not where nothing was called."""
    model = nn.Linear(2, 2)
    with slow_averages() as allowed:
        ema = begun(tmp_path / "run", model, on_busy="skip")
        steps(ema, 4, wait=False)
        for _ in range(9):
            allowed.release()
        ema.close()
    assert complete(tmp_path / "run") == [4]
    for resume in (4, 6):  # the model is at 6, and nothing is known of how it got there
        begun(tmp_path / "run", model, on_busy="skip", resume=resume).close()
        assert complete(tmp_path / "run") == [4]
    ema = begun(tmp_path / "run", model, on_busy="skip", resume=4, update_every=3, checkpoint_every=100)
    steps(ema, 1)
    with ema.model(model, 0.1):
        ema.close()
    assert complete(tmp_path / "run") == [4]


# -- storage that stalls


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_storage_that_stalls_costs_no_memory_no_update_and_no_exactness(tmp_path: Path) -> None:
    """Ten snapshots come due meanwhile, and two hundred updates of 8 MB."""
    model = nn.Linear(1400, 1400, bias=False)
    stalled, released = threading.Event(), threading.Event()

    def wait(key: str) -> None:
        if "000000000040-" in key:
            stalled.set()
            assert released.wait(60)

    def step() -> None:
        with torch.no_grad():
            model.weight.fill_(ema.t + 1)
        ema.update_()

    with puts(wait), begun(tmp_path / "run", model, checkpoint_every=20) as ema:
        for _ in range(39):  # buffers are in use, and the allocator has what it wants
            step()
            drained(ema)
        step()
        assert stalled.wait(60)
        before = resident_bytes()
        most = 0
        for _ in range(200):  # would never end if one waited for storage
            step()
            most = max(most, int(ema.status()["lag"] or 0))
        ema._session.writer.settle()  # type: ignore[union-attr]
        grown = resident_bytes() - before
        found = ema.status()
        assert (found["updates"], found["snapshots_skipped"], found["snapshots_written"]) == (240, 10, 1)
        assert most <= 2
        assert grown < 4e6  # half of one copy
        for sigma_rel, average in zip((0.05, 0.28), averages(ema), strict=True):
            gamma, wanted = sigma_rel_to_gamma(sigma_rel), 0.0
            for t in range(1, 241):
                keep = ((t - 1) / t) ** (gamma + 1)
                wanted = keep * wanted + (1 - keep) * t
            assert average.min() == average.max() == pytest.approx(wanted, rel=1e-5)
        released.set()
    assert complete(tmp_path / "run") == [20, 40, 240]


# -- threads that die


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(3), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("thread", ["averages", "storage"])
def test_a_thread_that_dies_is_told_by_every_call_with_the_cause(
    tmp_path: Path, error: BaseException, thread: str
) -> None:
    model = nn.Linear(4, 4)
    state = None

    def die(*_: object) -> Any:
        raise error

    calls: dict[str, Callable[[PostHocEMA], object]] = {
        "update_": lambda ema: ema.update_(model),
        "close": lambda ema: ema.close(),
        "with": lambda ema: ema.__exit__(None, None, None),
        "model": lambda ema: ema.model(model, 0.1).__enter__(),
        "state_dict": lambda ema: ema.state_dict(0.1).__enter__(),
        "drain": lambda ema: ema._session.writer.drain(),  # type: ignore[union-attr]
    }
    if thread == "averages":  # which are whole where only storage has stopped, and may be saved
        calls["settle"] = lambda ema: ema.training_state.state_dict()
    for name, call in calls.items():
        ema = begun(tmp_path / name, model, checkpoint_every=2)
        steps(ema, 2)
        with puts(failing(error, 4)), pytest.MonkeyPatch.context() as patch:
            if thread == "averages":
                patch.setattr(SnapshotBuffers, "fill", die)
            ema.update_(model)
            ema.update_(model, 4)
            worker = getattr(ema._session.writer, f"_{thread}")  # type: ignore[union-attr]
            worker._thread.join(30)
        assert not worker._thread.is_alive()
        for _ in range(1 if name in {"close", "with"} else 2):
            with pytest.raises(BackgroundError, match=f"phema-{thread} stopped: {type(error).__name__}") as caught:
                call(ema)
            assert caught.value.__cause__ is error
        assert str(ema.status()["last_error"]).startswith(f"phema-{thread} stopped: {type(error).__name__}")
        if thread == "storage" and name == "update_":
            state = ema.training_state.state_dict()
        ema.close() if ema._closed else ema.__exit__(ValueError, ValueError(), None)  # raises nothing, and ends
        assert complete(tmp_path / name) == [2]
    assert (state is not None) == (thread == "storage")


def test_what_was_filled_is_stored_although_the_averages_have_stopped(tmp_path: Path) -> None:
    go_on = threading.Event()
    ema = begun(tmp_path / "run", nn.Linear(4, 4))
    with puts(lambda _: assert_(go_on.wait(60))):
        steps(ema, 5, wait=False)
        ema._session.writer.settle()  # type: ignore[union-attr]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tracker, "update", lambda *_: 1 / 0)
            ema.update_()
            ema._session.writer._averages._thread.join(30)  # type: ignore[union-attr]
        threading.Timer(0.3, go_on.set).start()
        with pytest.raises(BackgroundError, match="phema-averages stopped: ZeroDivisionError"):
            ema.close()
    assert complete(tmp_path / "run") == [5]


def assert_(truth: bool) -> None:
    assert truth


def ask_in_child(ema: PostHocEMA, answers: Any) -> None:
    answers.put([outcome(ema.update_), outcome(ema.close), ema.status()["t"]])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking with threads is what is tested
def test_a_forked_child_is_told_that_it_does_not_train(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with begun(tmp_path / "run", nn.Linear(4, 4)) as ema:
        steps(ema, 4)
        taken, let_go = threading.Event(), threading.Event()

        def hold() -> None:
            with ema._session.writer._changed:  # type: ignore[union-attr]
                taken.set()
                assert let_go.wait(60)

        holder = threading.Thread(target=hold)  # of a lock, which the child finds taken for ever
        holder.start()
        assert taken.wait(60)
        child = context.Process(target=ask_in_child, args=(ema, answers), daemon=True)
        child.start()
        child.join(30)
        let_go.set()
        holder.join()
        assert child.exitcode == 0
        update, close, t = answers.get()
        assert "does not run in this process, which was forked" in update
        assert "does not run in this process, which was forked" in close
        assert t == 5  # counted, not made
        steps(ema, 1)
    assert complete(tmp_path / "run") == [5]


# -- close


@pytest.mark.parametrize("end", ["close", "with", "error", "averages"])
def test_close_ends_in_time_whatever_hangs(tmp_path: Path, end: str) -> None:
    released = threading.Event()
    model = nn.Linear(4, 4)
    ema = begun(tmp_path / "run", model)
    with puts(lambda _: assert_(released.wait(60))), slow_averages() as allowed:
        for _ in range(5 if end != "averages" else 0):
            allowed.release()
        steps(ema, 5 if end != "averages" else 1, wait=False)
        begin = time.monotonic()
        if end == "error":
            ema._session.writer.abandon(0.3, "left")  # type: ignore[union-attr]
            with pytest.raises(BackgroundError, match="there are no more updates: left"):
                ema.update_()
            with pytest.raises(BackgroundError, match="there is no last snapshot: left"):
                ema.close(0.3)
        else:
            busy = "the averages are" if end == "averages" else "storage is"
            with pytest.raises(BackgroundError, match=f"{busy} still busy after 0.3 s"):
                ema.close(timeout=0.3)
            if end == "with":
                ema.__exit__(None, None, None)
        ema.close()  # again
        assert time.monotonic() - begin < 20
        assert ema.status()["snapshots_written"] == 0
        workers = ema._session.writer._averages, ema._session.writer._storage  # type: ignore[union-attr]
        allowed.release()
        released.set()
        for worker in workers:
            worker._thread.join(30)
            assert not worker._thread.is_alive()
    assert complete(tmp_path / "run") == ([] if end == "averages" else [5])


def test_sigterm_is_watched_only_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[str] = []
    monkeypatch.setattr(ends, "drain_on_sigterm", lambda: watched.append("yes"))
    begun(tmp_path / "without", nn.Linear(2, 2)).close()
    assert not watched
    begun(tmp_path / "with", nn.Linear(2, 2), drain_on_sigterm=True).close()
    assert watched == ["yes"]


# -- several ranks


def misfortunes(folder: str) -> dict[str, Any]:
    """Rank 1 cannot store, and then averages slowly."""
    rank, found, logged = dist.get_rank(), {}, []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("phema_dist").addHandler(handler)
    torch.manual_seed(0)
    model = nn.Linear(4, 4)

    ema = begun(f"{folder}/lost", model, checkpoint_every=2)
    with puts(failing(StorageError("a full disk"), *([4, 6, 8] if rank else []))):
        for _ in range(6):
            steps(ema, 2)
            dist.barrier()
            found.setdefault("complete", []).append(ema.status()["last_complete_snapshot"])
    ema.close()
    found["status"] = ema.status()
    found["logged"] = [text.partition(": ")[2] for text in logged if "incomplete snapshot" in text]

    ema = begun(f"{folder}/busy", model, on_busy="skip", checkpoint_every=10)
    slow = slow_averages() if rank else None
    allowed = slow.__enter__() if slow else None
    steps(ema, 7, wait=not rank)
    for _ in range(99 if allowed else 0):
        allowed.release()  # type: ignore[union-attr]
    ema.training_state.state_dict()
    found["settled"] = ema._session.tracker.t  # type: ignore[union-attr]
    while allowed and allowed.acquire(blocking=False):
        pass
    later = threading.Timer(0.3, lambda: [allowed.release() for _ in range(99)] if allowed else None)
    later.start()  # for the update of the snapshot at 10
    steps(ema, 5, wait=not rank)
    later.join()
    ema.close()
    found["skipped"] = ema.status()["updates_skipped"]
    if slow:
        slow.__exit__(None, None, None)
    logging.getLogger("phema_dist").removeHandler(handler)
    return found


def test_what_one_rank_loses_and_skips(tmp_path: Path) -> None:
    first, second = run(2, misfortunes, str(tmp_path))
    # Rank 0 looks when it has stored its own part; the other one may not be ready then.
    assert all(x in y for x, y in zip(first["complete"], [{2, None}, {2}, {2}, {2}, {2, 10}, {10, 12}], strict=True))
    assert second["complete"] == [None] * 6
    assert first["logged"] == [
        "incomplete snapshot: manifests of rank 1 of 2 are missing. Is update_ called on every rank?" for t in (4, 6, 8)
    ]
    assert second["logged"] == []
    assert (first["status"]["snapshots_failed"], second["status"]["snapshots_failed"]) == (0, 3)
    assert "t=8: the snapshot is lost, training goes on: a full disk" in second["status"]["last_error"]
    assert (first["status"]["last_written_snapshot"], second["status"]["last_written_snapshot"]) == (12, 12)
    assert complete(tmp_path / "lost") == [2, 10, 12]

    assert second["skipped"] > 0
    assert first["settled"] == second["settled"] == 7
    assert complete(tmp_path / "busy") == [10, 12]
