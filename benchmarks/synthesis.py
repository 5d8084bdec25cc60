"""How fast averages are made from stored snapshots, and in how much memory.

    python benchmarks/synthesis.py            0.1, 0.4 and 2 GB of parameters: about a quarter of an hour, 12 GB of disk
    python benchmarks/synthesis.py --quick    4 MB, to see that it runs
    python benchmarks/synthesis.py --core     the first table only

All files are in the page cache (or, of S3, in that of the server), and of the larger runs most are hard links to a few.
Against the library before this one, which makes one average after another; a plain loop over full checkpoints; one
`dcp.load` of a plain checkpoint; and a raw read of the same bytes into a buffer that is used again and again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import posthoc_ema
import timing
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn

from phema_dist.ema import PostHocEMA
from phema_dist.shard import whole
from phema_dist.storage.manifest import manifest_name, snapshot_folder, to_json
from phema_dist.storage.run import Run, open_run
from phema_dist.storage.store import Store, open_store
from phema_dist.synthesis.checkpoint import Form, cut, items_of
from phema_dist.synthesis.consolidate import synthesize, synthesize_files
from phema_dist.synthesis.recipe import plan
from phema_dist.synthesis.stream import stream

SPACING = 1000  # steps from one snapshot to the next
ONE = (0.15,)
EIGHT = (0.06, 0.08, 0.10, 0.12, 0.15, 0.18, 0.21, 0.25)
Contestant = Callable[[], object]


def make_model(num_layers: int) -> nn.Module:
    """Layers of 1 M parameters."""
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(num_layers)))


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Change all parameters, cheaply."""
    for parameter in model.parameters():
        parameter.mul_(0.9).add_(torch.rand(1))


def write_run(folder: Path, model: nn.Module, num_snapshots: int, num_distinct: int) -> None:
    """Snapshots as training leaves them; beyond the first few, the same files under a later t."""
    with PostHocEMA.from_model(model, folder, num_snapshots, update_every=1, checkpoint_every=1) as ema:
        for i in range(num_distinct):
            train(model)
            ema.update_(model, t=(i + 1) * SPACING)
            ema._session.writer.drain()  # noqa: SLF001  else a slow disk would skip snapshots
    run = open_run(open_store(folder))
    for i in range(num_distinct, num_snapshots):
        (manifest,) = run.complete[i % num_distinct].manifests
        copy = replace(manifest, t=(i + 1) * SPACING, updates=(((i + 1) * SPACING, i + 1),))
        old, new = (folder / snapshot_folder(m.t, m.attempt) for m in (manifest, copy))
        for file in manifest.files:
            (new / file.name).parent.mkdir(parents=True, exist_ok=True)
            os.link(old / file.name, new / file.name)
        (new / manifest_name(0, 1)).write_bytes(to_json(copy))


def write_predecessors_run(folder: Path, model: nn.Module, num_snapshots: int, num_distinct: int) -> None:
    """What the predecessor leaves, in the same way."""
    ema = posthoc_ema.PostHocEMA.from_model(
        model, folder, num_snapshots, update_every=1, checkpoint_every=1, update_after_step=0
    )
    for _ in range(num_distinct):
        train(model)
        ema.update_(model)
    made = sorted(folder.glob("*.pt"))
    for i in range(num_snapshots):
        for path in made:
            k, step = map(int, path.stem.split("."))
            if step == i % num_distinct + 1:
                os.link(path, folder / f"{k}.{SPACING * (i + 1)}.pt")
    for path in made:
        path.unlink()


def predecessors_synthesis(folder: Path, model: nn.Module) -> Contestant:
    """Return what a user of the predecessor calls, for one length."""
    ema = posthoc_ema.PostHocEMA.from_path(folder, model)

    def run() -> None:
        with ema.state_dict(ONE[0]):
            pass

    return run


def plain_loop(run: Run, sigma_rels: Sequence[float]) -> Contestant:
    """Return the loop that one would write: each file is a full checkpoint, mapped into memory and added."""
    recipes = plan(run, sigma_rels)

    def add() -> None:
        for recipe in recipes:
            total: dict[str, torch.Tensor] = {}
            for term in recipe.terms:
                path = f"{run.store.describe(term.snapshot.folder)}/sigma_rel-{term.sigma_rel}/rank-00000.safetensors"
                for name, value in load_file(path).items():
                    if name in total:
                        total[name].add_(value, alpha=term.coefficient)
                    else:
                        total[name] = value * term.coefficient

    return add


def raw_read(run: Run, num_threads: int, ranks: tuple[int, int] = (0, 1)) -> Contestant:
    """Return a read of every data file of a run (or one rank's share), whole, by some threads, each into one buffer."""
    keys = [
        (f"{snapshot.folder}/{file.name}", file.header_bytes + file.data_bytes)
        for snapshot in run.complete
        for manifest in snapshot.manifests
        for file in manifest.files
    ][ranks[0] :: ranks[1]]

    def read(some: Sequence[tuple[str, int]]) -> None:
        buffer = memoryview(bytearray(8 << 20))
        for key, num_bytes in some:
            for start in range(0, num_bytes, len(buffer)):
                run.store.read_into(key, start, buffer[: num_bytes - start])

    def read_all() -> None:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(read, [keys[i::num_threads] for i in range(num_threads)]))

    return read_all


def ours_in_part(run: Run, sigma_rels: Sequence[float], rank: int, world_size: int) -> Contestant:
    """Return the synthesis of one rank's share, cut as `torchrun -m phema_dist synthesize` cuts it."""
    recipes = plan(run, sigma_rels)
    parts = [(item, whole(item.shape)) for item in items_of(run.info, Form())]
    boxes = {item.fqn: [box] for item, box in cut(parts, rank, world_size)}

    def make() -> None:
        held = [{name: torch.empty(box.sizes) for name, (box,) in boxes.items()} for _ in recipes]
        stream(
            run.store,
            run.info,
            recipes,
            lambda k, name, box, x: held[k][name][box.relative_to(boxes[name][0])].copy_(x),
            wanted=boxes,
        )

    return make


def serve(kind: str, run: str, number: int, rank: int) -> None:
    """In a child, one of two: do a rank's half each time that a line comes, and answer."""
    opened = open_run(open_store(run))
    torch.set_num_threads(1)
    work = (
        raw_read(opened, 1, (rank, 2))
        if kind == "raw"
        else ours_in_part(opened, ONE if number == 1 else EIGHT, rank, 2)
    )
    for _ in sys.stdin:
        work()
        print("done", flush=True)


@contextmanager
def two_ranks(kind: str, run: Path, number: int) -> Iterator[Contestant]:
    """Two processes, each with its half, as one contestant."""
    commands = [[sys.executable, __file__, "--serve", kind, str(run), str(number), str(rank)] for rank in range(2)]
    pipes = subprocess.PIPE
    ranks = [subprocess.Popen(command, stdin=pipes, stdout=pipes, text=True) for command in commands]  # noqa: S603

    def work() -> None:
        for rank in ranks:
            rank.stdin.write("\n")
            rank.stdin.flush()
        for rank in ranks:
            assert rank.stdout.readline() == "done\n"

    try:
        yield work
    finally:
        for rank in ranks:
            rank.communicate()


def new_results(model: nn.Module) -> list[torch.Tensor]:
    """Write one average's worth of memory that this process did not hold before."""
    return [torch.ones_like(parameter) for parameter in model.parameters()]


def load_one(folder: Path, model: nn.Module) -> Contestant:
    """Return a `dcp.load` of one plain checkpoint of the model."""
    if not folder.exists():
        dcp.save(model.state_dict(), checkpoint_id=folder, no_dist=True)
    state = {name: torch.empty_like(value) for name, value in model.state_dict().items()}
    return lambda: dcp.load(state, checkpoint_id=folder, no_dist=True)


def measure_memory(kind: str, run: str, number: int, output: str) -> None:
    """In a child: make averages, and print how much memory that took beyond the imports."""
    sigma_rels = ONE if number == 1 else EIGHT
    before = timing.resident_bytes()
    if kind == "tensors":
        made = synthesize(run, sigma_rels)
        output_bytes = sum(tensor.nbytes for s in made for tensor in s.state_dict.values())
    else:
        outputs = {sigma_rel: Path(output) / f"{sigma_rel}.safetensors" for sigma_rel in sigma_rels}
        synthesize_files(run, outputs)
        output_bytes = 0  # it is on disk
    print(json.dumps({"peak": timing.resident_bytes(peak=True) - before, "output": output_bytes}))


class Bench:
    """One size of a model: its runs, and what is measured on them."""

    def __init__(self, folder: Path, num_layers: int, num_snapshots: int, num_distinct: int) -> None:
        self.folder = folder / f"{num_layers}x{num_snapshots}"
        self.ours, self.theirs = self.folder / "ours", self.folder / "predecessor"
        self.model = make_model(num_layers)
        if not self.folder.exists():
            write_run(self.ours, self.model, num_snapshots, num_distinct)
            write_predecessors_run(self.theirs, self.model, num_snapshots, num_distinct)
        os.sync()
        self.run = open_run(open_store(self.ours))
        one = sum(parameter.nbytes for parameter in self.model.parameters())
        self.title = f"{one / 1e9:.2g} GB of parameters, {num_snapshots} snapshots x 2 profiles"

    def compare(self, sigma_rels: Sequence[float], num_rounds: int, *, files: bool = False) -> None:
        """Against everything."""
        contestants = {
            "raw read, 1 thread": raw_read(self.run, 1),
            "raw read, 2 threads": raw_read(self.run, 2),
            "results filled with ones": lambda: [new_results(self.model) for _ in sigma_rels],
            "phema_dist, tensors": lambda: synthesize(self.ours, sigma_rels),
            "posthoc_ema": predecessors_synthesis(self.theirs, self.model),
            "plain loop": plain_loop(self.run, ONE),
            "dcp.load of one checkpoint": load_one(self.folder / "dcp", self.model),
        }
        if files:
            outputs = {sigma_rel: self.folder / "files" / f"{sigma_rel}.safetensors" for sigma_rel in sigma_rels}
            contestants["phema_dist, files"] = lambda: synthesize_files(self.ours, outputs, overwrite=True)
        times, cpu = in_turns(contestants, num_rounds)
        # They make one length after another, so eight take as long as eight times one: not worth the minutes.
        for name in ("posthoc_ema", "plain loop"):
            for found in (times, cpu):
                found[name] = [seconds * len(sigma_rels) for seconds in found[name]]
        units = ["raw read, 1 thread", "raw read, 2 threads", "posthoc_ema"]
        timing.table(f"{self.title}: {len(sigma_rels)} averages", times, units)
        ratios = [[name, f"{timing.ratio(cpu, name, units[0]):.2f}"] for name in cpu]
        print()
        timing.print_rows(["core seconds", f"/ {units[0]}"], ratios)

    def compare_ranks(self, number: int, num_rounds: int) -> None:
        """One process, then two that each make half."""
        sigma_rels = ONE if number == 1 else EIGHT
        with two_ranks("raw", self.ours, number) as raw, two_ranks("ours", self.ours, number) as ours:
            contestants = {
                "raw read, 1 process": raw_read(self.run, 1),
                "raw read, 2 processes": raw,
                "phema_dist, 1 process": ours_in_part(self.run, sigma_rels, 0, 1),
                "phema_dist, 2 processes": ours,
            }
            times = timing.in_turns(contestants, num_rounds)
        timing.table(f"{self.title}: {number} averages on 1 and 2 ranks", times, ["raw read, 1 process"])

    def memory(self) -> None:
        """What it holds at most."""
        print(f"\n{self.title}: peak memory beyond the imports, in a process of its own\n")
        files, rows = self.folder / "files", []
        for kind in ("tensors", "files"):
            for number in (1, 8):
                shutil.rmtree(files, ignore_errors=True)
                found = timing.in_child(__file__, "--memory-of", kind, str(self.ours), str(number), str(files))
                sizes = (found["peak"], found["output"], found["peak"] - found["output"])
                rows.append([f"{number} to {kind}", *(f"{n / 1e6:.0f} MB" for n in sizes)])
        timing.print_rows(["", "peak", "output", "beyond it"], rows)

    def object_store(self, num_rounds: int) -> None:
        """The same from an S3 server on this machine, which shares its cores."""
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        from s3_server import S3Server  # noqa: PLC0415  of the tests

        with S3Server(self.folder / "s3") as server:
            server.filesystem().mkdir("bench")
            url, options = "s3://bench/run", server.options()
            remote = open_store(url, options)
            upload(self.run.store, remote)
            raw = raw_read(open_run(remote), remote.read_concurrency)
            for sigma_rels in (ONE, EIGHT):
                make = partial(synthesize, url, sigma_rels, storage_options=options)
                times = timing.in_turns({"raw read, 16 threads": raw, "phema_dist, tensors": make}, num_rounds)
                timing.table(f"{self.title}, S3: {len(sigma_rels)} averages", times, ["raw read, 16 threads"])


def upload(here: Store, there: Store) -> None:
    """Copy a run."""
    for key in here.list():
        there.put(key, here.get(key))


def in_turns(contestants: dict[str, Contestant], num_rounds: int) -> tuple[timing.Times, timing.Times]:
    """Seconds, and core seconds, of each contestant in each round."""
    cpu: timing.Times = {name: [] for name in contestants}

    def timed(name: str) -> None:
        begin = time.process_time()
        contestants[name]()
        cpu[name].append(time.process_time() - begin)

    times = timing.in_turns({name: partial(timed, name) for name in contestants}, num_rounds)
    return times, {name: found[1:] for name, found in cpu.items()}


def main() -> None:
    """Make the runs, measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--core", action="store_true", help="only 0.1 GB of parameters, on a local disk")
    parser.add_argument("--folder", type=Path, help="where to make the files; default: the temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the runs in --folder, and use those left there")
    parser.add_argument("--memory-of", nargs=4, metavar=("KIND", "RUN", "NUMBER", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=4, metavar=("KIND", "RUN", "NUMBER", "RANK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("phema_dist").setLevel(logging.ERROR)  # certificates are not the subject here
    if arguments.memory_of:
        kind, run, number, output = arguments.memory_of
        measure_memory(kind, run, int(number), output)
        return
    if arguments.serve:
        kind, run, number, rank = arguments.serve
        serve(kind, run, int(number), int(rank))
        return

    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="phema-bench-"))
    print(timing.machine())
    try:
        measure(folder, quick=arguments.quick, core=arguments.core)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, *, quick: bool, core: bool) -> None:
    """Print the tables, the core one first."""
    rounds = 1 if quick else 4
    first = Bench(folder, 1 if quick else 24, 4 if quick else 20, 4)
    for sigma_rels in (ONE, EIGHT):
        first.compare(sigma_rels, rounds, files=True)
    if core:
        return
    for number in (1, 8):
        first.compare_ranks(number, rounds)
    first.memory()
    # Number of layers, of snapshots, of rounds. Eight averages of 2 GB would be 16 GB of results.
    sizes = [(24, 10, 3), (24, 40, 3), (95, 10, 2), (95, 40, 1), (476, 10, 1)]
    for num_layers, num_snapshots, num_rounds in [(2, 2, 1)] if quick else sizes:
        bench = Bench(folder, num_layers, num_snapshots, 1 if quick or num_layers > 24 else 4)
        for sigma_rels in (ONE, EIGHT) if num_layers < 476 else (ONE,):
            bench.compare(sigma_rels, num_rounds)
        if num_snapshots == 10 and num_layers > 24:
            bench.compare_ranks(1, num_rounds)
        if (num_layers, num_snapshots) in {(24, 10), (2, 2)}:
            bench.object_store(num_rounds)
        shutil.rmtree(bench.folder)


if __name__ == "__main__":
    main()
