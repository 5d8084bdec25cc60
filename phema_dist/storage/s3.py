"""Bytes in a bucket of S3, or of a store that speaks its protocol: what `remote` leaves to each filesystem.

It goes past s3fs's own `_pipe_file` (which leaves its parts behind when cancelled) and `_find` (one deadline for all
pages), straight to `_call_s3`, the coroutine under all of s3fs. obstore carries big bodies, where it can be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phema_dist.errors import SettingsError
from phema_dist.storage import carrier
from phema_dist.storage.remote import (
    ABORT_SECONDS,
    PUT_PATIENCE,
    SLOWEST_BYTES_PER_SECOND,
    Buffer,
    Client,
    FsspecStore,
    Write,
)

_log = logging.getLogger("phema_dist")

_CONFIG: dict[str, Any] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "max_pool_connections": 64,  # botocore's 10 would be the real limit of concurrent reads
    "retries": {"mode": "standard", "total_max_attempts": 3},
}
_PART_BYTES = 16 * 2**20  # of s3fs, which copies each
_CARRIED_BYTES = 64 * 2**20  # of obstore, which copies none; each costs a signature and a client
# Options of connections, and variables of the environment that are.
_NOT_CARRIED = {"verify", "proxies", "proxies_config", "client_cert", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"}
_LEAST_CARRIED = 4 * 2**20  # below, s3fs needs no longer
_URL_SECONDS = 3600  # a signed URL lives
_MOST_URLS = 16
_IDLE_SECONDS, _SPREAD_SECONDS = 5.0, 0.25
_PARTS_AT_ONCE = 4
_PAGES_AT_ONCE = 32  # of a listing
_MOST_PARTS = 10_000  # a limit of S3
_TOKEN = "phema-put"  # noqa: S105  the name of a mark, no password


@dataclass(frozen=True)
class _Page:
    """A page of a listing: of all keys below a prefix, or with `levels` of those right in it and of its folders."""

    bucket: str
    below: str
    levels: int = 0
    token: str | None = None  # of the page before

    @property
    def query(self) -> dict[str, str]:
        """As S3 is asked for it."""
        delimiter = {"Delimiter": "/"} if self.levels else {}
        token = {"ContinuationToken": self.token} if self.token else {}
        return {"Bucket": self.bucket, "Prefix": self.below, **delimiter, **token}

    def following(self, answer: Mapping[str, Any]) -> list[_Page]:
        """What to ask for after it."""
        folders = (folder["Prefix"] for folder in answer.get("CommonPrefixes", ()))
        pages = [_Page(self.bucket, folder, self.levels - 1) for folder in folders]
        if answer.get("IsTruncated"):
            pages.append(replace(self, token=answer["NextContinuationToken"]))
        return pages


class S3Store(FsspecStore):
    """Objects in a bucket of S3, or of a store that speaks its protocol, through s3fs, and obstore for what is big.

    Big objects go up in parts, a few at a time, and the upload is aborted, by its own id, on any error, cancellation
    or timeout; s3fs's own `pipe_file` leaves it behind when cancelled. Each put marks its object with a random token
    in the metadata, so that a key taken by our own lost request is told from one taken by somebody else.

    `client` in the options chooses: "s3fs" alone, or "obstore" for parts and ranges, as is the default where it is
    installed. A forked child always uses s3fs alone, and so does a request that obstore fails: then it is s3fs that
    tries again, and whose error counts.
    """

    def __init__(self, url: str, options: Mapping[str, Any], deadline_seconds: float) -> None:
        options = dict(options)
        self._carried = _carried(options.pop("client", None), options)
        self._links: dict[str, tuple[float, Any]] = {}  # by path: until when a signed URL may be used, and its client
        self._signer: Any = None  # the client that has been told how to sign
        self._busy_until = 0.0
        super().__init__(url, options, deadline_seconds)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Every key below the folder `prefix` and its bytes; the deadline is that of one page of 1000 keys.

        Pages come one after the other. So what is more than a page is listed by folder, two levels down, many at once.
        """
        where = prefix.rstrip("/")
        bucket, root, _version = self._client().filesystem.split_path(self._client().root)
        top = "".join(f"{part}/" for part in (root, where) if part)
        skip = len(root) + 1 if root else 0
        found: dict[str, int] = {}

        def take(answer: Mapping[str, Any]) -> None:
            contents = ((item["Key"], item["Size"]) for item in answer.get("Contents", ()))
            found.update((key[skip:], num_bytes) for key, num_bytes in contents if not key.endswith("/"))

        (first,) = self._list_pages(where, [_Page(bucket, top)])
        if not first.get("IsTruncated"):
            take(first)
            return found
        self._leave_dates_unread()
        pending = [_Page(bucket, top, levels=2)]
        while pending:
            asked, pending = pending[:_PAGES_AT_ONCE], pending[_PAGES_AT_ONCE:]
            for page, answer in zip(asked, self._list_pages(where, asked), strict=True):
                take(answer)
                pending += page.following(answer)
        return dict(sorted(found.items()))

    def _leave_dates_unread(self) -> None:
        """Of the time that botocore takes for a page, three quarters go into dates, which nobody here looks at."""
        if "session" not in self._options:  # else it is shared with somebody who may
            session = self._client().filesystem.session
            session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)

    def _list_pages(self, where: str, pages: Sequence[_Page]) -> Sequence[Any]:
        """Ask for pages all at once, and again, one by one, for those that failed."""

        def ask(page: _Page) -> Any:
            return self._retried(
                "listing",
                where,
                lambda client, seconds, _: client.call(seconds, "call_s3", "list_objects_v2", **page.query),
            )

        if len(pages) == 1:
            return [ask(pages[0])]
        queries = [("list_objects_v2", page.query) for page in pages]  # _call_s3 takes dicts of arguments
        answers = self._client().call_each(self.deadline_seconds / 2, "call_s3", queries)
        return [
            ask(page) if isinstance(answer, BaseException) else answer
            for page, answer in zip(pages, answers, strict=True)
        ]

    def _connected(self, options: Mapping[str, Any]) -> Client:
        config = {**_CONFIG, **(options.get("config_kwargs") or {})}
        client = super()._connected({"max_concurrency": 1, **options, "config_kwargs": config})
        client.filesystem.retries = 1  # botocore retries requests, we retry verbs: a third layer multiplies both
        return client

    def unfinished(self) -> dict[str, str]:
        """Multipart uploads; each by its id, with its whole name in the bucket."""
        bucket, root, _version = self._client().filesystem.split_path(self._client().root)
        below = f"{root}/" if root else ""
        found: dict[str, str] = {}
        after: dict[str, str] | None = {}
        while after is not None:
            answer = self._ask("listing", "", "list_multipart_uploads", Bucket=bucket, Prefix=below, **after)
            uploads = answer.get("Uploads", ())
            ours = (upload for upload in uploads if upload["Key"].startswith(below))  # some servers tell of others, too
            found.update((f"{upload['UploadId']} {upload['Key']}", upload["Key"][len(below) :]) for upload in ours)
            marks = (("KeyMarker", "NextKeyMarker"), ("UploadIdMarker", "NextUploadIdMarker"))
            after = {name: answer[next_] for name, next_ in marks} if answer.get("IsTruncated") else None
        return found

    def discard(self, handles: Iterable[str]) -> None:
        """Abort multipart uploads; a put that still sends parts to one fails."""
        bucket, root, _version = self._client().filesystem.split_path(self._client().root)
        for handle in handles:
            upload, _, name = handle.partition(" ")
            key = name[len(root) + 1 :] if root else name
            arguments = {"Bucket": bucket, "Key": name, "UploadId": upload}

            def abort(client: Client, seconds: float, _: int, arguments: Mapping[str, str] = arguments) -> None:
                with contextlib.suppress(FileNotFoundError):  # gone already
                    client.call(seconds, "call_s3", "abort_multipart_upload", **arguments)

            self._retried("deleting", key, abort)

    def _ask(self, doing: str, key: str, method: str, **arguments: Any) -> Any:
        return self._retried(
            doing, key, lambda client, seconds, _: client.call(seconds, "call_s3", method, **arguments)
        )

    def _create(self, client: Client, write: Write, seconds: float) -> None:
        metadata = {**client.filesystem.s3_additional_kwargs.get("Metadata", {}), _TOKEN: write.token}
        if len(write.data) < (_LEAST_CARRIED if self._carries() else 2 * _PART_BYTES):
            client.call(seconds, "pipe_file", write.path, write.data, mode="create", Metadata=metadata)
        else:
            self._spread()
            client.run(seconds, lambda: self._create_in_parts(client.filesystem, write, metadata))
            self._busy_until = time.monotonic() + _IDLE_SECONDS

    def _spread(self) -> None:
        """Wait a moment before the first big object of a snapshot: all ranks begin theirs at the same time."""
        if time.monotonic() > self._busy_until:
            time.sleep(random.uniform(0, _SPREAD_SECONDS))  # noqa: S311  no secret

    def _carries(self) -> bool:
        return self._carried and carrier.usable()

    def _range(self, client: Client, path: str, start: int, stop: int, seconds: float) -> Buffer:
        async def read() -> Buffer:
            filesystem = client.filesystem
            if self._carries():
                try:
                    async with asyncio.timeout(seconds / 2):  # half is left for s3fs
                        return await carrier.fetch(await self._link_to_read(filesystem, path), start, stop)
                except Exception as error:  # noqa: BLE001  s3fs says what is wrong, if it is not obstore
                    self._links.pop(path, None)
                    _log.debug("s3://%s: obstore failed to read (%s), s3fs tries", path, type(error).__name__)
            return bytes(await filesystem._cat_file(path, start=start, end=stop))  # noqa: SLF001  its coroutine API

        return client.run(seconds, read)

    def _made(self, client: Client, write: Write, seconds: float) -> bool:
        """Whether the object carries our token: aiohttp and botocore repeat requests whose reply was lost, untold."""
        bucket, name, _ = client.filesystem.split_path(write.path)
        try:
            head = client.call(seconds, "call_s3", "head_object", Bucket=bucket, Key=name)
        except (FileNotFoundError, PermissionError):
            return False
        return bool(head.get("Metadata", {}).get(_TOKEN) == write.token)

    async def _create_in_parts(self, filesystem: Any, write: Write, metadata: Mapping[str, str]) -> None:
        bucket, name, _ = filesystem.split_path(write.path)
        ask = functools.partial(filesystem._call_s3, Bucket=bucket, Key=name)  # noqa: SLF001  its coroutine API
        creating = asyncio.ensure_future(ask("create_multipart_upload", Metadata=metadata))
        try:
            upload = (await asyncio.shield(creating))["UploadId"]  # without its answer nobody knows what to abort
            send = functools.partial(self._send_part, filesystem, {"Bucket": bucket, "Key": name, "UploadId": upload})
            whole = {"Parts": await self._send_parts(send, write.data)}
            await ask("complete_multipart_upload", UploadId=upload, MultipartUpload=whole, IfNoneMatch="*")
        except BaseException:
            try:
                async with asyncio.timeout(ABORT_SECONDS):
                    await asyncio.wait([creating])
                    if creating.exception() is None:
                        await ask("abort_multipart_upload", UploadId=creating.result()["UploadId"])
            except FileNotFoundError:
                pass  # it was completed, or is gone
            except Exception as error:  # noqa: BLE001  what failed first is what must be raised
                _log.warning(
                    "could not abort an upload of s3://%s (%s); a lifecycle rule of the bucket removes such remains",
                    write.path,
                    self.said(error),
                )
            finally:
                creating.cancel()
            raise

    async def _send_parts(
        self, send: Callable[[int, memoryview, float], Awaitable[str]], data: bytes | bytearray
    ) -> Sequence[Any]:
        """Send all parts, each with a limit of its own, so that one stalled connection does not cost an hour."""
        part_bytes = max(_CARRIED_BYTES if self._carries() else _PART_BYTES, math.ceil(len(data) / _MOST_PARTS))
        # The parts under way share one line.
        seconds = PUT_PATIENCE * self.deadline_seconds / 2 + _PARTS_AT_ONCE * part_bytes / SLOWEST_BYTES_PER_SECOND
        slots = asyncio.Semaphore(_PARTS_AT_ONCE)

        async def send_one(number: int) -> dict[str, Any]:
            async with slots, asyncio.timeout(seconds):
                body = memoryview(data)[(number - 1) * part_bytes : number * part_bytes]
                return {"PartNumber": number, "ETag": await send(number, body, seconds)}

        numbers = range(1, math.ceil(len(data) / part_bytes) + 1)
        tasks = [asyncio.ensure_future(send_one(number)) for number in numbers]
        try:
            parts: Sequence[Any] = await asyncio.gather(*tasks)
            return parts
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_part(
        self, filesystem: Any, upload: Mapping[str, str], number: int, body: memoryview, seconds: float
    ) -> str:
        refused = False
        if self._carries():
            try:  # without a checksum: a sum in Python takes longer than the sending, and readers check every block
                url = await self._signed(filesystem, "upload_part", **upload, PartNumber=number)
                return await carrier.send(carrier.opened(url, seconds / 2), body)  # half is left for s3fs
            except Exception as error:  # noqa: BLE001  s3fs says what is wrong, if it is not obstore
                refused = carrier.refused(error)
                _log.debug("s3://%s/%s: obstore failed (%s)", upload["Bucket"], upload["Key"], type(error).__name__)
        answer = await filesystem._call_s3("upload_part", **upload, PartNumber=number, Body=bytes(body))  # noqa: SLF001
        if refused:
            _log.warning(
                "s3://%s takes parts from s3fs only, which sends them from now on; it holds Python's lock for longer",
                upload["Bucket"],
            )
            self._carried = False
        etag: str = answer["ETag"]
        return etag

    async def _link_to_read(self, filesystem: Any, path: str) -> Any:
        """Return a client that reads an object; it keeps its connections, so it is kept for the next range."""

        async def opened() -> Any:
            bucket, name, _ = filesystem.split_path(path)
            url = await self._signed(filesystem, "get_object", Bucket=bucket, Key=name)
            return carrier.opened(url, _URL_SECONDS)

        until, link = self._links.get(path, (0.0, None))
        if time.monotonic() > until:
            while len(self._links) >= _MOST_URLS:
                del self._links[next(iter(self._links))]
            link = asyncio.ensure_future(opened())  # one for all who ask meanwhile
            self._links[path] = time.monotonic() + _URL_SECONDS / 2, link
        return await asyncio.shield(link)

    async def _signed(self, filesystem: Any, method: str, **arguments: Any) -> str:
        """Return the URL of a request that s3fs would make, signed; it needs no header."""
        client = await filesystem.set_session()
        if filesystem.cache_regions:
            client = await filesystem.get_s3(arguments["Bucket"])
        all_arguments = filesystem._get_s3_method_kwargs(getattr(client, method), **arguments)  # noqa: SLF001
        if all_arguments.keys() != arguments.keys():
            raise LookupError("options of the store ask for headers in each request")
        if client is not self._signer:  # it takes most of the time of a signature to look at this function
            client.meta.events.register_first("choose-signer.s3", _sign_as_requests)
            self._signer = client
        url: str = await client.generate_presigned_url(method, Params=arguments, ExpiresIn=_URL_SECONDS)
        return url


def _carried(client: str | None, options: Mapping[str, Any]) -> bool:
    """Whether obstore is to be used, as the option `client` says and if it can follow the others."""
    if client not in {None, "s3fs", "obstore"}:
        raise SettingsError(f'storage_options: client must be "obstore" or "s3fs"; got {client!r}.')
    if client == "obstore" and not carrier.installed():
        raise SettingsError(
            'storage_options: client is "obstore", which is not installed: install phema-dist with its extra [s3], '
            "or leave it out."
        )
    given = {*(options.get("client_kwargs") or {}), *(options.get("config_kwargs") or {})}
    if not _endpoint(options).startswith("http://"):  # there no certificate is looked at
        given |= {name for name, value in os.environ.items() if value}
    if unknown := sorted(given & _NOT_CARRIED):
        if client == "obstore":
            raise SettingsError(f'storage_options: client "obstore" cannot follow {unknown}; leave client out.')
        _log.debug("obstore cannot follow the storage_options %s: s3fs does all", unknown)
        return False
    return client != "s3fs" and carrier.installed()


def _endpoint(options: Mapping[str, Any]) -> str:
    inner = (options.get("client_kwargs") or {}).get("endpoint_url")
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return str(options.get("endpoint_url") or inner or next(filter(None, map(os.environ.get, names)), ""))


def _sign_as_requests(signature_version: Any, **_: Any) -> str | None:
    """Sign URLs in the version of requests; botocore takes an older one, which new buckets refuse."""
    return "s3v4-query" if signature_version in {"v4-query", "s3v4-query"} else None
