"""What the benchmarks share: contestants timed in turns, memory of a child process, tables.

The machine may be busy with other things, so a time by itself says little. Contestants take turns (A B C A B C …), and
what is reported of one against another is the median of the ratios of each round.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

Times = dict[str, list[float]]


@contextmanager
def shared_folder(*, distributed: bool) -> Iterator[tuple[Path, int]]:
    """A temporary folder and this process's rank; under torchrun, one folder for all ranks, which make a group."""
    rank, shared = 0, [tempfile.mkdtemp(prefix="phema-bench-")]
    if distributed:
        dist.init_process_group("gloo")
        rank, made = dist.get_rank(), shared[0]
        dist.broadcast_object_list(shared)
        if rank:
            Path(made).rmdir()
    try:
        yield Path(shared[0]), rank
    finally:
        if distributed:
            dist.barrier()
            dist.destroy_process_group()
        if rank == 0:
            shutil.rmtree(shared[0])


def in_turns(contestants: Mapping[str, Callable[[], object]], num_rounds: int) -> Times:
    """Seconds of each contestant in each round, after one round that is not counted."""
    times: Times = {name: [] for name in contestants}
    for r in range(num_rounds + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
            if r:
                times[name].append(seconds)
    return times


def ratio(times: Times, name: str, other: str) -> float:
    """How many times as long `name` takes as `other`: the median over the rounds."""
    return median(a / b for a, b in zip(times[name], times[other], strict=True))


def table(title: str, times: Times, units: Sequence[str]) -> None:
    """Print a median time for each contestant, and its ratio to each of `units`."""
    print(f"\n{title}\n")
    rows = []
    for name, found in times.items():
        ratios = [f"{ratio(times, name, unit):.2f}" for unit in units]
        rows.append([name, _milliseconds(median(found)), _milliseconds(min(found)), *ratios])
    print_rows(["", "median", "best", *(f"/ {unit}" for unit in units)], rows)


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, with columns aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in [header, rule, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        print("| " + " | ".join(cells) + " |")


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def machine() -> str:
    """What this runs on, in a line."""
    names = (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    threads = f"torch {torch.__version__} with {torch.get_num_threads()} thread(s)"
    return f"{next(names, 'unknown CPU')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {threads}"


def resident_bytes(*, peak: bool = False) -> int:
    """What this process holds in memory, now or at most so far (Linux)."""
    # Not getrusage: its peak is inherited from the process that started this one.
    field = "VmHWM:" if peak else "VmRSS:"
    return next(1024 * int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith(field))


def in_child(script: str, *arguments: str) -> dict[str, float]:
    """Run a benchmark script by itself and read the JSON it prints last."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own scripts
    return json.loads(done.stdout.splitlines()[-1])


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()
