"""What an upload takes from the training thread, and how fast it is, to an S3 server that throws everything away.

    python benchmarks/upload.py            two files of 256 MiB, as of one rank's snapshot
    python benchmarks/upload.py --quick    small, to see that it runs

The training thread makes short steps, in pure Python (which needs the interpreter's lock all the time) or of torch.
"blocked" is the time in which it neither runs nor waits for a core, as the kernel counts it: it waits for the lock,
which whoever uploads holds. The server is a process of its own. The files are uploaded one after the other at full
speed; a training job does that now and then only. Contestants take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import multiprocessing
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timing
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from phema_dist.storage.store import open_store

MIB = 2**20
MOST_BLOCKED, LEAST_THROUGHPUT = 0.05, 0.9
OURS = "phema_dist (obstore, the default)"
RAW = "raw"


class Seen(NamedTuple):
    """What the training thread went through while bytes were uploaded."""

    seconds: float
    blocked: float
    longest_step: float


def python_step() -> None:
    """Run bytecode for about 2 ms."""
    total = 0
    for number in range(40_000):
        total += number


def torch_step() -> None:
    """Run small operations for about 2 ms; each gives the lock away, and wants it back."""
    for _ in range(8):
        torch.relu(MATRIX @ MATRIX).sum().item()


MATRIX = torch.randn(256, 256)


def runnable_seconds() -> float:
    """How long this thread has run or waited for a core (Linux)."""
    ran, waited, _ = Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()
    return (int(ran) + int(waited)) / 1e9


def watch(step: Callable[[], None], begin_upload: Callable[[], Callable[[], bool]]) -> Seen:
    """Make steps until an upload that runs elsewhere has ended."""
    ended = begin_upload()
    begin, runnable = time.perf_counter(), runnable_seconds()
    longest, last = 0.0, begin
    while not ended():
        step()
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    seconds = last - begin
    return Seen(seconds, max(0.0, seconds - (runnable_seconds() - runnable)), longest)


def in_a_thread(work: Callable[[], object]) -> Callable[[], bool]:
    """Begin work as our storage thread does; what is returned says whether it has ended."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return lambda: not thread.is_alive()


def blocking(num_rounds: int, endpoint: str, files: Sequence[bytearray]) -> bool:
    """Print what each client takes from the training thread; say whether ours is within the bar."""
    names = map(str, itertools.count())
    num_bytes = sum(map(len, files))

    def ours(client: str) -> Callable[[], Callable[[], bool]]:
        store = open_store("s3://sink/run", options(endpoint) | {"client": client})
        return lambda: in_a_thread(lambda: [store.put(next(names), data) for data in files])

    def of_dcp() -> Callable[[], bool]:
        writer = FsspecWriter(f"s3://sink/{next(names)}", **options(endpoint))
        state = {str(i): torch.frombuffer(data, dtype=torch.uint8) for i, data in enumerate(files)}
        return dcp.async_save(state, storage_writer=writer).done

    contestants = {
        OURS: ours("obstore"),
        "phema_dist, client=s3fs": ours("s3fs"),
        "dcp.async_save, FsspecWriter (s3fs)": of_dcp,
    }
    within = True
    for title, step in (("a pure-Python loop", python_step), ("small operations of torch", torch_step)):
        found: dict[str, list[Seen]] = {name: [] for name in contestants}
        for i in range(num_rounds + 1):
            for name, begin_upload in contestants.items():
                seen = watch(step, begin_upload)
                if i:
                    found[name].append(seen)
        print(f"\nThe training thread runs {title} while {num_bytes / MIB:.0f} MiB are uploaded\n")
        rows = []
        for name, all_seen in found.items():
            share = median(seen.blocked / seen.seconds for seen in all_seen)
            blocked, seconds, longest = (median(column) for column in zip(*map(in_order, all_seen), strict=True))
            rows.append(
                [
                    name,
                    f"{share:.1%}",
                    f"{blocked * 2**30 / num_bytes:.3f} s",
                    f"{1e3 * longest:.0f} ms",
                    f"{num_bytes / MIB / seconds:.0f}",
                ]
            )
            within &= name != OURS or share <= MOST_BLOCKED
        timing.print_rows(["", "blocked", "blocked per GiB", "longest step", "MiB/s"], rows)
    return within


def in_order(seen: Seen) -> tuple[float, float, float]:
    """The columns of the table."""
    return seen.blocked, seen.seconds, seen.longest_step


def throughput(num_rounds: int, endpoint: str, folder: Path, files: Sequence[bytearray]) -> bool:
    """Print how long writes take beside raw ones of the same bytes; say whether ours are within the bar."""
    names = map(str, itertools.count())
    address = endpoint.removeprefix("http://")
    local, remote = open_store(folder), open_store("s3://sink/fast", options(endpoint))
    slow = open_store("s3://sink/slow", options(endpoint) | {"client": "s3fs"})

    def raw_upload(data: bytearray | memoryview) -> None:
        connection = http.client.HTTPConnection(address)
        connection.request("PUT", f"/sink/raw/{next(names)}", body=data)
        connection.getresponse().read()
        connection.close()

    def raw_parallel(data: bytearray) -> None:
        part = len(data) // 4
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(raw_upload, (memoryview(data)[i * part : (i + 1) * part] for i in range(4))))

    def raw_write(data: bytearray) -> None:
        fd = os.open(folder / next(names), os.O_WRONLY | os.O_CREAT)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.close(fd)

    def each(put: Callable[[bytearray], object]) -> Callable[[], None]:
        def run() -> None:
            for data in files:  # none is removed before the end: a filesystem frees blocks in the next sync
                put(data)

        return run

    within = True
    kinds: Mapping[str, Mapping[str, Callable[[bytearray], object]]] = {
        "the sink": {
            RAW: raw_upload,
            "raw, on four connections": raw_parallel,
            OURS: lambda data: remote.put(next(names), data),
            "phema_dist, client=s3fs": lambda data: slow.put(next(names), data),
        },
        "the local disk": {RAW: raw_write, "phema_dist": lambda data: local.put(next(names), data)},
    }
    for title, puts in kinds.items():
        times = timing.in_turns({name: each(put) for name, put in puts.items()}, num_rounds)
        timing.table(f"{sum(map(len, files)) / MIB:.0f} MiB to {title}", times, [RAW])
        ours = next(name for name in puts if name.startswith("phema_dist"))
        within &= timing.ratio(times, RAW, ours) >= LEAST_THROUGHPUT
    return within


def options(endpoint: str) -> dict[str, Any]:
    """Storage options for the sink, which checks nothing."""
    return {"key": "k", "secret": "s", "endpoint_url": endpoint, "client_kwargs": {"region_name": "us-east-1"}}


def sink(listener: socket.socket) -> None:
    """Serve S3 well enough for uploads: keep the sizes of objects, and drop their bytes."""
    sizes: dict[str, int] = {}
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=swallow, args=(connection, sizes), daemon=True).start()


def swallow(connection: socket.socket, sizes: dict[str, int]) -> None:
    """Answer the requests of one connection."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    view, data = memoryview(bytearray(MIB)), b""
    while True:
        while b"\r\n\r\n" not in data:
            received = connection.recv(2**16)
            if not received:
                return
            data += received
        head, _, data = data.partition(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        num_bytes = int(length[1]) if length else 0
        if b"100-continue" in head:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        left, data = num_bytes - len(data), b""
        while left > 0:
            left -= connection.recv_into(view, min(left, MIB))
        connection.sendall(answer(method, target, num_bytes, sizes))


def answer(method: str, target: str, num_bytes: int, sizes: dict[str, int]) -> bytes:
    """What S3 would say."""
    path, _, query = target.partition("?")
    status, body, length = "200 OK", "", None
    if method == "PUT":
        sizes[path] = num_bytes + (sizes.get(path, 0) if query else 0)
        body = "<CopyObjectResult><ETag>x</ETag></CopyObjectResult>" if not num_bytes else ""
    elif method == "POST":
        body = "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
        body = body if query.startswith("uploads") else "<CompleteMultipartUploadResult/>"
    elif method == "HEAD":
        status, length = ("200 OK", sizes[path]) if path in sizes else ("404 Not Found", 0)
    elif method == "GET":
        body = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    else:
        status = "204 No Content"
    length = len(body) if length is None else length
    return f'HTTP/1.1 {status}\r\nETag: "x"\r\nContent-Length: {length}\r\n\r\n{body}'.encode()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    num_rounds, num_bytes = (1, 40 * MIB) if arguments.quick else (arguments.rounds, 256 * MIB)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = multiprocessing.get_context("fork").Process(target=sink, args=(listener,), daemon=True)
    server.start()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="phema-bench-"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        print(timing.machine())
        files = [bytearray(num_bytes) for _ in range(2)]
        within = blocking(num_rounds, endpoint, files) & throughput(num_rounds, endpoint, folder, files)
    finally:
        dist.destroy_process_group()
        server.kill()
        shutil.rmtree(folder)
    print(f"\nblocked at most {MOST_BLOCKED:.0%}, and at least {LEAST_THROUGHPUT} of a raw write: {within}")


if __name__ == "__main__":
    main()
