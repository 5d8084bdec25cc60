# Paths stay strings here: building a Path costs more than a small read.
# ruff: noqa: PTH100, PTH102, PTH104, PTH106, PTH108, PTH111, PTH120, PTH123, PTH208
"""Bytes at a URL: the contract of every store, and the store on a local disk.

A store holds objects under keys: names relative to its url, separated by `/`, no part of them beginning with a
dot. It knows nothing of snapshots. What every store promises, and one contract test asks of each:

- an object is visible whole or not at all, and is never overwritten;
- a verb ends: with its result, or with an error of `phema_dist.errors` that says what was attempted on which
  object, what the store answered and what to do next, and never holds a credential;
- verbs may be called from any thread, and in a forked child.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from phema_dist.errors import AccessError, KeyExistsError, KeyMissingError, PhemaError, SettingsError, StorageError
from phema_dist.storage.key import checked
from phema_dist.storage.remote import DEADLINE_SECONDS, FsspecStore, without_credentials
from phema_dist.storage.s3 import S3Store


class Store(Protocol):
    """A flat set of named objects below one url."""

    url: str  # without credentials
    read_concurrency: int  # how many reads in flight are worthwhile

    def put(self, key: str, data: bytes | bytearray) -> None:
        """Create an object, atomically. Raises KeyExistsError if the key is taken, whatever it holds."""

    def get(self, key: str) -> bytes:
        """Read a whole object. Raises KeyMissingError."""

    def get_many(self, keys: Iterable[str], *, absent_ok: bool = False) -> dict[str, bytes]:
        """Read whole objects, small ones, several at a time. Raises KeyMissingError, or leaves out absent ones."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill a writable buffer of bytes from byte `start`. Raises StorageError if fewer are there."""

    def list(self, prefix: str = "") -> dict[str, int]:
        """Every key below the folder `prefix` and its bytes, asked afresh. A missing bucket is KeyMissingError."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; absent ones are fine."""

    def unfinished(self) -> dict[str, str]:
        """What puts have begun and not ended, alive or cut off: a handle for `discard`, and the key (or its folder)."""

    def discard(self, handles: Iterable[str]) -> None:
        """Remove unfinished puts, each by its own handle; one that is gone is fine, one still alive fails."""

    def describe(self, key: str = "") -> str:
        """Name an object for a message, as in `s3://bucket/run/key`."""


def open_store(
    url: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Store:
    """Open a folder of a disk (a path, `file://…`) or any URL that fsspec knows (`s3://bucket/run`).

    Nothing is contacted yet, and nothing created: a bucket must exist.

    Args:
        url: where the keys live. `//` inside it is kept, a trailing slash is not.
        storage_options: for fsspec's filesystem, as in `s3fs.S3FileSystem(**storage_options)`; they win over our
            defaults. What they leave open comes from the client's environment (AWS_* variables, profiles, roles).
            For S3, `client` may be "s3fs", so that obstore is not used where it is installed, or "obstore", which
            then must be there.
        deadline_seconds: how long a remote read, list or delete may take, retries included, plus its bytes at
            half a MiB/s; a put may take three times as long, plus its bytes.

    Raises:
        SettingsError: no such protocol, its client is not installed, or an option that it does not know.
    """
    text = os.fspath(url)
    shown = without_credentials(text)
    if not isinstance(url, str) and re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise SettingsError(f"a URL must be a str: as a path it lost a slash and became {shown!r}.")
    if "::" in text:
        raise SettingsError(f"a chained URL cannot promise whole objects: give the inner one of {shown!r}.")
    if re.match(r"(s3a?|gs|gcs|abfss?|az)://(/|$)", text):
        raise SettingsError(f"checkpoint_dir must name a bucket, as in s3://bucket/run; got {shown!r}.")
    if re.match(r"s3a?://[^/]*[:@]", text):
        raise SettingsError(
            "an s3:// URL must begin with its bucket; give credentials in storage_options or the environment."
        )
    if re.match(r"s3a?://.*\?versionId=", text):
        raise SettingsError(f"a run is many objects, which have no version of their own; got {shown!r}.")
    if not text or re.match(r"(s3a?|gs|gcs|abfss?|az|https?|hf|hdfs)(:/?[^/]|:$|//)", text):
        raise SettingsError(f"checkpoint_dir must be a folder or a URL such as s3://bucket/run; got {shown!r}.")
    protocol, separator, rest = text.partition("://")
    if not separator or protocol in {"file", "local"}:
        if storage_options:
            raise SettingsError(
                f"storage_options are for object stores, and {shown!r} is a local folder; give s3://bucket/run, or no "
                "storage_options."
            )
        return LocalStore(rest if separator else text)
    kind = S3Store if protocol in {"s3", "s3a"} else FsspecStore
    return kind(text, storage_options or {}, deadline_seconds)


class LocalStore:
    """A folder of a POSIX disk; a key is a file below it.

    A put writes a hidden temporary file, syncs it, and publishes it by a hard link, which never overwrites. Where
    the filesystem has no hard links it is renamed after a check that nothing is there: then, and only then, two
    simultaneous creators of one key may both succeed.
    """

    def __init__(self, path: str) -> None:
        self.url = os.path.abspath(os.path.expanduser(path or "."))
        self.read_concurrency = os.cpu_count() or 1

    def put(self, key: str, data: bytes | bytearray) -> None:
        """Create a file, atomically and durably. Raises KeyExistsError."""
        target = self.describe(checked(key))
        folder = os.path.dirname(target)
        temporary = f"{folder}/.{secrets.token_hex(8)}.tmp"
        try:
            try:
                fd = os.open(temporary, _CREATE, 0o666)
            except FileNotFoundError:
                make_folder(folder)
                fd = os.open(temporary, _CREATE, 0o666)
            try:
                try:
                    _write_synced(fd, data)
                    name_file(fd, temporary, target)
                finally:
                    os.close(fd)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            sync_folder(folder)
        except OSError as error:
            raise _local_error(error, "writing", target) from error

    def get(self, key: str) -> bytes:
        """Read a whole file. Raises KeyMissingError."""
        path = self.describe(checked(key))
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise _local_error(error, "reading", path) from error

    def get_many(self, keys: Iterable[str], *, absent_ok: bool = False) -> dict[str, bytes]:
        """Read whole files, one after the other: they are small."""
        found = {}
        for key in keys:
            try:
                found[key] = self.get(key)
            except KeyMissingError:
                if not absent_ok:
                    raise
        return found

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from `start` by positioned reads (one, usually); opened per call, so no fd is kept."""
        path = self.describe(checked(key))
        filled = 0
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while filled < len(buffer):
                    num_bytes = os.preadv(fd, [buffer[filled:]], start + filled)
                    if num_bytes == 0:
                        break
                    filled += num_bytes
            finally:
                os.close(fd)
        except OSError as error:
            raise _local_error(error, "reading", path) from error
        if filled < len(buffer):
            raise StorageError(
                f"reading {path}: wanted {len(buffer)} bytes from byte {start}, got {filled}: the file is too short."
            )

    def list(self, prefix: str = "") -> dict[str, int]:
        """Every file below the folder `prefix`; hidden ones (unfinished puts) are not there."""
        top = self.describe(checked(prefix.rstrip("/")) if prefix else "")
        found: dict[str, int] = {}
        folders = [top]
        try:
            while folders:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as it:
                    for entry in it:
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                            continue
                        with contextlib.suppress(FileNotFoundError):  # deleted while we looked
                            facts = entry.stat()
                            if stat.S_ISREG(facts.st_mode):  # to open a pipe would wait for ever
                                found[entry.path[len(self.url) + 1 :]] = facts.st_size
        except OSError as error:
            raise _local_error(error, "listing", top) from error
        return dict(sorted(found.items()))

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files, then the folders that this left empty (a store has no folders)."""
        for key in keys:
            path = self.describe(checked(key))
            try:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(path)
            except OSError as error:
                raise _local_error(error, "deleting", path) from error
            with contextlib.suppress(OSError):  # not empty, or gone already
                while len(path := os.path.dirname(path)) > len(self.url):
                    _remove_unfinished(path)
                    os.rmdir(path)

    def unfinished(self) -> dict[str, str]:
        """The hidden temporary files of puts; each is its own handle."""
        found = (f"{folder}/{name}"[len(self.url) + 1 :] for folder, _, names in os.walk(self.url) for name in names)
        return {path: path for path in found if _TEMPORARY.search(path)}

    def discard(self, handles: Iterable[str]) -> None:
        """Remove temporary files; a put that still writes one fails."""
        for handle in handles:
            path = f"{self.url}/{handle}"
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            except OSError as error:
                raise _local_error(error, "deleting", path) from error

    def describe(self, key: str = "") -> str:
        """Name a file for a message: its path."""
        return f"{self.url}/{key}" if key else self.url


_TEMPORARY = re.compile(r"(^|/)\.[0-9a-f]{16}\.tmp$")
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def _remove_unfinished(folder: str) -> None:
    """Remove the temporary files of puts that were killed, from a folder that holds nothing else."""
    names = os.listdir(folder)
    if all(name.startswith(".") and name.endswith(".tmp") for name in names):
        for name in names:
            os.unlink(f"{folder}/{name}")


def make_folder(folder: str) -> None:
    """Make a folder and its parents, each made durable in its own parent."""
    parent = os.path.dirname(folder)
    try:
        os.mkdir(folder)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_folder(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
    sync_folder(parent)


def sync_folder(folder: str) -> None:
    """Make what was made or removed in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_synced(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]  # at most 2 GiB a call
    os.fsync(fd)


def name_file(fd: int, temporary: str, target: str) -> None:
    """Give the file its name, unless something has it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        if os.fstat(fd).st_nlink != 2:  # noqa: PLR2004  NFS may lose the reply to a link that it made
            raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(target) from error
        os.rename(temporary, target)


_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def _local_error(error: OSError, doing: str, path: str) -> PhemaError:
    """Return our error for what the disk said."""
    said = error.strerror or type(error).__name__
    if isinstance(error, FileExistsError):
        return KeyExistsError(f"{doing} {path}: it exists already, and nothing is ever overwritten.")
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return KeyMissingError(f"{doing} {path}: no such file ({said}).")
    if isinstance(error, PermissionError):
        return AccessError(f"{doing} {path}: refused ({said}); check the owner and mode of the folder.")
    return StorageError(f"{doing} {path}: the disk answered: {said}.")
