"""A TCP proxy that misbehaves on request, between a client and a real server. Signatures survive: it changes no byte.

Use it as:

    with ChaosProxy(server.address) as proxy:
        proxy.cut_after_bytes = 1_000_000
        store = open_store(url, server.options(endpoint=proxy.endpoint))
"""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from typing import Self

_BLOCK_BYTES = 2**18
_REQUEST = re.compile(rb"((?:GET|PUT|POST|HEAD|DELETE) \S+) HTTP/1\.1\r\n")


class ChaosProxy:
    """Faults are attributes; each may change while connections are open."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.latency_seconds = 0.0  # added to each block, both ways
        self.bytes_per_second = 0.0  # of each connection towards the server; 0: unlimited
        self.cut_after_bytes: int | None = None  # reset a connection once it has sent so much upstream …
        self.cuts_left = 1  # … so many times
        self.black_hole = False  # take everything, forward nothing
        self.lose_reply_to: re.Pattern[bytes] | None = None  # let the next such request through, not its reply
        self.refuse = False  # reset new connections
        self.num_connections = 0
        self.requests: list[str] = []  # what was asked: "PUT /bucket/key?…"
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy", daemon=True)
        self._losing: set[tuple[asyncio.StreamWriter, ...]] = set()  # connections whose next reply is lost
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._await(asyncio.start_server(self._connected, "127.0.0.1", 0))
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._await(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _await(self, coroutine):  # noqa: ANN001, ANN202  as given, as awaited
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _close(self) -> None:
        self._server.close()
        self.black_hole, self.bytes_per_second = False, 0.0
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.num_connections += 1
        if self.refuse:
            _reset(writer)
            return
        up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        both = (writer, up_writer)
        self._writers.update(both)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, up_writer, both, upward=True))
                group.create_task(self._pump(up_reader, writer, both, upward=False))
        except* ConnectionError:
            pass
        finally:
            self._writers.difference_update(both)
            for each in both:
                each.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        both: tuple[asyncio.StreamWriter, ...],
        *,
        upward: bool,
    ) -> None:
        num_bytes = 0
        while block := await reader.read(_BLOCK_BYTES):
            while self.black_hole:  # noqa: ASYNC110  set from another thread
                await asyncio.sleep(0.05)
            num_bytes += len(block)
            if upward and (request := _REQUEST.match(block)):  # a client sends none before it has the last answer
                self.requests.append(request[1].decode())
            if self.latency_seconds:
                await asyncio.sleep(self.latency_seconds)
            if self._must_cut(num_bytes) if upward else self._must_lose(block, both):
                for each in both:
                    _reset(each)
                raise ConnectionResetError
            if upward and self.lose_reply_to and self.lose_reply_to.match(block):
                self.lose_reply_to = None
                self._losing.add(both)
            if upward and self.bytes_per_second:
                await asyncio.sleep(len(block) / self.bytes_per_second)
            writer.write(block)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    def _must_cut(self, num_bytes: int) -> bool:
        if self.cut_after_bytes is None or num_bytes <= self.cut_after_bytes or not self.cuts_left:
            return False
        self.cuts_left -= 1
        return True

    def _must_lose(self, block: bytes, both: tuple[asyncio.StreamWriter, ...]) -> bool:
        if both not in self._losing or block.startswith(b"HTTP/1.1 100"):  # 100: go on and send the body
            return False
        self._losing.discard(both)
        return True


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset, as a dying host does."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
