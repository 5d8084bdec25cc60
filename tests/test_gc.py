"""What of a run is removed: what nobody will finish or look at, and never what a job may still write."""

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import big_run
import fsspec
import pytest
import torch
from conftest import Target
from torch import nn

from phema_dist import PostHocEMA, synthesize
from phema_dist.cli import main
from phema_dist.errors import BackgroundError, KeyMissingError, RunError, SettingsError
from phema_dist.prediction import in_units
from phema_dist.storage.gc import collect_garbage
from phema_dist.storage.run import delete_snapshot, open_run, start_attempt, write_index
from phema_dist.storage.store import LocalStore, Store, open_store
from phema_dist.storage.verify import verify
from phema_dist.training import policy
from phema_dist.training.policy import Place, tidy


def made(target: Target, num_snapshots: int = 6, num_ranks: int = 2) -> Store:
    """A run of attempt 0, with snapshots each 1000 and room to break it."""
    store = open_store(*target)
    for key, data in big_run.files(num_ranks, num_snapshots):
        store.put(key, data)
    return store


def at(t: int, attempt: int = 0) -> str:
    return f"snapshots/{t:012d}-a{attempt}"


def break_off(store: Store, folder: str) -> None:
    """As rank 1 would have left it, killed before its manifest."""
    store.delete([f"{folder}/index.json", f"{folder}/rank-00001-of-00002.json"])


def removed(store: Store, **options: Any) -> list[str]:
    return sorted(garbage.key for garbage in collect_garbage(store, **options))


def folders(store: Store) -> list[str]:
    return sorted({"/".join(key.split("/")[:2]) for key in store.list("snapshots")})


def test_partials_go_when_nobody_will_finish_them(any_store_url: Target) -> None:
    store = made(any_store_url)
    for t in (1000, 4000, 5000, 6000):
        break_off(store, at(t))
    before = store.list()
    dry = list(collect_garbage(store, dry_run=True))
    assert [(g.key, g.num_bytes) for g in dry] == [(at(1000), sum(store.list(at(1000)).values()))]
    assert "manifests of rank 1 of 2 are missing" in dry[0].why
    assert store.list() == before
    assert removed(store) == [at(1000)]  # two later ones are complete; the others may still be
    assert removed(store) == []
    assert store.list() == {key: n for key, n in before.items() if not key.startswith(at(1000))}
    start_attempt(store, 2, 1, 0, 3000)  # and now nobody writes them any more
    assert removed(store) == [at(4000), at(5000), at(6000)]
    assert [s.t for s in open_run(store).complete] == [2000, 3000]


def test_hidden_snapshots_go_when_the_run_is_beyond_them_or_when_asked(tmp_path: Path) -> None:
    store = made((str(tmp_path / "run"), {}))
    store.put("pins/000000004000", b"")
    start_attempt(store, 2, 1, 0, 2000)
    assert removed(store) == []
    assert removed(store, dry_run=True, abandoned=True) == [at(3000), at(5000), at(6000)]
    token = open_run(store).attempts[-1].token
    for key, data in big_run.files(2, 5):  # the same again, by attempt 1: at 5000
        if key.startswith(at(5000)):
            changed = data.replace(b'"attempt":0', b'"attempt":1').replace(b"0123456789abcdef", token.encode())
            store.put(key.replace("-a0", "-a1"), big_run.unsealed(changed) if key.endswith(".json") else data)
    assert [s.t for s in open_run(store).complete] == [1000, 2000, 5000]
    assert removed(store, dry_run=True) == [at(3000), at(5000)]
    assert removed(store, abandoned=True) == [at(3000), at(5000), at(6000)]
    assert folders(store) == [at(1000), at(2000), at(4000), at(5000, 1)]


def test_the_newest_complete_snapshot_stays_even_where_it_is_hidden(tmp_path: Path) -> None:
    store = made((str(tmp_path / "run"), {}), 3)
    start_attempt(store, 2, 1, None, 0)  # begins afresh, and has nothing yet
    assert open_run(store).complete == ()
    assert removed(store, abandoned=True) == [at(1000), at(2000)]


@pytest.mark.parametrize("lost", ["attempts/0.json", "attempts/1.json"])
def test_where_a_record_is_lost_nothing_hidden_goes(tmp_path: Path, lost: str) -> None:
    store = made((str(tmp_path / "run"), {}), 3)
    start_attempt(store, 2, 1, 0, 2000)
    start_attempt(store, 2, 2, 1, 2000)
    store.delete([lost])
    assert removed(store, abandoned=True, keep=1) == []


def test_retention_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = made((str(tmp_path / "run"), {}))
    store.put("pins/000000001000", b"")
    url = str(tmp_path / "run")
    assert main(["gc", url]) == 0
    assert capsys.readouterr().out == f"{url}: nothing to remove\n"
    before, size = store.list(), sum(s.num_bytes for s in open_run(store).complete)  # as ls shows it
    assert main(["gc", url, "--keep", "3", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert store.list() == before
    assert main(["gc", url, "--keep", "3"]) == 0
    assert capsys.readouterr().out == listed.replace("would be removed", "removed")
    assert "3 things would be removed" in listed.splitlines()[-1]
    assert "not one of the 3 to keep" in listed
    assert f" {in_units(size - sum(s.num_bytes for s in open_run(store).complete))}" in listed.splitlines()[-1]
    left = [s.t for s in open_run(store).complete]
    assert len(left) == 3
    assert {1000, 6000} <= set(left)
    with pytest.raises(SettingsError, match="at least 1; got 0"):
        removed(store, keep=0)


def test_the_last_ones_are_kept_where_that_is_wanted(tmp_path: Path) -> None:
    store = made((str(tmp_path / "run"), {}))
    store.put("pins/000000002000", b"")
    assert main(["gc", store.url, "--keep", "3", "--retention", "last"]) == 0
    assert [s.t for s in open_run(store).complete] == [2000, 5000, 6000]
    with pytest.raises(SettingsError, match="retention must be one of"):
        removed(store, keep=1, retention="first")


def temporary(store: Store, key: str) -> Path:
    """What a killed put leaves."""
    path = Path(store.url) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"cut off")
    return path


def leave_puts(store: Store) -> tuple[list[Path], list[Path]]:
    """Unfinished puts of a run of which attempt 1 is the newest, complete at 6000: dead ones, and others."""
    name = ".0123456789abcdef.tmp"
    dead = [at(2000), at(7000), f"{at(7000)}/sigma_rel-0.05", f"{at(100, 1)}/sigma_rel-0.28"]
    dead.append(f"{at(6000, 1)}/sigma_rel-0.28")
    others = [at(6000, 1), at(7000, 1), f"{at(7000, 1)}/sigma_rel-0.05", f"{at(1, 2)}/sigma_rel-0.05", "attempts", ""]
    return [temporary(store, f"{folder}/{name}") for folder in dead], [
        temporary(store, f"{folder}/{name}") for folder in others
    ]


def continued(store: Store) -> None:
    """Attempt 1 goes on from t=5000, and is complete at 6000."""
    for key in store.list(at(6000)):
        store.delete([key])
    token = start_attempt(store, 2, 1, 0, 5000).token
    for key, data in big_run.files(2, 6, with_index=False):
        if key.startswith(at(6000)):
            changed = data.replace(b'"attempt":0', b'"attempt":1').replace(b"0123456789abcdef", token.encode())
            store.put(key.replace("-a0", "-a1"), big_run.unsealed(changed) if key.endswith(".json") else data)


def test_unfinished_puts_go_where_nobody_will_end_them(tmp_path: Path) -> None:
    store = made((str(tmp_path / "run"), {}))
    continued(store)
    dead, others = leave_puts(store)
    before = store.list()
    assert {Path(store.url) / key for key in removed(store, dry_run=True)} == set(dead)
    assert all(path.exists() for path in [*dead, *others])
    removed(store)
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in others)
    assert store.list() == before


def place_of(store: Store) -> Place:
    return Place(store, open_run(store).attempts[-1], 0, big_run.SIGMA_RELS, 0, 20, 1)


def test_the_next_start_removes_what_earlier_ones_left_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made((str(tmp_path / "run"), {}))
    break_off(store, at(4000))
    continued(store)
    dead, others = leave_puts(store)
    asked: list[str] = []
    unfinished = LocalStore.unfinished

    def watched(self: LocalStore) -> dict[str, str]:
        asked.append(self.url)
        return unfinished(self)

    monkeypatch.setattr(LocalStore, "unfinished", watched)
    known: Any = {}
    swept: set[int] = set()
    for _ in range(3):
        tidy(place_of(store), 6000, known, set(), swept)
    assert len(asked) == 1
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in others)
    assert at(4000) not in folders(store)
    assert [s.t for s in open_run(store).complete] == [1000, 2000, 3000, 5000, 6000]


def test_a_job_that_is_superseded_while_it_deletes_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made((str(tmp_path / "run"), {}))
    place = Place(store, open_run(store).attempts[0], 0, big_run.SIGMA_RELS, 0, 2, 1)
    deleted: list[str] = []

    def delete(store: Store, folder: str) -> None:
        deleted.append(folder)
        delete_snapshot(store, folder)
        start_attempt(store, 2, 1, 0, 5000)

    monkeypatch.setattr(policy.runs, "delete_snapshot", delete)
    with pytest.raises(RunError, match="superseded by attempt 1"):
        tidy(place, 6000, {}, set(), set())
    assert len(deleted) == 1
    assert len(open_run(store).complete) >= 4


def test_what_grows_since_it_was_judged_and_what_a_new_attempt_needs_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made((str(tmp_path / "run"), {}))
    break_off(store, at(1000))
    break_off(store, at(2000))
    working = collect_garbage(store)
    one = next(working).key
    other = ({at(1000), at(2000)} - {one}).pop()
    store.put(f"{other}/rank-00001-of-00002.json", b"somebody ends it after all")
    assert list(working) == []
    assert f"{other}/rank-00001-of-00002.json" in store.list(other)

    start_attempt(store, 2, 1, 0, 3000)
    working = collect_garbage(store, abandoned=True)
    next(working)
    start_attempt(store, 2, 2, 0, 6000)  # goes on from what the one before had given up
    rest = [garbage.key for garbage in working]
    assert not {at(4000), at(5000), at(6000)} & set(rest)


def write(target: Target, stop: threading.Event, begun: threading.Event) -> None:
    """A job that goes back a little every few snapshots, and so gives up what it has just written."""
    model, (url, options), resume = nn.Linear(40, 40), target, False
    begin = partial(PostHocEMA.from_model, model, url, update_every=1, checkpoint_every=1, max_checkpoints=4)
    while not stop.is_set():
        try:
            ema = begin(storage_options=options, resume=resume)
        except KeyMissingError:  # twice in a row something was deleted between listing and reading
            continue
        with ema:
            for _ in range(6):
                ema.update_(model)
                ema._session.writer.drain()
            begun.set()
            resume = ema.t - 2


@contextlib.contextmanager
def at_once(*works: Callable[[threading.Event], object]) -> Iterator[None]:
    """Run functions beside the body, until it ends; what one of them raises is raised."""
    stop, errors = threading.Event(), []

    def run(work: Callable[[threading.Event], object]) -> None:
        try:
            work(stop)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert errors == []


def test_two_collectors_beside_a_job_that_restarts_harm_nothing(
    any_store_url: Target, caplog: pytest.LogCaptureFixture
) -> None:
    url, options = any_store_url
    begun = threading.Event()

    def collect(stop: threading.Event) -> None:
        store = open_store(url, options)
        assert begun.wait(60)
        while not stop.is_set():
            list(collect_garbage(store, abandoned=True))

    with at_once(lambda stop: write(any_store_url, stop, begun), collect, collect):
        assert begun.wait(60)
        store, end = open_store(url, options), time.monotonic() + 4
        while time.monotonic() < end:
            verdict = verify(store)
            assert verdict.problems == ()
            assert verdict.num_complete > 0
    assert "is lost" not in caplog.text  # no put of the job failed
    list(collect_garbage(store, abandoned=True))
    verdict = verify(store)
    assert (verdict.problems, verdict.notes) == ((), ())
    (found,) = synthesize(url, [0.15], storage_options=options)
    assert torch.isfinite(found.state_dict["weight"]).all()


def leave_put(target: Target, key: str) -> None:
    """What a put leaves that was killed in the middle."""
    url, options = target
    if not options:
        folder, _, _ = key.rpartition("/")
        temporary(open_store(url), f"{folder}/.{secrets.token_hex(8)}.tmp")
        return
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    bucket, _, root = url.removeprefix("s3://").partition("/")
    filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{root}/{key}")


def test_a_job_that_goes_on_after_a_kill_cleans_up_after_its_first_snapshot(any_store_url: Target) -> None:
    url, options = any_store_url
    begin = partial(PostHocEMA.from_model, nn.Linear(4, 4), url, update_every=1, checkpoint_every=5)
    with begin(storage_options=options) as ema:
        for _ in range(15):
            ema.update_(nn.Linear(4, 4))
            ema._session.writer.drain()
    store = open_store(url, options)
    shards = [key for key in store.list(at(15)) if key.endswith(".safetensors")]
    store.delete(set(store.list(at(15))) - {shards[0]})
    for key in (shards[1], f"{at(20)}/sigma_rel-0.05/rank-00000.safetensors"):
        leave_put(any_store_url, key)
    with begin(storage_options=options, resume=True) as ema:
        leave_put(any_store_url, alive := f"{at(100, 1)}/sigma_rel-0.05/rank-00000.safetensors")
        assert len(store.unfinished()) == 3
        assert len(verify(store).notes) == 1
        for _ in range(5):
            ema.update_(nn.Linear(4, 4))
        ema._session.writer.drain()
        assert [key.rpartition("/")[0] for key in store.unfinished().values()] == [alive.rpartition("/")[0]]
    assert folders(store) == [at(5), at(10), at(15, 1)]
    assert verify(store).notes == ()
    assert removed(store) == []


def test_snapshots_that_stay_incomplete_are_told_once_naming_the_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = made((str(tmp_path / "run"), {}), 4, num_ranks=3)
    told: set[int] = set()
    for t in (2000, 3000, 4000):
        store.delete([f"{at(t)}/index.json", f"{at(t)}/rank-00001-of-00003.json"])
    for t, texts in ((3000, []), (4000, ["t=2000"]), (4000, [])):  # two are not whole, and the third is begun
        caplog.clear()
        tidy(place_of(store), t, {}, told, set())
        assert [text for text in ("t=2000", "t=3000", "t=4000") if f"rank 0, {text}: " in caplog.text] == texts
        assert not texts or "manifests of rank 1 of 3 are missing. Is update_ called on every rank?" in caplog.text


def test_a_job_whose_run_was_replaced_stops_and_harms_nothing(tmp_path: Path) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "run"
    old = PostHocEMA.from_model(model, path, 2, update_every=1, checkpoint_every=1)
    old.update_()
    old._session.writer.drain()  # type: ignore[union-attr]
    shutil.rmtree(path)
    with PostHocEMA.from_model(model, path, update_every=1, checkpoint_every=1) as new:
        for _ in range(6):
            new.update_()
            new._session.writer.drain()  # type: ignore[union-attr]
    before = {s.folder for s in open_run(open_store(path)).complete}
    with pytest.raises(BackgroundError, match="has become the run of another job"):
        for _ in range(9):
            old.update_()
            old._session.writer.drain()  # type: ignore[union-attr]
    assert {s.folder for s in open_run(open_store(path)).complete} == before
    assert len(before) == 6


def test_what_was_complete_and_lost_a_manifest_is_left_to_be_mended(tmp_path: Path) -> None:
    store = made((str(tmp_path / "run"), {}))
    run = open_run(store)
    write_index(store, run.complete[0])
    store.delete([f"{run.complete[0].folder}/rank-00001-of-00002.json"])
    assert list(collect_garbage(store)) == []
    assert open_run(store).snapshots[0].unfinished


def test_a_lost_record_of_an_attempt_stops_a_resume_instead_of_hiding_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "run"
    with PostHocEMA.from_model(model, path, update_every=1, checkpoint_every=1) as ema:
        ema.update_()
    (path / "attempts/0.json").unlink()
    with pytest.raises(RunError, match=r"attempts/0\.json is gone, .* 1 snapshots, up to t=1\. Put it back"):
        PostHocEMA.from_model(model, path, resume=True)
    assert main(["ls", str(path)]) == 0
    assert "its attempt is not recorded" in capsys.readouterr().out


def test_a_snapshot_that_a_rank_had_nothing_for_goes_too(tmp_path: Path) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "run"
    with PostHocEMA.from_model(model, path, update_every=1, checkpoint_every=1) as ema:
        for step in range(1, 8):
            with torch.no_grad():
                model.weight.fill_(torch.nan if step in {2, 6} else step)
            ema.update_()
            ema._session.writer.drain()  # type: ignore[union-attr]
    found = open_run(open_store(path)).snapshots
    assert [(s.t, s.refused) for s in found] == [(1, False), (3, False), (4, False), (5, False), (6, True), (7, False)]
