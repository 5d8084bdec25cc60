"""What every store promises, asked of each: a local disk, fsspec's memory, a real S3 server. Then what is special."""

import asyncio
import errno
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from chaos_proxy import ChaosProxy
from s3_server import READER, S3Server

from phema_dist.errors import AccessError, KeyExistsError, KeyMissingError, SettingsError, StorageError
from phema_dist.storage import carrier
from phema_dist.storage.store import Store, open_store

MIB = 2**20


S3_CLIENTS = [pytest.param(client, marks=pytest.mark.s3) for client in ("s3fs", "obstore")]


@pytest.fixture(params=["local", "memory", *S3_CLIENTS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param in {"s3fs", "obstore"}:
        url, options = request.getfixturevalue("s3_url")
        return open_store(url, options | {"client": request.param})
    return open_store(f"memory://{tmp_path.name}/run" if request.param == "memory" else tmp_path / "run")


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[ChaosProxy]:
    with ChaosProxy(s3_server.address) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No extra time for the bytes of big objects, so that a test need not wait for it."""
    for module in ("remote", "s3"):
        monkeypatch.setattr(f"phema_dist.storage.{module}.SLOWEST_BYTES_PER_SECOND", 2**40)
        monkeypatch.setattr(f"phema_dist.storage.{module}.ABORT_SECONDS", 1.0)


def read(store: Store, key: str, start: int, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    store.read_into(key, start, memoryview(buffer))
    return bytes(buffer)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The contract.


def test_what_is_put_is_got_whole_and_in_ranges(store: Store) -> None:
    store.put("run.json", b"0123456789")
    store.put("a/b/c.bin", bytearray(b"nested"))
    assert store.get("run.json") == b"0123456789"
    assert store.get("a/b/c.bin") == b"nested"
    assert read(store, "run.json", 0, 10) == b"0123456789"
    assert read(store, "run.json", 3, 4) == b"3456"
    assert read(store, "run.json", 9, 1) == b"9"


def test_many_are_got_by_one_call_and_a_missing_one_is_named(store: Store) -> None:
    objects = {f"manifests/{number}": b"%d" % number for number in range(70)}
    for key, data in objects.items():
        store.put(key, data)
    assert store.get_many(objects) == objects
    assert store.get_many([]) == {}
    with pytest.raises(KeyMissingError, match="/run/manifests/70: "):
        store.get_many([*objects, "manifests/70"])


def test_an_empty_object_exists(store: Store) -> None:
    store.put("pins/16000", b"")
    assert store.get("pins/16000") == b""
    assert store.list() == {"pins/16000": 0}
    assert read(store, "pins/16000", 0, 0) == b""


def test_list_finds_every_key_below_a_folder_with_its_size(store: Store) -> None:
    assert store.list() == {}
    for key in ("run.json", "a/1", "a/b/2", "ab/3"):
        store.put(key, key.encode())
    assert store.list() == {"a/1": 3, "a/b/2": 5, "ab/3": 4, "run.json": 8}
    assert store.list("a") == store.list("a/") == {"a/1": 3, "a/b/2": 5}
    assert store.list("a/b") == {"a/b/2": 5}
    assert store.list("nothing") == {}


def test_list_is_never_from_a_cache(any_store_url: tuple[str, dict[str, Any]]) -> None:
    one, other = open_store(*any_store_url), open_store(*any_store_url)
    assert one.list() == one.list("a") == {}
    other.put("a/1", b"1")
    assert one.list() == one.list("a") == {"a/1": 1}
    other.delete(["a/1"])
    assert one.list() == {}


def test_nothing_is_overwritten(store: Store) -> None:
    store.put("a/1", b"first")
    for data in (b"second", b"first", b""):
        with pytest.raises(KeyExistsError, match=r"writing .*/run/a/1: it exists already"):
            store.put("a/1", data)
    assert store.get("a/1") == b"first"
    assert store.list() == {"a/1": 5}


def test_of_racing_creators_exactly_one_wins(store: Store) -> None:
    start = threading.Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        try:
            store.put("attempts/0.json", b"%d" % number)
        except KeyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert store.get("attempts/0.json") == b"%d" % won.index(True)


def test_a_missing_key_is_named(store: Store) -> None:
    store.put("folder/file", b"1")
    for key in ("nothing", "no/thing", "folder", "folder/file/below"):
        with pytest.raises(KeyMissingError, match=f"reading .*/run/{key}: "):
            store.get(key)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(store, "nothing", 0, 1)


def test_a_short_read_says_what_was_wanted_and_got(store: Store) -> None:
    store.put("a/1", b"12345")
    for start, got in ((0, 5), (3, 2), (5, 0), (99, 0)):
        with pytest.raises(StorageError, match=rf"/run/a/1: wanted 6 bytes from byte {start}, got {got}: .*too short"):
            read(store, "a/1", start, 6)


def test_delete_removes_what_is_there_and_forgives_what_is_not(store: Store) -> None:
    for number in range(70):
        store.put(f"old/{number}", b"1")
    store.put("new", b"1")
    store.delete(["absent", "no/folder", *(f"old/{number}" for number in range(70))])
    assert store.list() == {"new": 1}
    store.put("old/1", b"again")
    assert store.get("old/1") == b"again"


def test_big_objects_survive_many_threads(any_store_url: tuple[str, dict[str, Any]]) -> None:
    store = open_store(*any_store_url)
    data = bytearray(os.urandom(40 * MIB + 17))  # three parts on S3, the last one short
    store.put("big", data)
    with pytest.raises(KeyExistsError):
        store.put("big", bytearray(33 * MIB))
    assert store.list() == {"big": len(data)}
    buffer = bytearray(len(data))
    starts = range(0, len(data), 4 * MIB)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: store.read_into("big", at, memoryview(buffer)[at : at + 4 * MIB]), starts))
    assert buffer == data
    assert store.get("big") == data


def test_a_key_stays_below_the_store(store: Store) -> None:
    for key in ("", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/.b"):
        for verb in (store.get, lambda key: store.put(key, b""), lambda key: store.delete([key])):
            with pytest.raises(SettingsError, match="a key is a relative name"):
                verb(key)


def test_a_forked_child_makes_its_own_client(store: Store) -> None:
    data = os.urandom(5 * MIB)  # carried by obstore, where it is used
    store.put("parent", data)
    assert read(store, "parent", 0, 5 * MIB) == data
    child = os.fork()
    if child == 0:  # never return into pytest
        signal.alarm(30)
        ok = False
        try:
            ok = read(store, "parent", 0, 5 * MIB) == data
            if not store.url.startswith("/"):
                store.put("child", data)
                ok &= store.get("child") == data and list(store._clients)[1:] == [os.getpid()]
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert read(store, "parent", 0, 5 * MIB) == data


def test_unfinished_puts_are_listed_and_discarded_one_by_one(any_store_url: tuple[str, dict[str, Any]]) -> None:
    url, options = any_store_url
    store, other = open_store(url, options), open_store(f"{url}-2", options)
    assert store.unfinished() == {}
    store.put("old/b", b"1")
    for folder, key in (("", "old/a"), ("", "old/b"), ("-2", "old/a")):
        begin_put(f"{url}{folder}", key, options)
    one, two = store.unfinished()
    found = sorted(store.unfinished().values())
    assert found == ["old/a", "old/b"] if options else all(re.fullmatch(r"old/\..*tmp", path) for path in found)
    store.discard([one])
    assert list(store.unfinished()) == [two]
    store.discard([one, two])  # one is gone already
    assert store.unfinished() == {}
    assert len(other.unfinished()) == 1
    assert store.list() == {"old/b": 1}


def begin_put(url: str, key: str, options: dict[str, Any]) -> None:
    """Leave what a put leaves whose process was killed."""
    if not options:
        path = Path(f"{url}/{key}").parent / f".{os.urandom(8).hex()}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        return
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    bucket, _, folder = url.removeprefix("s3://").partition("/")
    filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{folder}/{key}")


# Opening.


def test_paths_and_file_urls_are_the_local_disk(tmp_path: Path) -> None:
    for url in (tmp_path, str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}/"):
        store = open_store(url)
        assert (store.url, store.describe("a/b")) == (str(tmp_path), f"{tmp_path}/a/b")
        assert store.read_concurrency >= 1
    assert list(tmp_path.iterdir()) == []


def test_a_url_keeps_its_slashes_and_loses_its_credentials() -> None:
    store = open_store("s3://bucket/a//b/")
    assert store.url == "s3://bucket/a//b"
    assert store.describe("k") == "s3://bucket/a//b/k"
    assert store.read_concurrency == 16
    assert open_store("https://user:secret@host/run").url == "https://host/run"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense://bucket/run", "Protocol not known: nonsense"),
        ("simplecache::s3://bucket/run", "chained URL"),
        (Path("s3://bucket/run"), "lost a slash"),
        ("s3://", "must name a bucket"),
        ("s3:///run", "must name a bucket"),
        ("s3://bucket/run?versionId=3", "no version of their own"),
    ],
)
def test_a_url_that_cannot_work_says_so(url: str | Path, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        open_store(url)


def test_without_s3fs_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SettingsError, match=re.escape("install phema-dist with its extra [s3]")):
        open_store("s3://bucket/run")


def test_storage_options_win_over_our_defaults() -> None:
    options = {
        "key": "k",
        "secret": "s",
        "endpoint_url": "http://127.0.0.1:9",
        "client_kwargs": {"region_name": "eu-central-1"},
        "config_kwargs": {"read_timeout": 7, "signature_version": "s3v4"},
    }
    filesystem = open_store("s3://bucket/run", options)._client().filesystem
    assert (filesystem.key, filesystem.secret, filesystem.endpoint_url) == ("k", "s", "http://127.0.0.1:9")
    assert filesystem.client_kwargs == {"region_name": "eu-central-1"}
    assert filesystem.config_kwargs["read_timeout"] == 7
    assert filesystem.config_kwargs["signature_version"] == "s3v4"
    assert filesystem.config_kwargs["connect_timeout"] == 5
    assert filesystem.config_kwargs["max_pool_connections"] == 64


@pytest.mark.parametrize(
    ("options", "is_installed", "says"),
    [
        ({"client": "boto3"}, True, 'client must be "obstore" or "s3fs"; got \'boto3\''),
        ({"client": "obstore"}, False, "not installed: install phema-dist with its extra [s3]"),
    ],
)
def test_a_client_that_is_not_there_is_a_settings_error(
    options: dict[str, Any], is_installed: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrier, "installed", lambda: is_installed)
    with pytest.raises(SettingsError, match=re.escape(says)):
        open_store("s3://bucket/run", options)


def test_obstore_is_the_default_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):  # obstore would not know that certificate
        monkeypatch.delenv(name, raising=False)
    assert open_store("s3://bucket/run")._carries()
    assert not open_store("s3://bucket/run", {"client": "s3fs"})._carries()
    assert not open_store("s3://bucket/run", {"client_kwargs": {"verify": "/ca.pem"}})._carries()
    assert "allow_invalid_certificates" not in carrier.opened("https://bucket/run", 1.0).client_options
    monkeypatch.setitem(sys.modules, "obstore", None)
    carrier.installed.cache_clear()
    assert not open_store("s3://bucket/run")._carries()
    monkeypatch.undo()
    carrier.installed.cache_clear()


# The local disk.


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"writing .*/big: the disk answered: No space left on device\."):
        store.put("big", b"1" * MIB)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_write_is_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = open_store(tmp_path), []
    link = os.link
    monkeypatch.setattr(os, "link", lambda *paths: (seen.append((names(tmp_path), store.list())), link(*paths)))
    store.put("a", b"1")
    [(files, keys)] = seen
    assert len(files) == 1
    assert keys == {}
    assert names(tmp_path) == ["a"]


def test_without_hard_links_nothing_is_overwritten_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = open_store(tmp_path)
    store.put("a", b"1")
    with pytest.raises(KeyExistsError):
        store.put("a", b"2")
    assert (store.get("a"), names(tmp_path)) == (b"1", ["a"])


def test_a_link_whose_reply_was_lost_counts_as_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_then_complain(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", link_then_complain)
    store = open_store(tmp_path)
    store.put("a", b"1")
    assert (store.get("a"), names(tmp_path)) == (b"1", ["a"])


def test_a_folder_that_refuses_is_an_access_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # a mode would not stop root, whom containers run as
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AccessError, match="check the owner and mode"):
        open_store(tmp_path).put("a", b"1")


# S3: what users get wrong.


def every_verb(store: Store) -> Iterator[Any]:
    yield store.list
    yield lambda: store.get("a")
    yield lambda: store.get_many(["a"])
    yield lambda: read(store, "a", 0, 1)
    yield lambda: store.put("a", b"1")
    yield lambda: store.put("big", bytearray(33 * MIB))
    yield lambda: store.delete(["a"])


@pytest.mark.s3
def test_wrong_credentials_are_refused_at_once_and_not_shown(s3_url: tuple[str, dict[str, Any]]) -> None:
    url, options = s3_url
    options = {**options, "secret": "not-the-secret"}
    begin = time.monotonic()
    for verb in every_verb(open_store(url, options)):
        with pytest.raises(AccessError, match=f"{url}.*check the credentials") as caught:
            verb()
        assert "not-the-secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 40  # or it is repeated until the deadline of each


def test_a_credential_in_an_error_is_masked() -> None:
    store = open_store("s3://bucket/run", {"client_kwargs": {"aws_secret_access_key": "hush-hush"}})
    said = store.said(ValueError("Invalid\nsecret: hush-hush."))
    assert said == "ValueError: Invalid secret: ***"


@pytest.mark.s3
def test_a_missing_bucket_is_named_and_never_made(s3_server: S3Server) -> None:
    store = open_store("s3://mistyped-bucket/run", s3_server.options())
    *verbs, delete = every_verb(store)
    for verb in verbs:
        with pytest.raises(KeyMissingError, match=r"s3://mistyped-bucket/run.*bucket does not exist"):
            verb()
    delete()  # absent keys are fine
    assert not s3_server.filesystem().exists("mistyped-bucket")


@pytest.mark.s3
def test_who_may_only_read_can_read(s3_server: S3Server, s3_url: tuple[str, dict[str, Any]]) -> None:
    url, options = s3_url
    open_store(url, options).put("a", b"1")
    store = open_store(url, s3_server.options(READER))
    assert (store.list(), store.get("a"), read(store, "a", 0, 1)) == ({"a": 1}, b"1", b"1")
    for write in (lambda: store.put("b", b"1"), lambda: store.put("big", bytearray(33 * MIB))):
        with pytest.raises(AccessError, match=f"writing {url}"):
            write()
    with pytest.raises(AccessError, match=f"deleting {url}/a"):
        store.delete(["a"])
    assert open_store(url, options).list() == {"a": 1}


@pytest.mark.s3
@pytest.mark.parametrize("wrong", [{"nonsense": 1}, {"endpoint_url": "localhost:9000"}])
def test_an_option_that_cannot_work_is_a_settings_error(s3_server: S3Server, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="check URL and storage_options"):
        open_store("s3://bucket/run", s3_server.options() | wrong).list()


@pytest.mark.s3
def test_the_usual_environment_is_enough(s3_url: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, options = s3_url
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
    store = open_store(url)
    store.put("a", b"1")
    assert store.list() == {"a": 1}


@pytest.mark.s3
def test_a_long_listing_comes_in_pages(s3_url: tuple[str, dict[str, Any]]) -> None:
    url, options = s3_url
    store = open_store(url, options | {"s3_additional_kwargs": {"MaxKeys": 10}})
    keys = {f"pages/{number}": 1 for number in range(25)}
    for key in keys:
        store.put(key, b"1")
    assert store.list("pages") == keys


# S3: what networks do.


def num_uploads(server: S3Server, url: str) -> int:
    return len(server.filesystem().list_multipart_uploads(url.split("/")[2]))


@pytest.mark.s3
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["refuse", "black_hole"])
def test_an_endpoint_that_does_not_answer_is_one_error_in_time(
    proxy: ChaosProxy, s3_server: S3Server, s3_url: tuple[str, dict[str, Any]], fault: str
) -> None:
    store = open_store(s3_url[0], s3_server.options(endpoint=proxy.endpoint), deadline_seconds=1)
    setattr(proxy, fault, True)

    def seconds(verb: Any) -> float:
        begin = time.monotonic()
        with pytest.raises(StorageError, match="check that the endpoint is reachable") as caught:
            verb()
        assert type(caught.value) is StorageError
        return time.monotonic() - begin

    with ThreadPoolExecutor(7) as pool:  # none waits for another
        assert max(pool.map(seconds, every_verb(store))) < 25


@pytest.fixture(params=S3_CLIENTS)
def far(request: pytest.FixtureRequest, proxy: ChaosProxy, s3_server: S3Server) -> dict[str, Any]:
    """Options for the way through the proxy, once by each client."""
    return s3_server.options(endpoint=proxy.endpoint) | {"client": request.param}


def test_a_connection_cut_in_a_put_is_made_good(
    proxy: ChaosProxy, s3_server: S3Server, s3_url: tuple[str, dict[str, Any]], far: dict[str, Any]
) -> None:
    store = open_store(s3_url[0], far)
    for num_bytes in (8 * MIB, 40 * MIB):
        proxy.cut_after_bytes, proxy.cuts_left = 3 * MIB, 2
        data = os.urandom(num_bytes)
        store.put(f"{num_bytes}", data)
        assert proxy.cuts_left == 0
        proxy.cut_after_bytes = None
        assert store.get(f"{num_bytes}") == data
    assert num_uploads(s3_server, s3_url[0]) == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("num_bytes", [8 * MIB, 40 * MIB])
def test_a_put_cut_for_good_leaves_nothing_and_harms_nothing(
    proxy: ChaosProxy, s3_server: S3Server, s3_url: tuple[str, dict[str, Any]], num_bytes: int, far: dict[str, Any]
) -> None:
    store = open_store(s3_url[0], far)
    store.put("old", b"old")
    proxy.cut_after_bytes, proxy.cuts_left = 3 * MIB, 10**9
    with pytest.raises(StorageError, match=r"writing .*/new: failed after"):
        open_store(s3_url[0], far, deadline_seconds=1).put("new", os.urandom(num_bytes))
    proxy.cut_after_bytes = None
    assert store.list() == {"old": 3}
    assert store.get("old") == b"old"
    assert num_uploads(s3_server, s3_url[0]) == 0
    store.put("new", b"new")
    assert store.get("new") == b"new"


@pytest.mark.usefixtures("impatient")
def test_a_put_that_hangs_midway_ends_and_its_upload_is_aborted(
    proxy: ChaosProxy,
    s3_server: S3Server,
    s3_url: tuple[str, dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    far: dict[str, Any],
) -> None:
    store = open_store(s3_url[0], far, deadline_seconds=1)
    proxy.bytes_per_second = 2 * MIB  # far too slow for the deadline: it is cancelled in the middle of its parts
    with pytest.raises(StorageError, match=r"writing .*/slow: failed after"):
        store.put("slow", bytearray(40 * MIB))
    assert num_uploads(s3_server, s3_url[0]) == 0
    proxy.bytes_per_second = 0
    silence = threading.Timer(0.5, lambda: setattr(proxy, "black_hole", True))
    proxy.bytes_per_second = 2 * MIB
    silence.start()
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, "phema_dist"), pytest.raises(StorageError):
        store.put("hung", bytearray(40 * MIB))
    silence.join()
    assert time.monotonic() - begin < 15
    assert "could not abort an upload" in caplog.text
    assert open_store(*s3_url).list() == {}


@pytest.mark.usefixtures("impatient")
def test_an_upload_whose_beginning_is_answered_after_the_deadline_is_aborted(
    proxy: ChaosProxy,
    s3_server: S3Server,
    s3_url: tuple[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    far: dict[str, Any],
) -> None:
    for module in ("remote", "s3"):
        monkeypatch.setattr(f"phema_dist.storage.{module}.ABORT_SECONDS", 10.0)
    store = open_store(s3_url[0], far, deadline_seconds=1)  # of a put: 3/2 seconds a try
    proxy.latency_seconds = 1.0  # each way
    with pytest.raises(StorageError, match=r"writing .*/late: failed after"):
        store.put("late", bytearray(40 * MIB))
    assert any("POST" in request and "uploads" in request for request in proxy.requests)
    assert num_uploads(s3_server, s3_url[0]) == 0


@pytest.mark.parametrize(
    ("num_bytes", "request_line"), [(1000, rb"PUT "), (40 * MIB, rb"POST \S*uploadId=")], ids=["one", "parts"]
)
def test_a_put_whose_reply_is_lost_succeeds_if_the_bytes_are_there(
    proxy: ChaosProxy, s3_url: tuple[str, dict[str, Any]], num_bytes: int, request_line: bytes, far: dict[str, Any]
) -> None:
    store = open_store(s3_url[0], far)
    proxy.lose_reply_to = re.compile(request_line)
    data = os.urandom(num_bytes)
    store.put("a", data)
    assert proxy.lose_reply_to is None
    assert store.get("a") == data
    proxy.lose_reply_to = re.compile(request_line)
    with pytest.raises(KeyExistsError):  # the retry meets an object, and it is not ours
        store.put("a", os.urandom(num_bytes))
    assert store.get("a") == data


def test_reads_over_a_lossy_line_are_whole(
    proxy: ChaosProxy, s3_url: tuple[str, dict[str, Any]], far: dict[str, Any]
) -> None:
    store = open_store(s3_url[0], far)
    data = os.urandom(4 * MIB)
    store.put("a", data)
    proxy.latency_seconds = 0.002
    for _ in range(3):
        proxy.lose_reply_to = re.compile(rb"GET ")
        assert read(store, "a", MIB, 2 * MIB) == data[MIB : 3 * MIB]
        assert proxy.lose_reply_to is None


# S3: what is asked of it, and by whom.


def test_a_put_takes_few_requests_and_obstore_carries_what_is_big(
    proxy: ChaosProxy, s3_url: tuple[str, dict[str, Any]], far: dict[str, Any]
) -> None:
    store, carries = open_store(s3_url[0], far), far["client"] == "obstore"
    store.put("small", b"1" * MIB)
    assert [line.split()[0] for line in proxy.requests] == ["PUT"]
    data = bytearray(os.urandom(70 * MIB))
    proxy.requests.clear()
    store.put("big", data)
    parts = [line for line in proxy.requests if "partNumber=" in line]
    assert len(parts) == (2 if carries else 5)
    assert len(proxy.requests) == len(parts) + 2
    assert all(("X-Amz-Signature" in line) == carries for line in parts)
    proxy.requests.clear()
    for start in (0, 63 * MIB + 1, 69 * MIB):
        assert read(store, "big", start, MIB) == data[start : start + MIB]
    assert len(proxy.requests) == 3
    assert all(("X-Amz-Signature" in line) == carries for line in proxy.requests)


@pytest.mark.s3
def test_only_the_first_big_put_in_a_while_waits_for_a_moment(
    s3_url: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    monkeypatch.setattr("phema_dist.storage.s3.random.uniform", lambda *between: waits.append(between) or 0)
    store = open_store(*s3_url)
    for key, num_bytes, num_waits in (("a", 1, 0), ("b", 5 * MIB, 1), ("c", 5 * MIB, 1), ("d", 1, 1)):
        store.put(key, bytearray(num_bytes))
        assert len(waits) == num_waits
    store._busy_until = 0.0
    store.put("e", bytearray(5 * MIB))
    assert waits == [(0, 0.25)] * 2


@pytest.mark.s3
def test_what_obstore_cannot_do_s3fs_does(
    s3_url: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(*s3_url)

    def failing(message: str) -> Any:
        async def fail(*_: object) -> Any:
            raise RuntimeError(f"http://host/?X-Amz-Credential=hush: {message}")

        return fail

    data = os.urandom(9 * MIB)
    with caplog.at_level(logging.DEBUG, "phema_dist"):
        for attempt, message in enumerate(("connection reset", "non-2xx status code: 403 Forbidden")):
            assert store._carries()
            for verb in ("send", "fetch"):
                monkeypatch.setattr(carrier, verb, failing(message))
            store.put(f"{attempt}", data)
            assert read(store, f"{attempt}", 1, 2 * MIB) == data[1 : 1 + 2 * MIB]
    assert not store._carries()  # a server that refuses signed URLs is asked for no more of them
    assert "obstore failed" in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.s3
def test_where_obstore_stalls_s3fs_has_half_of_the_time(
    s3_url: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(*s3_url, deadline_seconds=4)
    data = os.urandom(5 * MIB)
    store.put("a", data)

    async def stall(*_: object) -> Any:
        await asyncio.sleep(1000)

    monkeypatch.setattr(carrier, "fetch", stall)
    with caplog.at_level(logging.DEBUG, "phema_dist"):
        assert read(store, "a", 1, 2 * MIB) == data[1 : 1 + 2 * MIB]
    assert caplog.text.count("obstore failed to read (TimeoutError)") == 1  # in the first try


@pytest.mark.s3
@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_a_profile_of_the_aws_files_is_enough(
    s3_url: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    url, options = s3_url
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id=x\naws_secret_access_key=y\n\n"
        f"[runs]\naws_access_key_id={options['key']}\naws_secret_access_key={options['secret']}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", options["endpoint_url"])
    carried = []
    send = carrier.send
    monkeypatch.setattr(carrier, "send", lambda *args: carried.append(1) or send(*args))
    store = open_store(url, {"profile": "runs", "client": client})
    store.put("a", os.urandom(5 * MIB))
    assert store.list() == {"a": 5 * MIB}
    assert len(carried) == (client == "obstore")
    for refused in ({}, {"anon": True}):
        with pytest.raises(AccessError):
            open_store(url, {"client": client, **refused}).put("b", b"1")


@pytest.mark.s3
def test_an_odd_answer_is_no_settings_error_once_the_store_has_worked(
    s3_url: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, options = s3_url
    store, new = (open_store(url, options | {"client": "s3fs"}) for _ in range(2))
    store.put("a", b"1")
    store.deadline_seconds = new.deadline_seconds = 0.5

    async def stumble(*_: object, **__: object) -> None:
        raise KeyError("ETag")

    for each in (store, new):
        filesystem = each._client().filesystem
        for verb in ("_cat_file", "_pipe_file", "_call_s3"):
            monkeypatch.setattr(filesystem, verb, stumble)
    for verb in (lambda s: s.get("a"), lambda s: s.put("b", b"1"), lambda s: read(s, "a", 0, 1), lambda s: s.list()):
        with pytest.raises(StorageError, match="KeyError: 'ETag'"):
            verb(store)
        with pytest.raises(SettingsError, match="KeyError: 'ETag'"):
            verb(new)


@pytest.mark.s3
def test_an_upload_that_is_gone_is_discarded_at_once(s3_url: tuple[str, dict[str, Any]]) -> None:
    url, options = s3_url
    store = open_store(url, options)
    begin_put(url, "old/a", options)
    (handle,) = store.unfinished()
    store.discard([handle])
    begin = time.monotonic()
    store.discard([handle])
    assert time.monotonic() - begin < 25  # it was repeated until the deadline


@pytest.mark.s3
def test_ranges_take_few_connections(s3_url: tuple[str, dict[str, Any]]) -> None:
    url, options = s3_url
    store = open_store(url, {**options, "client": "obstore"})
    for number in range(60):
        store.put(f"file-{number}", bytes(64_000))
    before = len(list(Path("/proc/self/fd").iterdir()))

    def read(i: int) -> None:
        store.read_into(f"file-{i // 8}", i % 8 * 8000, memoryview(bytearray(8000)))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(60 * 8)))
        assert len(list(Path("/proc/self/fd").iterdir())) < before + 150  # once 700


def test_a_rate_limit_is_no_refusal() -> None:
    said = "Server returned non-2xx status code: {}: body"
    assert [carrier.refused(RuntimeError(said.format(code))) for code in (403, 408, 409, 429, 503)] == [
        True, False, False, False, False,
    ]  # fmt: skip


def test_a_local_folder_takes_no_storage_options(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="storage_options are for object stores"):
        open_store(tmp_path, {"endpoint_url": "http://x"})
