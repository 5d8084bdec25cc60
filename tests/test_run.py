"""A run in storage: opened cheaply by its indexes, and never believed where its manifests or files say otherwise."""

import asyncio
import contextlib
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import big_run
import pytest
import torch
import torch.distributed as dist
from big_run import unsealed
from conftest import Target
from ranks import run as on_ranks
from torch import nn

from phema_dist import PostHocEMA
from phema_dist.cli import main
from phema_dist.errors import AccessError, KeyMissingError, PhemaError, RunError, SnapshotError, StorageError
from phema_dist.storage.manifest import (
    RUN_KEY,
    Attempt,
    Index,
    Manifest,
    RunInfo,
    TensorFacts,
    attempt_key,
    from_json,
    to_json,
)
from phema_dist.storage.run import (
    Known,
    Run,
    delete_snapshot,
    find_run,
    load_snapshots,
    open_run,
    start_attempt,
    write_index,
)
from phema_dist.storage.store import LocalStore, Store, open_store
from phema_dist.synthesis.recipe import plan
from phema_dist.training.policy import Place, tidy

NUM_RANKS, NUM_SNAPSHOTS = 24, 6
FOLDERS = [f"snapshots/{t:012d}-a0" for t in range(1000, 1000 * NUM_SNAPSHOTS + 1, 1000)]
MANIFESTS = re.compile(r"snapshots/.*/rank-\d+-of-\d+\.json")


class Watched:
    """A store that remembers which keys were asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.keys: list[str] = []
        self.num_lists = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_many(self, keys: Iterable[str], *, absent_ok: bool = False) -> dict[str, bytes]:
        keys = list(keys)
        self.keys += keys
        return self._store.get_many(keys, absent_ok=absent_ok)

    def list(self, prefix: str = "") -> dict[str, int]:
        self.num_lists += 1
        return self._store.list(prefix)

    @property
    def manifests(self) -> set[str]:
        """Folders of the snapshots whose manifests were read."""
        return {key.rpartition("/")[0] for key in self.keys if MANIFESTS.fullmatch(key)}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    big_run.write(folder, NUM_RANKS, NUM_SNAPSHOTS)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A run of many ranks, for one test to break."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def without_index(folder: Path) -> Run:
    """What the run is by its manifests alone."""
    for index in folder.glob("snapshots/*/index.json"):
        index.unlink()
    return open_run(open_store(folder))


def put_on(target: Target, num_ranks: int, num_snapshots: int) -> Store:
    store = open_store(*target)
    for key, data in big_run.files(num_ranks, num_snapshots):
        store.put(key, data)
    return store


# Opening.


def test_with_indexes_only_the_newest_snapshots_manifests_are_read(folder: Path) -> None:
    store = Watched(open_store(folder))
    found = open_run(store)
    assert [s.folder for s in found.complete] == FOLDERS
    assert store.manifests == {FOLDERS[-1]}
    assert len([key for key in store.keys if key.endswith("index.json")]) == NUM_SNAPSHOTS - 1
    assert found.indexed.keys() == set(FOLDERS[:-1])

    slow = without_index(folder)
    assert slow.complete == found.complete
    assert (slow.snapshots, slow.abandoned, slow.attempts) == (found.snapshots, found.abandoned, found.attempts)
    assert not slow.indexed
    assert [r.terms for r in plan(slow, [0.15])] == [r.terms for r in plan(found, [0.15])]


def test_a_run_on_every_kind_of_storage_is_opened_by_its_indexes(any_store_url: Target) -> None:
    store = Watched(put_on(any_store_url, 3, 3))
    found = open_run(store)
    assert [s.folder for s in found.complete] == FOLDERS[:3]
    assert store.manifests == {FOLDERS[2]}
    for loaded in (load_snapshots(store, FOLDERS[:3]), load_snapshots(store, reversed(FOLDERS[:3]))):
        assert {folder: s.manifests for folder, s in loaded.items()} == {s.folder: s.manifests for s in found.complete}
    with pytest.raises(KeyMissingError, match=r"snapshots/000000004000-a0/rank-00000-of-00003\.json"):
        load_snapshots(store, [FOLDERS[3]])


def test_what_is_known_is_not_read_again_when_an_index_appears(folder: Path) -> None:
    without_index(folder)
    store, known = Watched(open_store(folder)), Known()
    before = open_run(store, known)
    assert store.manifests == set(FOLDERS)
    write_index(store, before.complete[0])
    write_index(store, before.complete[0])  # it stays
    store.keys.clear()
    after = open_run(store, known)
    assert after.complete == before.complete
    assert (store.keys, list(after.indexed)) == (["run.json", "attempts/0.json"], [FOLDERS[0]])

    (folder / FOLDERS[1] / "sigma_rel-0.05/rank-00007.safetensors").unlink()
    store.keys.clear()
    assert [s.folder for s in open_run(store, known).complete] == [FOLDERS[0], *FOLDERS[2:]]
    assert store.manifests == {FOLDERS[1]}


def with_another_checksum(text: bytes) -> bytes:
    """One byte of what the index says of a shard."""
    position = text.index(b'"checksums":["') + len(b'"checksums":["')
    return text[:position] + (b"1" if text[position] == ord("0") else b"0") + text[position + 1 :]


def of_another_kind(text: bytes) -> bytes:
    return to_json(Attempt(0, None, 0, NUM_RANKS, "token"))


def with_manifests(change: Callable[[tuple[Any, ...]], Iterable[Any]]) -> Callable[[bytes], bytes]:
    return lambda text: to_json(Index(1, tuple(change(from_json(Index, text, "").manifests))))


DAMAGE = {
    "empty": lambda text: b"",
    "cut": lambda text: text[:-100],
    "noise": lambda text: text[:1000] + b"\xff\x00" + text[1002:],
    "no index": of_another_kind,
    "another checksum": with_another_checksum,
    "newer": lambda text: text.replace(b'"format":1', b'"format":2', 1),
    "a field more": lambda text: unsealed(text).replace(b'"rank":3,', b'"rank":3,"surprise":1,', 1),
    "another token": lambda text: unsealed(text).replace(big_run._TOKEN.encode(), b"fedcba9876543210"),
    "one other token": with_manifests(lambda m: (*m[:-1], replace(m[-1], token="other"))),  # noqa: S106
    "another attempt": with_manifests(lambda m: (replace(x, attempt=1) for x in m)),
    "another t": with_manifests(lambda m: (replace(x, t=2000) for x in m)),
    "a rank less": with_manifests(lambda m: m[:-1]),
    "a rank more": with_manifests(lambda m: (*m, m[-1])),
    "ranks in disorder": with_manifests(lambda m: (m[1], m[0], *m[2:])),
    "another size": with_manifests(
        lambda m: (replace(m[0], files=(replace(m[0].files[0], data_bytes=1), *m[0].files[1:])), *m[1:])
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_does_not_fit_is_not_believed(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = folder / FOLDERS[0] / "index.json"
    text = DAMAGE[damage](index.read_bytes())
    index.write_bytes(text)
    store = Watched(open_store(folder))
    found = open_run(store)
    assert store.manifests == {FOLDERS[0], FOLDERS[-1]}
    assert f"{FOLDERS[0]}: its index is not used" in caplog.text
    loaded = load_snapshots(store, [FOLDERS[0]]) if damage != "another size" else {}
    assert index.read_bytes() == text
    assert found.complete == without_index(folder).complete
    assert all(s.manifests == found.complete[0].manifests for s in loaded.values())


@pytest.mark.parametrize("indexed", [True, False])
def test_what_is_missing_cut_short_or_from_elsewhere_is_named(indexed: bool, folder: Path) -> None:
    if not indexed:
        without_index(folder)
    (folder / FOLDERS[0] / "sigma_rel-0.28/rank-00005.safetensors").unlink()
    cut = folder / FOLDERS[1] / "sigma_rel-0.05/rank-00006.safetensors"
    num_bytes = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-1])
    (folder / FOLDERS[2] / "rank-00007-of-00024.json").unlink()
    problems = {s.t: s.problem for s in open_run(open_store(folder)).snapshots}
    assert problems == {
        1000: "sigma_rel-0.28/rank-00005.safetensors of rank 5 is missing",
        2000: f"sigma_rel-0.05/rank-00006.safetensors of rank 6 has {num_bytes - 1} bytes instead of {num_bytes}",
        3000: "manifests of rank 7 of 24 are missing",
        4000: None,
        5000: None,
        6000: None,
    }
    assert "rank 5 is missing" in plan(open_run(open_store(folder)), [0.15])[0].certificate.left_out[0]


def test_manifests_of_another_job_or_without_files_are_named_by_everyone(folder: Path) -> None:
    store = open_store(folder)
    without_index(folder)
    for n, (old, new) in enumerate([(big_run._TOKEN, "fedcba9876543210"), ('"refused":null', '"refused":"nan"')]):
        path = folder / FOLDERS[n] / "rank-00004-of-00024.json"
        path.write_bytes(unsealed(path.read_bytes()).replace(old.encode(), new.encode()))
    wrong = {
        FOLDERS[0]: "the manifest of rank 4 was written by another job",
        FOLDERS[1]: "rank 4 had nothing to give: nan",
    }
    assert {s.folder: s.problem for s in open_run(store).snapshots if s.problem} == wrong
    for damaged, problem in wrong.items():
        with pytest.raises(SnapshotError, match=f"{damaged}: {problem}"):
            load_snapshots(store, [FOLDERS[3], damaged])
    with pytest.raises(SnapshotError, match="a snapshot's folder is like snapshots/000000001000-a0; got 'attempts/0'"):
        load_snapshots(store, ["attempts/0"])


def test_some_snapshots_are_read_without_a_listing(folder: Path) -> None:
    wanted = [FOLDERS[0], FOLDERS[3], FOLDERS[-1]]
    store = Watched(open_store(folder))
    loaded = load_snapshots(store, wanted)
    assert (store.num_lists, store.manifests) == (0, {FOLDERS[-1]})
    opened = {s.folder: s for s in open_run(open_store(folder)).complete}
    assert list(loaded) == wanted
    for name, snapshot in loaded.items():
        assert replace(opened[name], num_bytes=snapshot.num_bytes) == snapshot
        assert snapshot.num_bytes == sum(f.stat().st_size for f in (folder / name).glob("sigma_rel-*/*"))
    (folder / attempt_key(0)).unlink()
    with pytest.raises(KeyMissingError, match=r"attempts/0\.json"):
        load_snapshots(store, wanted)


@pytest.mark.parametrize("look", [open_run, find_run])
def test_a_snapshot_deleted_while_a_run_is_opened_is_not_in_it(look: Callable[[Any], Run], folder: Path) -> None:
    class Deleting(Watched):
        def get_many(self, keys: Iterable[str], *, absent_ok: bool = False) -> dict[str, bytes]:
            if not self.keys:
                delete_snapshot(self._store, FOLDERS[2])
            return super().get_many(keys, absent_ok=absent_ok)

    found = look(Deleting(open_store(folder)))
    assert [s.folder for s in found.snapshots] == [*FOLDERS[:2], *FOLDERS[3:]]


def test_where_there_is_no_run_none_is_found(tmp_path: Path) -> None:
    assert find_run(open_store(tmp_path)) is None
    with pytest.raises(RunError, match=r"must hold a run of phema-dist; there is no run\.json in it"):
        open_run(open_store(tmp_path))


def test_a_run_is_opened_without_torch(made: Path) -> None:
    code = (
        "import sys; from phema_dist.storage.run import open_run; from phema_dist.storage.store import open_store; "
        "assert open_run(open_store(sys.argv[1])).complete; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Damaged documents.


class Kept:
    """A run in memory, to be damaged."""

    url = "kept"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def describe(self, key: str) -> str:
        return f"{self.url}/{key}"

    def list(self, prefix: str = "") -> dict[str, int]:
        return {key: len(data) for key, data in sorted(self.files.items()) if key.startswith(prefix)}

    def get_many(self, keys: Iterable[str], *, absent_ok: bool = False) -> dict[str, bytes]:
        return {key: self.files[key] for key in keys if key in self.files or not absent_ok}


def kept(*, sealed: bool = True) -> Any:
    """Two ranks, two attempts; the first snapshot has an index, the third was abandoned."""
    files = dict(big_run.files(2, 3))
    del files[f"{FOLDERS[1]}/index.json"]
    info = from_json(RunInfo, files[RUN_KEY], "")
    tensors = info.tensors | {"n": TensorFacts((), "I64", "buffer")}
    files[RUN_KEY] = to_json(replace(info, tensors=tensors, aliases={"v": "w"}))
    files[attempt_key(1)] = to_json(Attempt(1, 0, 2000, 2, "token"))
    if not sealed:
        files |= {key: unsealed(data) for key, data in files.items() if key.endswith(".json")}
    return Kept(files)


INDEX = f"{FOLDERS[0]}/index.json"
LISTED = [RUN_KEY, attempt_key(0), attempt_key(1)]
UNLISTED = [f"{FOLDERS[1]}/rank-00000-of-00002.json", f"{FOLDERS[1]}/rank-00001-of-00002.json"]


def flipped(store: Any, key: str) -> Iterator[Any]:
    """The run with one byte of a document changed, each in its turn."""
    data = store.files[key]
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        yield Kept({**store.files, key: bytes(damaged)})


def facts_of(run: Run) -> Any:
    return run.info, run.attempts, run.snapshots, run.abandoned, run.pins, run.indexed


@pytest.mark.parametrize(
    ("key", "old", "new", "message"),
    [
        (
            RUN_KEY,
            b'"I64","kind":"buffer"',
            b'"I64","kind":"parameter"',
            "n is a parameter of dtype I64, which cannot be",
        ),
        (RUN_KEY, b'{"v":"w"}', b'{"v":"u"}', "v is to be the same as u, which is no tensor of the run"),
        (attempt_key(1), b'"number":1', b'"number":0', "is the record of another attempt, 0"),
    ],
)
def test_facts_that_do_not_fit_each_other_are_named_also_without_a_checksum(
    key: str, old: bytes, new: bytes, message: str
) -> None:
    store = kept(sealed=False)
    assert old in store.files[key]
    store.files[key] = store.files[key].replace(old, new)
    with pytest.raises(RunError, match=f"kept/{key}.* {message}"):
        open_run(store)


def test_a_manifest_with_too_few_checksums_is_of_no_snapshot() -> None:
    store, key = kept(), UNLISTED[1]
    manifest = from_json(Manifest, store.files[key], "")
    file = replace(manifest.files[0], checksums=manifest.files[0].checksums[:-1])
    store.files[key] = to_json(replace(manifest, files=(file, *manifest.files[1:])))
    problem = "sigma_rel-0.05/rank-00001.safetensors of rank 1 has 1 checksums instead of 2"
    assert [s.problem for s in open_run(store).snapshots] == [None, problem]


@pytest.mark.parametrize("key", LISTED)
def test_a_byte_that_changed_in_what_a_run_stands_on_is_an_error(key: str) -> None:
    for damaged in flipped(kept(), key):
        with pytest.raises(RunError, match=f"kept/{key} "):
            open_run(damaged)


def test_a_byte_that_changed_in_an_index_changes_nothing() -> None:
    store = kept()
    whole = open_run(store)
    assert ([s.t for s in whole.complete], [s.t for s in whole.abandoned]) == ([1000, 2000], [3000])
    assert all(facts_of(open_run(damaged)) == facts_of(whole) for damaged in flipped(store, INDEX))


@pytest.mark.parametrize("key", UNLISTED)
def test_a_byte_that_changed_in_a_manifest_costs_its_snapshot(key: str) -> None:
    store = kept()
    whole = open_run(store)
    for damaged in flipped(store, key):
        found = open_run(damaged)
        assert f"kept/{key} " in (found.snapshots[1].problem or "")
        assert found.complete == whole.complete[:1]
        assert facts_of(replace(found, snapshots=whole.snapshots)) == facts_of(whole)
    assert plan(found, [0.15])[0].t == 1000


@pytest.mark.parametrize("key", [*LISTED, *UNLISTED, INDEX])
def test_a_byte_that_changed_where_there_is_no_checksum_is_at_worst_an_error_of_ours(key: str) -> None:
    store, num_opened = kept(sealed=False), 0
    assert [s.manifests for s in open_run(store).complete] == [s.manifests for s in open_run(kept()).complete]
    for damaged in islice(flipped(store, key), 0, None, 1 if key in LISTED else 7):
        with contextlib.suppress(PhemaError):
            run = open_run(damaged)
            num_opened += 1
            plan(run, [0.15])
    assert num_opened


def test_phema_ls_stays_readable(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / FOLDERS[-1]).glob("rank-*.json"):
        path.unlink()
    assert main(["ls", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + NUM_SNAPSHOTS
    assert max(map(len, lines)) < 150
    assert lines[2].split()[:3] == ["1000", "0", "24"]
    assert lines[-1].endswith("incomplete: manifests of ranks 0, 1, 2, 3, 4, 5, 6, 7, … of 24 are missing")


# Listing on S3.


class Requests:
    """What is asked of S3, how much of it at once; `fail` may raise instead of asking."""

    def __init__(self, store: Any, fail: Callable[[dict[str, Any]], object] = lambda query: None) -> None:
        self.queries: list[dict[str, Any]] = []
        self.most = self._now = 0
        filesystem = store._client().filesystem
        call = filesystem._call_s3

        async def counted(method: str, *args: Any, **kwargs: Any) -> Any:
            query = {**kwargs, **(args[0] if args else {})}
            self.queries.append(query)
            fail(query)
            self._now += 1
            self.most = max(self.most, self._now)
            try:
                await asyncio.sleep(0.02)
                return await call(method, *args, **kwargs)
            finally:
                self._now -= 1

        filesystem._call_s3 = counted


@pytest.fixture
def paged(s3_url: Target) -> tuple[Any, dict[str, int]]:
    """A store with pages of ten keys, and what is in it."""
    url, options = s3_url
    store = open_store(url, options | {"s3_additional_kwargs": {"MaxKeys": 10}})
    keys = ["run.json", "attempts/0.json", "z", *(f"pins/{n}" for n in range(12))]
    keys += [f"snapshots/{n}/{name}" for n in range(12) for name in ("index.json", "a/1", "a/2")]
    keys += [f"snapshots/5/b/c/{n}" for n in range(21)]
    for key in keys:
        store.put(key, key.encode())
    return store, {key: len(key) for key in sorted(keys)}


@pytest.mark.s3
def test_a_long_listing_is_asked_for_by_folder_at_once(paged: tuple[Any, dict[str, int]]) -> None:
    store, keys = paged
    requests = Requests(store)
    assert list(store.list().items()) == list(keys.items())
    assert requests.most >= 10  # the folders of the snapshots
    assert len(requests.queries) <= 24
    assert store.list("snapshots") == {key: size for key, size in keys.items() if key.startswith("snapshots/")}
    assert store.list("snapshots/5") == {key: size for key, size in keys.items() if key.startswith("snapshots/5/")}
    requests.queries.clear()
    assert store.list("snapshots/4") == {key: size for key, size in keys.items() if key.startswith("snapshots/4/")}
    assert store.list("attempts") == {"attempts/0.json": 15}
    assert store.list("nothing") == {}
    assert len(requests.queries) == 3
    store.put("snapshots/3/new", b"1")
    assert store.list() == keys | {"snapshots/3/new": 1}


@pytest.mark.s3
def test_a_page_that_fails_is_asked_for_again_alone(paged: tuple[Any, dict[str, int]]) -> None:
    store, keys = paged
    failed = []

    def fail(query: dict[str, Any]) -> None:
        if query["Prefix"].endswith("/snapshots/7/") and len(failed) < 2:
            failed.append(query)
            raise ConnectionResetError

    Requests(store, fail)
    assert store.list() == keys
    assert len(failed) == 2


@pytest.mark.s3
@pytest.mark.parametrize(
    ("error", "kind"), [(PermissionError("no"), AccessError), (FileNotFoundError("gone"), KeyMissingError)]
)
def test_a_page_that_is_refused_is_an_error(
    paged: tuple[Any, dict[str, int]], error: OSError, kind: type[StorageError]
) -> None:
    store, _ = paged

    def fail(query: dict[str, Any]) -> None:
        if query["Prefix"].endswith("/snapshots/7/"):
            raise error

    Requests(store, fail)
    with pytest.raises(kind, match=f"listing {store.url}: "):
        store.list()


# What rank 0 leaves.


def train(url: str, options: dict[str, Any], num_steps: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = {"update_every": 1, "checkpoint_every": 5, "storage_options": options, **settings}
    with PostHocEMA.from_model(nn.Linear(4, 4), url, **settings) as ema:
        for step in range(1, num_steps + 1):
            ema.update_()
            ema._session.writer.drain()
            if step % 5 == 0 and dist.is_initialized():
                dist.barrier()  # so that it is known which one is the newest complete one


def indexes_of(store: Store) -> dict[str, Index]:
    keys = [key for key in store.list() if key.endswith("/index.json")]
    return {key.removesuffix("/index.json"): from_json(Index, store.get(key), key) for key in keys}


def test_rank_0_joins_the_manifests_of_all_but_the_newest_snapshot(any_store_url: Target) -> None:
    on_ranks(2, train, *any_store_url, 20, {})
    store = open_store(*any_store_url)
    found = open_run(store)
    assert [s.t for s in found.complete] == [5, 10, 15, 20]
    indexes = indexes_of(store)
    # Rank 0 wrote 20 when 15, at least, was complete; 20 was when the other rank had written it too.
    assert [s.folder for s in found.complete[:2]] == list(indexes)[:2]
    assert found.complete[3].folder not in indexes
    for snapshot in found.complete:
        if snapshot.folder in indexes:
            assert indexes[snapshot.folder].manifests == snapshot.manifests


def test_a_resumed_job_joins_what_the_one_before_left(tmp_path: Path) -> None:
    train(str(tmp_path / "run"), {}, 10, {})
    assert sorted(indexes_of(open_store(tmp_path / "run"))) == ["snapshots/000000000005-a0"]
    train(str(tmp_path / "run"), {}, 10, {"resume": True})
    names = ["05-a0", "10-a0", "15-a1", "20-a1"]
    assert [s.folder[-5:] for s in open_run(open_store(tmp_path / "run")).complete] == names
    assert [folder[-5:] for folder in sorted(indexes_of(open_store(tmp_path / "run")))] == names[:-1]


def test_an_index_that_cannot_be_stored_costs_nothing_and_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, failed = LocalStore.put, []

    def put(self: LocalStore, key: str, data: bytes | bytearray) -> None:
        if key.endswith("index.json") and len(failed) < 2:
            failed.append(key)
            raise StorageError("no space for the index")
        original(self, key, data)

    monkeypatch.setattr(LocalStore, "put", put)
    caplog.set_level(logging.DEBUG, "phema_dist")
    ema = PostHocEMA.from_model(nn.Linear(4, 4), tmp_path / "run", update_every=1, checkpoint_every=5)
    for _ in range(25):
        ema.update_()
        ema._session.writer.drain()
    ema.close()
    assert failed == ["snapshots/000000000005-a0/index.json"] * 2
    assert (ema._session.writer.counts.failed, ema._session.writer.counts.last_error) == (0, None)
    assert [r.levelname for r in caplog.records if "no space for the index" in r.getMessage()] == ["DEBUG"] * 2
    assert len(indexes_of(open_store(tmp_path / "run"))) == 4


def test_retention_deletes_the_index_first_and_a_killed_one_leaves_a_run_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, deleted = LocalStore.delete, []

    def delete(self: LocalStore, keys: Iterable[str]) -> None:
        keys = list(keys)
        deleted.append(keys)
        original(self, keys)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", delete)
        train(str(tmp_path / "run"), {}, 40, {"max_checkpoints": 3})
    assert [keys for keys in deleted if any("index" in key for key in keys)]
    for keys in deleted:
        assert [key for key in keys if key.endswith("/index.json")] in ([], keys)
    found = open_run(open_store(tmp_path / "run"))
    assert set(indexes_of(found.store)) == {s.folder for s in found.complete[:-1]}

    victim = found.complete[0]
    deleted.clear()
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", lambda self, keys: deleted.append(list(keys)))
        delete_snapshot(found.store, victim.folder)
    order = [key for keys in deleted for key in keys]
    assert order[0] == f"{victim.folder}/index.json"
    assert order[1].endswith("of-00001.json")
    for n, key in enumerate(order[:-1]):  # killed after each of them
        found.store.delete([key])
        left = open_run(found.store)
        assert (victim in left.complete) == (n == 0)
        assert left.complete[-1] == found.complete[-1]


def test_what_an_index_alone_is_left_of_is_no_snapshot_and_goes(tmp_path: Path) -> None:
    train(str(tmp_path / "run"), {}, 20, {})
    store = open_store(tmp_path / "run")
    kept = indexes_of(store)
    (folder, index), *_ = sorted(kept.items())
    delete_snapshot(store, folder)
    store.put(f"{folder}/index.json", to_json(index))  # an older job did not know
    left = open_run(store)
    assert [(s.folder, s.unfinished) for s in left.snapshots if s.problem] == [(folder, True)]
    train(str(tmp_path / "run"), {}, 10, {"resume": True})
    assert folder not in indexes_of(store)


def test_a_superseded_attempt_writes_no_index(tmp_path: Path) -> None:
    train(str(tmp_path / "run"), {}, 15, {})
    found = without_index(tmp_path / "run")
    place = Place(found.store, found.attempts[0], 0, (0.05, 0.28), 0, 20, 5)
    start_attempt(found.store, 1, 1, 0, 15)
    with pytest.raises(RunError, match=r"attempt 0 of .* is superseded by attempt 1"):
        tidy(place, 15, {}, set(), set())
    assert indexes_of(found.store) == {}
    tidy(replace(place, attempt=open_run(found.store).attempts[1]), 15, {}, set(), set())
    assert len(indexes_of(found.store)) == 2
