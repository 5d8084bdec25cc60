"""Bytes at a remote URL, through fsspec: the only module that imports it.

Every verb runs under a deadline on fsspec's own thread, for a socket may stay silent for ever. Two layers retry:
botocore its single requests, and tenacity the whole verb. See `store.Store` for what the verbs promise.
"""

import asyncio
import contextlib
import itertools
import os
import re
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import fsspec.asyn
import fsspec.core
import tenacity

from phema_dist.errors import AccessError, KeyExistsError, KeyMissingError, PhemaError, SettingsError, StorageError
from phema_dist.storage.key import checked

_T = TypeVar("_T")
Buffer = bytes | memoryview

DEADLINE_SECONDS = 20.0  # for a small answer, retries included: a mistyped setting shows within this
PUT_PATIENCE = 3  # a put may take three times that: object stores restart, and the write is worth it
SLOWEST_BYTES_PER_SECOND = 2**20  # time added for data; a transfer slower than this is given up
ABORT_SECONDS = 5.0
_READS_AT_ONCE = 16
_KEYS_AT_ONCE = 64

_PAST_THE_END = 416
_TAKEN = 412
_REFUSED = {401, 403}
_TRANSIENT = {408, 409, 429}
_NO_UPLOAD = "NoSuchUpload"  # completed, and the reply lost; or aborted by somebody
_TRANSIENT_CODES = {_NO_UPLOAD, "RequestTimeout"}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
}
_ODD_REPLY = (TypeError, ValueError, KeyError, AttributeError, IndexError)  # out of a client's parser
_BROKEN_CONNECTION = {  # of botocore and aiohttp, by name: no client library is imported here
    "ConnectionError",
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseParserError",
    "ClientConnectionError",
    "ClientPayloadError",
}
_SERVER_FAILED = 500


def without_credentials(url: str) -> str:
    """A URL, or a text with some, without users and passwords; these may hold slashes."""
    return re.sub(r"(?<=://)([^@\s/]+|[^@\s/]*:[^@\s]*)@", "", url)


class Client(NamedTuple):
    """A filesystem of fsspec that belongs to one process."""

    filesystem: Any
    root: str
    lock: threading.Lock  # filesystems without coroutines are not known to stand several threads

    def call(self, seconds: float, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Call a verb of the filesystem: bounded in time where it is a coroutine, one at a time where not."""
        if self.filesystem.async_impl:
            return self.run(seconds, lambda: getattr(self.filesystem, f"_{verb}")(*args, **kwargs))
        with self.lock:
            return getattr(self.filesystem, verb)(*args, **kwargs)

    def call_each(self, seconds: float, verb: str, arguments: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
        """Call a verb with each arguments, at once where it is a coroutine; an error stands in place of its result."""

        def alone(*args: Any) -> Any:
            try:
                return self.call(seconds, verb, *args)
            except OSError as error:
                return error

        async def together() -> list[Any]:
            ask = getattr(self.filesystem, f"_{verb}")
            return list(await asyncio.gather(*(ask(*args) for args in arguments), return_exceptions=True))

        if not self.filesystem.async_impl:
            return [alone(*args) for args in arguments]
        try:
            return self.run(seconds, together)
        except TimeoutError as error:
            return [error] * len(arguments)

    def run(self, seconds: float, make: Callable[[], Awaitable[_T]]) -> _T:
        """Run a coroutine on fsspec's thread; it is cancelled, and has time to tidy up, when time is up."""

        async def bounded() -> tuple[_T]:
            async with asyncio.timeout(seconds):
                return (await make(),)

        answer = fsspec.asyn.sync(self.filesystem.loop, bounded, timeout=seconds + 2 * ABORT_SECONDS)
        if answer is None:  # so `sync` tells of a cancellation
            raise ConnectionAbortedError("the request was cancelled")
        result: _T = answer[0]
        return result


class Write(NamedTuple):
    """One attempt of one put."""

    path: str
    data: bytes | bytearray
    token: str  # of this put: who wrote what is there?
    attempt: int


class FsspecStore:
    """Objects below any URL that fsspec knows.

    A put looks whether the key is free, then asks for `mode="create"`. Where a filesystem has no atomic form of that
    (many ignore it), two simultaneous creators of one key may both succeed. Folders are never made: this is for
    stores that need none. Only `S3Store` is known to keep the whole promise.

    Transient errors (connection, timeout, 5xx, 409, 429) are retried until the deadline; one attempt may use half of
    it. A retry may meet what an earlier attempt wrote, its reply lost: then the bytes there are compared with ours.
    """

    read_concurrency = _READS_AT_ONCE

    def __init__(self, url: str, options: Mapping[str, Any], deadline_seconds: float) -> None:
        self._url, self._options, self.deadline_seconds = url.rstrip("/"), options, deadline_seconds
        self.url = without_credentials(self._url)
        self._clients: dict[int, Client] = {}  # by process: connections do not survive a fork
        self._worked = False  # once it did, its settings are right
        self._client()

    def put(self, key: str, data: bytes | bytearray) -> None:
        """Create an object, atomically. Raises KeyExistsError."""
        token = secrets.token_hex(16)

        def create(client: Client, seconds: float, attempt: int) -> None:
            write = Write(f"{client.root}/{key}", data, token, attempt)
            try:
                self._create(client, write, seconds)
            except Exception as error:
                answer = answer_of(error)
                ambiguous = answer.taken or answer.code == _NO_UPLOAD
                if not ambiguous or not self._made(client, write, seconds):
                    raise

        self._retried("writing", checked(key), create, PUT_PATIENCE, len(data))

    def get(self, key: str) -> bytes:
        """Read a whole object. Raises KeyMissingError."""

        def read(client: Client, seconds: float, attempt: int) -> bytes:
            path = f"{client.root}/{key}"
            if attempt > 1:  # perhaps it is just big
                seconds += client.call(seconds, "info", path)["size"] / SLOWEST_BYTES_PER_SECOND
            return bytes(client.call(seconds, "cat_file", path))

        return self._retried("reading", checked(key), read)

    def get_many(self, keys: Iterable[str], *, absent_ok: bool = False) -> dict[str, bytes]:
        """Read whole objects, many requests at a time."""
        return {
            key: self.get(key) if isinstance(it, BaseException) else bytes(it)
            for key, it in self._each("cat_file", keys)
            if not (absent_ok and isinstance(it, FileNotFoundError))
        }

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer by one ranged request."""
        if not buffer:
            return

        def read(client: Client, seconds: float, _: int) -> Buffer:
            try:
                return self._range(client, f"{client.root}/{key}", start, start + len(buffer), seconds)
            except Exception as error:
                if answer_of(error).status == _PAST_THE_END:
                    return b""
                raise

        data = self._retried("reading", checked(key), read, num_bytes=len(buffer))
        if len(data) != len(buffer):
            raise StorageError(
                f"reading {self.describe(key)}: wanted {len(buffer)} bytes from byte {start}, got {len(data)}: "
                "the object is too short."
            )
        buffer[:] = data

    def list(self, prefix: str = "") -> dict[str, int]:
        """Every key below the folder `prefix` and its bytes."""

        def find(client: Client, seconds: float, _: int) -> dict[str, int]:
            top = f"{client.root}/{prefix}".rstrip("/")
            found = client.call(seconds, "find", top, detail=True)
            below = f"{top}/"
            skip = len(client.root) + 1
            return {name[skip:]: int(info["size"]) for name, info in found.items() if name.startswith(below)}

        return self._retried("listing", prefix.rstrip("/"), find, PUT_PATIENCE)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, many requests at a time."""
        for key, result in self._each("rm_file", keys):
            if isinstance(result, BaseException) and not isinstance(result, FileNotFoundError):
                self._remove(key)

    def _remove(self, key: str) -> None:
        def remove(client: Client, seconds: float, _: int) -> None:
            with contextlib.suppress(FileNotFoundError):
                client.call(seconds, "rm_file", f"{client.root}/{key}")

        self._retried("deleting", key, remove)

    def _each(self, verb: str, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Try a verb once for each key, many at a time; yield what came of it. Failures are the caller's to repeat."""
        names = [checked(key) for key in keys]
        for first in range(0, len(names), _KEYS_AT_ONCE):
            batch = names[first : first + _KEYS_AT_ONCE]
            client = self._client()
            paths = [(f"{client.root}/{key}",) for key in batch]
            yield from zip(batch, client.call_each(self.deadline_seconds / 2, verb, paths), strict=True)

    def unfinished(self) -> dict[str, str]:
        """Nothing that fsspec could tell of."""
        return {}

    def discard(self, handles: Iterable[str]) -> None:
        """Nothing to remove."""

    def describe(self, key: str = "") -> str:
        """Name an object for a message: its URL."""
        return f"{self.url}/{key}" if key else self.url

    def _client(self) -> Client:
        """Return this process's client; one inherited over a fork stays untouched, it has no threads here."""
        process = os.getpid()
        client = self._clients.get(process)
        return client or self._clients.setdefault(process, self._connected(self._options))

    def _connected(self, options: Mapping[str, Any]) -> Client:
        options = {**options, "skip_instance_cache": True, "use_listings_cache": False}
        try:
            filesystem, root = fsspec.core.url_to_fs(self._url, **options)
        except (ImportError, KeyError, TypeError, ValueError, OSError) as error:
            raise SettingsError(
                f"cannot open {self.url}: {self.said(error)}. "
                "For s3:// install phema-dist with its extra [s3]; else check URL, fsspec client and storage_options."
            ) from error
        return Client(filesystem, root, threading.Lock())

    def _range(self, client: Client, path: str, start: int, stop: int, seconds: float) -> Buffer:
        return bytes(client.call(seconds, "cat_file", path, start=start, end=stop))

    def _create(self, client: Client, write: Write, seconds: float) -> None:
        if client.filesystem.async_impl and client.call(seconds, "exists", write.path):
            raise FileExistsError(write.path)
        client.call(seconds, "pipe_file", write.path, write.data, mode="create")

    def _made(self, client: Client, write: Write, seconds: float) -> bool:
        """Whether what is there is of an earlier attempt of this put."""
        return write.attempt > 1 and bool(client.call(seconds, "cat_file", write.path) == write.data)

    def _retried(
        self,
        doing: str,
        key: str,
        action: Callable[[Client, float, int], _T],
        patience: float = 1,
        num_bytes: int = 0,
    ) -> _T:
        """Call `action(client, seconds for one attempt, number of the attempt)` until it succeeds or time is up."""
        client = self._client()
        attempts = itertools.count(1)
        seconds = patience * self.deadline_seconds / 2 + num_bytes / SLOWEST_BYTES_PER_SECOND
        retrying = tenacity.Retrying(
            stop=tenacity.stop_before_delay(2 * seconds),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            retry=tenacity.retry_if_exception(lambda error: _is_transient(error) or self._is_odd(error)),
            reraise=True,
        )
        try:
            result = retrying(lambda: action(client, seconds, next(attempts)))
        except PhemaError:
            raise
        except Exception as error:
            raise self._translated(error, f"{doing} {self.describe(key)}", next(attempts) - 1) from error
        self._worked = True
        return result

    def _is_odd(self, error: BaseException) -> bool:
        """Whether a client stumbled over an answer: settings that worked are not what it stumbled over."""
        return self._worked and isinstance(error, _ODD_REPLY) and not isinstance(error, PhemaError)

    def _translated(self, error: Exception, what: str, num_attempts: int) -> PhemaError:
        """Return our error for what the store or its client said."""
        answer = answer_of(error)
        said = self.said(error)
        if answer.taken:
            return KeyExistsError(f"{what}: it exists already, and nothing is ever overwritten.")
        if isinstance(error, PermissionError) or answer.status in _REFUSED or _names(error) & _NO_CREDENTIALS:
            return AccessError(
                f"{what}: refused ({said}); check the credentials (storage_options, AWS_* variables, profile) and "
                "what they allow in this bucket."
            )
        if isinstance(error, FileNotFoundError):
            return KeyMissingError(f"{what}: not there ({said}); check the bucket and the key. Buckets are not made.")
        if isinstance(error, _ODD_REPLY) and not self._worked:
            return SettingsError(f"{what}: the client rejects its settings ({said}); check URL and storage_options.")
        return StorageError(
            f"{what}: failed after {num_attempts} attempts ({said}); check that the endpoint is reachable and healthy."
        )

    def said(self, error: Exception) -> str:
        """Return one line of what an error says, without any credential of the options."""
        text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": .")
        text = without_credentials(text)
        for secret in _secrets(self._options):
            text = text.replace(secret, "***")
        return text


class Answer(NamedTuple):
    """What a store answered with an error, as far as its client tells."""

    status: int = 0
    code: str = ""
    taken: bool = False


def answer_of(error: BaseException) -> Answer:
    """Find botocore's response in an error or its causes."""
    taken = isinstance(error, FileExistsError)
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            about = response.get("ResponseMetadata", {})
            status, code = about.get("HTTPStatusCode", 0), str(response.get("Error", {}).get("Code", ""))
            return Answer(status, code, taken or status == _TAKEN)
        cause = cause.__cause__
    return Answer(taken=taken)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may help: never after a refusal, a missing key or a wrong setting."""
    answer = answer_of(error)
    if answer.status:
        return answer.status >= _SERVER_FAILED or answer.status in _TRANSIENT or answer.code in _TRANSIENT_CODES
    return isinstance(error, ConnectionError | TimeoutError | EOFError) or bool(_names(error) & _BROKEN_CONNECTION)


def _secrets(options: Mapping[str, Any]) -> Iterable[str]:
    """Yield what must not show in a message: option values whose names tell of credentials, at any depth."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif isinstance(value, str) and value and re.search(r"(?i)key|secret|token|pass|cred|connection_string", name):
            yield value
