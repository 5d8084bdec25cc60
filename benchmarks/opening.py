"""How fast a big run opens: hundreds of thousands of tiny files, made by a script (`tests/big_run.py`).

    python benchmarks/opening.py              1 024 ranks x 64 snapshots x 2 profiles on the local disk, 0.8 GB
    python benchmarks/opening.py --quick      32 ranks x 8 snapshots
    python benchmarks/opening.py --s3         128 ranks x 16 snapshots on an S3 server on this machine

Each row is a process of its own, and its memory is what it needs beyond the imports. Local files are in the page cache.
An S3 server on this machine answers at once, so `--latency` adds what the way to a real one takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timing

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import big_run
from chaos_proxy import ChaosProxy
from s3_server import S3Server

from phema_dist.storage.manifest import INDEX_NAME
from phema_dist.storage.run import load_snapshots, open_run
from phema_dist.storage.store import Store, open_store
from phema_dist.synthesis.recipe import plan

BUCKET = "opening"
PUTS_AT_ONCE = 32


class WithoutIndexes:
    """A store that does not show its indexes: what a run was before it had any."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Every key but those of indexes."""
        return {key: size for key, size in self._store.list(prefix).items() if not key.endswith(f"/{INDEX_NAME}")}


def measured(store: Store, what: str) -> dict[str, float]:
    """Seconds and bytes of one thing that is done with a run."""
    run = open_run(store) if what in {"plan", "load"} else None
    verbs: Mapping[str, Callable[[], object]] = {
        "list": store.list,
        "open": lambda: open_run(store),
        "open without indexes": lambda: open_run(WithoutIndexes(store)),
        "plan": lambda: plan(run, [0.15]),
        "load": lambda: load_snapshots(store, [snapshot.folder for snapshot in run.complete]),
    }
    verb = verbs[what]
    before = timing.resident_bytes()
    begin, cpu = time.perf_counter(), time.process_time()
    verb()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu_seconds, "bytes": timing.resident_bytes(peak=True) - before}


def list_by_command(url: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of `phema ls` as a person types it, imports included."""
    command = [sys.executable, "-m", "phema_dist", "ls", url, "--storage-options", json.dumps(options)]
    begin = time.perf_counter()
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603  our own
    seconds = time.perf_counter() - begin
    print("\n" + "\n".join([*shown.splitlines()[:3], "…", *shown.splitlines()[-1:]]))
    return {"seconds": seconds, "cpu": float("nan"), "bytes": float("nan")}


@contextmanager
def on_disk(folder: Path, num_ranks: int, num_snapshots: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A run in a folder."""
    if not (folder / "run").exists():
        big_run.write(folder / "run", num_ranks, num_snapshots)
    yield str(folder / "run"), {}


@contextmanager
def on_s3(folder: Path, num_ranks: int, num_snapshots: int, latency: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """A run in a bucket of a server of our own."""
    with S3Server(folder) as server, ChaosProxy(server.address) as proxy:
        filesystem = server.filesystem()
        with contextlib.suppress(FileExistsError):
            filesystem.mkdir(BUCKET)
        files = {f"{BUCKET}/run/{key}": data for key, data in big_run.files(num_ranks, num_snapshots)}
        filesystem.pipe(files, batch_size=PUTS_AT_ONCE)
        proxy.latency_seconds = latency / 2
        yield f"s3://{BUCKET}/run", server.options(endpoint=proxy.endpoint if latency else None)


def compare(url: str, options: Mapping[str, Any]) -> None:
    """Print the table."""
    rows = []
    for what in ("list", "open", "open without indexes", "load", "plan"):
        found = timing.in_child(__file__, "--measure", what, url, json.dumps(options))
        rows.append([what, f"{found['seconds']:.2f} s", f"{found['cpu']:.2f} s", f"{found['bytes'] / 1e6:.0f} MB"])
    found = list_by_command(url, options)
    rows.append(["phema ls, imports included", f"{found['seconds']:.2f} s", "", ""])
    print()
    timing.print_rows(["", "time", "CPU", "peak memory"], rows)


def main() -> None:
    """Make the run, measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    parser.add_argument("--s3", action="store_true", help="on an S3 server that is started for it")
    parser.add_argument("--ranks", type=int, help="how many ranks wrote the run")
    parser.add_argument("--snapshots", type=int, help="how many snapshots it has")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to each request to S3")
    parser.add_argument("--folder", type=Path, help="where to make the files; default: the temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the run in --folder, and use the one left there")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "URL", "OPTIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, url, options = arguments.measure
        print(json.dumps(measured(open_store(url, json.loads(options)), what)))
        return

    num_ranks, num_snapshots = (32, 8) if arguments.quick else (128, 16) if arguments.s3 else (1024, 64)
    num_ranks, num_snapshots = arguments.ranks or num_ranks, arguments.snapshots or num_snapshots
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="phema-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    place = (
        on_s3(folder, num_ranks, num_snapshots, arguments.latency)
        if arguments.s3
        else on_disk(folder, num_ranks, num_snapshots)
    )
    try:
        with place as (url, options):
            os.sync()
            where = f"S3, {arguments.latency:g} s away" if arguments.s3 else "local disk"
            print(f"{timing.machine()}; {num_ranks} ranks x {num_snapshots} snapshots x 2 profiles, {where}")
            compare(url, options)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
