"""The same faults through phema_dist, torch.distributed.checkpoint and the predecessor: what each says, what is left.

    python benchmarks/faults.py

Each library stores three snapshots of one tensor, in a process of its own; the fault meets the second. Nothing is
imitated: the kernel refuses to let a file grow (as a full disk does), or kills the process at that byte, and what is
damaged is damaged in the files. Then another process reads each snapshot and compares it with those of a run without
faults.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import posthoc_ema
import timing
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from phema_dist import PostHocEMA, Power, synthesize
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store

SIDE = 700  # 2 MB
LIMIT = 2**20
LAST = 3
SIGMA_REL = 0.28
FAULTS = ("no space at t=2", "killed in t=2", "killed in t=2, started again", "bit flipped at t=3", "file cut at t=3")


class Library(Protocol):
    """How a library stores a snapshot at each t, and reads it."""

    def begin(self, folder: Path, t: int) -> Callable[[], str]:
        """Go on to train after t; the result makes one more snapshot and says what a user would see of an error."""

    def read(self, folder: Path, t: int) -> torch.Tensor:
        """The snapshot at t."""


def values(t: int) -> torch.Tensor:
    """The parameters after step t."""
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(t))


class Ours:
    """phema_dist: the log and `status` tell; `close` raises if the last snapshot was lost."""

    def begin(self, folder: Path, t: int) -> Callable[[], str]:
        """As `Library`."""
        model = nn.Linear(SIDE, SIDE, bias=False)
        ema = PostHocEMA.from_model(
            model, folder, sigma_rels=(0.05, SIGMA_REL), update_every=1, checkpoint_every=1, resume=t
        )

        def snapshot() -> str:
            before = ema._session.writer.counts.failed  # noqa: SLF001
            model.weight.data.copy_(values(ema.t + 1))
            ema.update_()
            ema._session.writer.drain()  # noqa: SLF001
            counts = ema._session.writer.counts  # noqa: SLF001
            return f"warning: {counts.last_error}" if counts.failed > before else ""

        return snapshot

    def read(self, folder: Path, t: int) -> torch.Tensor:
        """As `Library`."""
        snapshots = {snapshot.t: snapshot for snapshot in open_run(open_store(folder)).snapshots}
        if t not in snapshots or snapshots[t].problem:
            raise LookupError(f"not listed: {snapshots[t].problem}" if t in snapshots else "not listed")
        return synthesize(folder, [Power(SIGMA_REL, t=t)], strict=True)[0].state_dict["weight"]


class Checkpoint:
    """`dcp.async_save` with FsspecWriter, a folder for each t; the future tells."""

    def begin(self, folder: Path, t: int) -> Callable[[], str]:
        """As `Library`."""
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        ts = iter(range(t + 1, 100))

        def snapshot() -> str:
            place = folder / str(now := next(ts))
            writer = FsspecWriter(str(place))
            try:
                dcp.async_save({"weight": values(now)}, storage_writer=writer).result()
            except BaseException as error:  # noqa: BLE001  CheckpointException is none of Exception
                return f"{type(error).__name__}: {error}"
            return ""

        return snapshot

    def read(self, folder: Path, t: int) -> torch.Tensor:
        """As `Library`."""
        state = {"weight": torch.zeros(SIDE, SIDE)}
        dcp.load(state, storage_reader=FsspecReader(str(folder / str(t))), no_dist=True)
        return state["weight"]


class Predecessor:
    """posthoc_ema: `update_` raises."""

    def begin(self, folder: Path, t: int) -> Callable[[], str]:
        """As `Library`."""
        model = nn.Linear(SIDE, SIDE, bias=False)
        settings = {"sigma_rels": (0.05, SIGMA_REL), "update_every": 1, "checkpoint_every": 1}
        if t:
            ema = posthoc_ema.PostHocEMA.from_path(folder, model, **settings)
            for each in (ema, *ema.ema_models):
                each.update_after_step = 0
            ema.step = t
        else:
            ema = posthoc_ema.PostHocEMA.from_model(model, folder, **settings, update_after_step=0)

        def snapshot() -> str:
            model.weight.data.copy_(values(ema.step + 1))
            try:
                ema.update_(model)
            except Exception as error:  # noqa: BLE001
                return f"update_ raises {type(error).__name__}: {error}"
            return ""

        return snapshot

    def read(self, folder: Path, t: int) -> torch.Tensor:
        """As `Library`."""
        state = torch.load(folder / f"1.{t}.pt", weights_only=True)
        return next(tensor for name, tensor in state.items() if name.endswith("weight"))


LIBRARIES: dict[str, Library] = {
    "phema_dist": Ours(),
    "dcp.async_save": Checkpoint(),
    "posthoc_ema": Predecessor(),
}


@contextlib.contextmanager
def no_fault() -> Iterator[None]:
    """Nothing."""
    yield


@contextlib.contextmanager
def no_space() -> Iterator[None]:
    """No file grows beyond `LIMIT`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def death() -> Iterator[None]:
    """The process is killed when a file reaches `LIMIT`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with no_space():
        yield


def train(library: Library, folder: Path, fault: Callable[[], contextlib.AbstractContextManager[None]], t: int) -> str:
    """Make the snapshots after t; what was said at the first of them, or at the second of a fresh run."""
    snapshot = library.begin(folder, t)
    said = []
    for now in range(t + 1, LAST + 1):
        with fault() if now == 2 else no_fault():
            said.append(snapshot())
    return "; ".join(filter(None, said)) or "nothing"


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Keep half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def newest_file(folder: Path, before: set[Path]) -> Path:
    """The last of the biggest files that are new."""
    new = sorted(path for path in folder.rglob("*") if path.is_file() and path not in before)
    biggest = max(path.stat().st_size for path in new)
    return [path for path in new if path.stat().st_size == biggest][-1]


def call(function: Callable[[], object]) -> str:
    """What a function returns, as text, in a child; or how the child ended."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if not pid:
        logging.disable()
        warnings.simplefilter("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            writer.send(str(function()))
        except BaseException as error:  # noqa: BLE001
            writer.send(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    writer.close()
    try:
        return str(reader.recv())
    except EOFError:
        return "killed"
    finally:
        os.waitpid(pid, 0)


def look(library: Library, folder: Path, wanted: Path, t: int) -> str:
    """What a reader finds at t."""

    def compare() -> str:
        try:
            found = library.read(folder, t)
        except BaseException as error:  # noqa: BLE001
            return f"none ({short(f'{type(error).__name__}: {error}')})"
        return "right" if torch.equal(found, library.read(wanted, t)) else "WRONG, silently"

    return call(compare)


def short(text: str) -> str:
    """The beginning of a message."""
    if text.startswith("CheckpointException"):
        text = f"CheckpointException: {text.strip().splitlines()[-1]}"
    line = re.sub(r"/\S*/", "", " ".join(text.split())).replace("|", "/")
    return line if len(line) < 70 else f"{line[:67]} …"


def tell(name: str, library: Library, folder: Path) -> Iterator[list[str]]:
    """The rows of one library: fault, library, what it said, what is at t=1, 2 and 3."""
    wanted = folder / "wanted"
    wanted.mkdir(parents=True)
    call(partial(train, library, wanted, no_fault, 0))
    for fault in FAULTS:
        place = folder / fault.replace(" ", "-")
        place.mkdir()
        if "t=2" in fault:
            said = call(partial(train, library, place, no_space if "space" in fault else death, 0))
            if "again" in fault:
                said += "; then " + call(partial(train, library, place, no_fault, 1))
        else:
            said = "nothing"

            def train_and_note(place: Path = place) -> None:
                snapshot = library.begin(place, 0)
                for _ in range(LAST - 1):
                    snapshot()
                before = {path for path in place.rglob("*") if path.is_file()}
                snapshot()
                (flip if "flip" in fault else cut)(newest_file(place, before))  # noqa: B023  called at once

            call(train_and_note)
        yield [fault, name, short(said), *(look(library, place, wanted, t) for t in range(1, LAST + 1))]


def main() -> None:
    """Print one table, the libraries side by side."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="phema-faults-"))
    rows = [list(tell(name, library, folder / name)) for name, library in LIBRARIES.items()]
    header = ["fault", "library", "what it says", "t=1", "t=2", "t=3"]
    timing.print_rows(header, [row for rows_of_fault in zip(*rows, strict=True) for row in rows_of_fault])
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
