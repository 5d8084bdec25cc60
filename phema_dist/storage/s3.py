"""Bytes in a bucket of S3, or of a store that speaks its protocol: what `remote` leaves to each filesystem.

It goes past s3fs's own `_pipe_file` (which leaves its parts behind when cancelled) and `_find` (one deadline for all
pages), straight to `_call_s3`, the coroutine under all of s3fs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phema_dist.storage.remote import (
    ABORT_SECONDS,
    PUT_PATIENCE,
    SLOWEST_BYTES_PER_SECOND,
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
_PART_BYTES = 16 * 2**20
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
    """Objects in a bucket of S3, or of a store that speaks its protocol, through s3fs.

    Big objects go up in parts, a few at a time, and the upload is aborted, by its own id, on any error, cancellation
    or timeout; s3fs's own `pipe_file` leaves it behind when cancelled. Each put marks its object with a random token
    in the metadata, so that a key taken by our own lost request is told from one taken by somebody else.
    """

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

    def _create(self, client: Client, write: Write, seconds: float) -> None:
        metadata = {**client.filesystem.s3_additional_kwargs.get("Metadata", {}), _TOKEN: write.token}
        if len(write.data) < 2 * _PART_BYTES:
            client.call(seconds, "pipe_file", write.path, write.data, mode="create", Metadata=metadata)
        else:
            client.run(seconds, lambda: self._create_in_parts(client.filesystem, write, metadata))

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
        upload = (await ask("create_multipart_upload", Metadata=metadata))["UploadId"]
        try:
            parts = await self._send_parts(functools.partial(ask, "upload_part", UploadId=upload), write.data)
            whole = {"Parts": parts}
            await ask("complete_multipart_upload", UploadId=upload, MultipartUpload=whole, IfNoneMatch="*")
        except BaseException:
            try:
                async with asyncio.timeout(ABORT_SECONDS):
                    await ask("abort_multipart_upload", UploadId=upload)
            except FileNotFoundError:
                pass  # it was completed, or is gone
            except Exception as error:  # noqa: BLE001  what failed first is what must be raised
                _log.warning(
                    "could not abort upload %s of s3://%s (%s); a lifecycle rule of the bucket removes such remains",
                    upload,
                    write.path,
                    self.said(error),
                )
            raise

    async def _send_parts(self, send: Callable[..., Awaitable[Any]], data: bytes | bytearray) -> Sequence[Any]:
        """Send all parts, each with a limit of its own, so that one stalled connection does not cost an hour."""
        part_bytes = max(_PART_BYTES, math.ceil(len(data) / _MOST_PARTS))
        seconds = PUT_PATIENCE * self.deadline_seconds / 2 + part_bytes / SLOWEST_BYTES_PER_SECOND
        slots = asyncio.Semaphore(_PARTS_AT_ONCE)

        async def send_one(number: int) -> dict[str, Any]:
            async with slots, asyncio.timeout(seconds):
                body = bytes(memoryview(data)[(number - 1) * part_bytes : number * part_bytes])
                return {"PartNumber": number, "ETag": (await send(PartNumber=number, Body=body))["ETag"]}

        numbers = range(1, math.ceil(len(data) / part_bytes) + 1)
        tasks = [asyncio.ensure_future(send_one(number)) for number in numbers]
        try:
            parts: Sequence[Any] = await asyncio.gather(*tasks)
            return parts
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
