"""Pins: a snapshot that somebody wants to keep stays, whoever deletes, and a pin that holds nothing is refused."""

import contextlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import big_run
import pytest
import torch.distributed as dist
from conftest import Target
from ranks import run as on_ranks
from torch import nn

from phema_dist import PostHocEMA
from phema_dist.cli import main
from phema_dist.errors import RunError, SettingsError, SnapshotError
from phema_dist.storage import pins
from phema_dist.storage.gc import collect_garbage
from phema_dist.storage.run import delete_snapshot, open_run, start_attempt
from phema_dist.storage.store import LocalStore, Store, open_store
from phema_dist.training import policy
from phema_dist.training.policy import Place, tidy


def made(target: Target, num_snapshots: int = 5) -> Store:
    """A run of two ranks, with snapshots each 1000."""
    store = open_store(*target)
    for key, data in big_run.files(2, num_snapshots):
        store.put(key, data)
    return store


def at(t: int) -> str:
    return f"snapshots/{t:012d}-a0"


def complete(store: Store) -> list[int]:
    return [s.t for s in open_run(store).complete]


def begun(url: Path | str, **settings: Any) -> PostHocEMA:
    return PostHocEMA.from_model(nn.Linear(4, 4), url, **{"update_every": 1, "checkpoint_every": 5, **settings})


def steps(ema: PostHocEMA, number: int) -> None:
    for _ in range(number):
        ema.update_()
        ema._session.writer.drain()  # type: ignore[union-attr]


def test_a_pin_is_one_empty_object_and_may_be_set_twice_and_taken_back(any_store_url: Target) -> None:
    store = made(any_store_url)
    before = store.list()
    for _ in range(2):
        pins.pin(store, 2000)
    assert store.list() == before | {"pins/000000002000": 0}
    list(collect_garbage(store, keep=1))
    assert complete(store) == [2000, 5000]
    store.put("pins/2000", b"")  # as another program may write it
    pins.unpin(store, 2000)
    assert not store.list("pins")
    list(collect_garbage(store, keep=1))
    assert complete(store) == [5000]


@pytest.mark.parametrize(
    ("t", "text"),
    [
        (2500, "t=2500 cannot be pinned: there is no complete snapshot. The nearest are t=2000 and t=4000"),
        (7, "The nearest are t=1000."),
        (10**9, "The nearest are t=5000."),
        (3000, r"there is no complete snapshot \(manifests of rank 1 of 2 are missing\). The nearest are t=2000 and"),
    ],
)
def test_a_t_without_a_complete_snapshot_is_refused_naming_the_nearest(tmp_path: Path, t: int, text: str) -> None:
    store = made((str(tmp_path / "run"), {}))
    store.delete([f"{at(3000)}/rank-00001-of-00002.json"])
    with pytest.raises(SnapshotError, match=text):
        pins.pin(store, t)
    assert open_run(store).pins == set()
    with pytest.raises(RunError, match=r"must be pinned to be unpinned; pinned is t=1000, t=2000\."):
        store.put("pins/1000", b"")
        pins.pin(store, 2000)
        pins.unpin(store, 3000)


def test_a_run_without_snapshots_says_so(tmp_path: Path) -> None:
    with begun(tmp_path / "run") as ema:
        for t in (0, 5):
            with pytest.raises(SnapshotError, match=f"t={t} cannot be pinned.* There is none so far"):
                ema.pin(t)
        with pytest.raises(SettingsError, match="t must be an integer"):
            ema.pin(0.5)  # type: ignore[arg-type]
        ema.update_()


def test_the_command_pins_and_ls_shows_it(any_store_url: Target, capsys: pytest.CaptureFixture[str]) -> None:
    store = made(any_store_url)
    url, options = any_store_url
    words = [url, *(["--storage-options", json.dumps(options)] if options else [])]
    assert main(["pin", *words, "--t", "3000"]) == 0
    store.put("pins/9", b"")
    capsys.readouterr()
    assert main(["ls", *words]) == 0
    *_, t3, _, _, gone = capsys.readouterr().out.splitlines()
    assert t3.split()[0] == "3000"
    assert t3.endswith("  complete, pinned")
    assert gone == "pinned, but not there: t=9"
    assert main(["ls", *words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pins"] == [9, 3000]
    assert [row["t"] for row in facts["snapshots"] if row["pinned"]] == [3000]
    assert main(["pin", *words, "--t", "3000", "--remove"]) == 0
    assert capsys.readouterr().out == f"{store.url}: t=3000 is not pinned any more\n"
    assert open_run(store).pins == {9}


def test_a_hidden_snapshot_may_be_pinned(tmp_path: Path) -> None:
    store = made((str(tmp_path / "run"), {}))
    start_attempt(store, 2, 1, 0, 2000)
    pins.pin(store, 4000)
    assert [g.key for g in collect_garbage(store, abandoned=True)] == [at(3000), at(5000)]


# -- races with who deletes


def test_who_deletes_looks_for_pins_before_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin that comes while others are being deleted still holds; with the job, and with `phema gc`."""
    for name in ("job", "gc"):
        store = made((str(tmp_path / name), {}))
        deleted: list[str] = []

        def delete(store: Store, folder: str, deleted: list[str] = deleted) -> None:
            delete_snapshot(store, folder)
            deleted.append(folder)
            for t in complete(store):
                pins.pin(store, t)

        if name == "job":
            place = Place(store, open_run(store).attempts[0], 0, big_run.SIGMA_RELS, 0, 2, 1)
            monkeypatch.setattr(policy.runs, "delete_snapshot", delete)
            tidy(place, 5000, {}, set(), set())
        else:
            removal = collect_garbage(store, keep=2)
            delete(store, next(removal).key)
            assert list(removal) == []
        assert len(deleted) == 1
        assert len(complete(store)) == 4


@pytest.mark.parametrize("pinned_before", [False, True])
def test_a_snapshot_that_goes_while_it_is_pinned_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned_before: bool
) -> None:
    store = made((str(tmp_path / "run"), {}))
    if pinned_before:
        pins.pin(store, 2000)
    put = LocalStore.put

    def delete_and_put(self: LocalStore, key: str, data: bytes) -> None:
        delete_snapshot(store, at(2000))
        put(self, key, data)

    monkeypatch.setattr(LocalStore, "put", delete_and_put)
    with pytest.raises(SnapshotError, match=r"t=2000 was deleted while .* The nearest are t=1000 and t=3000"):
        pins.pin(store, 2000)
    assert open_run(store).pins == ({2000} if pinned_before else set())  # somebody else's pin is not ours to take


def test_a_pin_at_any_moment_of_a_deletion_holds_or_is_refused(tmp_path: Path) -> None:
    """Between any two things that the deleter does."""
    outcomes = []
    for moment in range(20):
        store = made((str(tmp_path / f"run{moment}"), {}), 3)
        before, calls = store.list(), iter(range(99))
        read_before = {key: store.get(key) for key in before if key.endswith(".json") and key.startswith(at(2000))}

        class Slow(LocalStore):
            def _now(self, moment: int = moment, calls: Any = calls) -> None:
                if next(calls) == moment:
                    with contextlib.suppress(SnapshotError):
                        pins.pin(open_store(self.url), 2000)
                        outcomes.append("pinned")

            def list(self, prefix: str = "") -> dict[str, int]:
                self._now()
                return super().list(prefix)

            def delete(self, keys: Iterable[str]) -> None:
                self._now()
                super().delete(keys)

        (victim,) = (s for s in open_run(store).complete if s.t == 2000)
        count = len(outcomes)
        was_removed = pins.delete_unpinned(Slow(store.url), victim)
        if len(outcomes) == count:
            assert was_removed
            assert complete(store) == [1000, 3000]
            assert not open_run(store).pins
        else:
            assert not was_removed
            left = store.list()
            index = f"{at(2000)}/index.json"
            assert left | {index: 0} == before | {index: 0, "pins/000000002000": 0}
            assert complete(store) == [1000, 2000, 3000]
            assert all(read_before[key] == store.get(key) for key in read_before.keys() - {index})
    assert 3 <= len(outcomes) < 15  # a pin that comes first, and in between; and there are moments enough


# -- by the job itself


def test_a_snapshot_may_be_pinned_before_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its way into the averages, then into storage; not what is no snapshot, or was lost."""
    allowed, original = threading.Event(), LocalStore.put

    def put(self: LocalStore, key: str, data: bytes) -> None:
        if key.startswith("snapshots/"):
            assert allowed.wait(60)
        if key.startswith(at(15)):
            raise OSError("a full disk")
        original(self, key, data)

    monkeypatch.setattr(LocalStore, "put", put)
    ema = begun(tmp_path / "run", max_checkpoints=2)
    for _ in range(5):
        ema.update_()
    ema.pin(5)  # the averages may not have it yet
    with pytest.raises(SnapshotError, match="t=4 cannot be pinned"):
        ema.pin(4)
    ema._session.writer._averages.wait_until_fewer(1)  # type: ignore[union-attr]
    ema.pin(5)
    assert complete(open_store(ema._store.url)) == []
    allowed.set()
    steps(ema, 25)
    with pytest.raises(SnapshotError, match="t=15 cannot be pinned"):
        ema.pin(15)
    ema.close()
    ema.pin(ema.t)
    found = open_run(ema._store)
    assert (found.pins, {s.t for s in found.complete}) == ({5, 30}, {5, 30})


def test_the_last_one_is_known_to_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = begun(tmp_path / "run")
    steps(ema, 5)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", lambda *_: (_ for _ in ()).throw(OSError("a full disk")))
        steps(ema, 5)
    with pytest.raises(SnapshotError, match=r"t=10 cannot be pinned: .* The nearest are t=5\."):
        ema.pin(10)
    steps(ema, 1)
    ema.close()


def test_an_object_that_only_reads_may_pin(tmp_path: Path) -> None:
    store = made((str(tmp_path / "run"), {}))
    PostHocEMA.from_path(store.url).pin(4000)
    assert open_run(store).pins == {4000}


def train(url: str) -> list[int]:
    """Rank 1 alone pins the first snapshot as soon as it is taken, rank 0 a later one when it is stored."""
    rank = dist.get_rank()
    with begun(url, max_checkpoints=2, checkpoint_every=1) as ema:
        for t in range(1, 13):
            ema.update_()
            if (rank, t) == (1, 1):
                ema.pin(1)
            ema._session.writer.drain()  # type: ignore[union-attr]
            dist.barrier()
            if (rank, t) == (0, 4):
                ema.pin(4)
    dist.barrier()
    return complete(open_store(url))


def test_what_one_rank_pins_survives_retention(tmp_path: Path) -> None:
    found = on_ranks(2, train, str(tmp_path / "run"))[0]
    assert set(found) - {11} == {1, 4, 12}  # 11 stays if rank 0 has looked before rank 1 had stored 12
