"""How fast averages are made from stored snapshots, and in how much memory.

    python benchmarks/synthesis.py            20 snapshots x 2 profiles of 25 M float32 parameters: 4 GB
    python benchmarks/synthesis.py --quick    the same of 1 M

All files are in the page cache. Against the library before this one, which makes one average after another, and a
plain read of the same bytes into a buffer that is used again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import posthoc_ema
import timing
import torch
from torch import nn

from phema_dist.ema import PostHocEMA
from phema_dist.synthesis.consolidate import synthesize, synthesize_files

NUM_SNAPSHOTS = 20
SPACING = 1000  # steps from one to the next
ONE = (0.15,)
EIGHT = (0.06, 0.08, 0.10, 0.12, 0.15, 0.18, 0.21, 0.25)
DISTINCT = 4  # snapshots of the predecessor that are really different: more than any cache, and all fits in 8 GB


def make_model(num_layers: int) -> nn.Module:
    """Layers of 1 M parameters."""
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(num_layers)))


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Change all parameters, cheaply."""
    for parameter in model.parameters():
        parameter.mul_(0.9).add_(torch.rand(1))


def write_run(folder: Path, model: nn.Module) -> None:
    """Snapshots as training leaves them."""
    with PostHocEMA.from_model(model, folder, NUM_SNAPSHOTS, update_every=1, checkpoint_every=1) as ema:
        for i in range(NUM_SNAPSHOTS):
            train(model)
            ema.update_(model, t=(i + 1) * SPACING)
            ema._session.writer.drain()  # noqa: SLF001  else a slow disk would skip snapshots


def write_predecessors_run(folder: Path, model: nn.Module) -> None:
    """What the predecessor leaves; the same few files under several names, to save disk and page cache."""
    ema = posthoc_ema.PostHocEMA.from_model(
        model, folder, NUM_SNAPSHOTS, update_every=1, checkpoint_every=1, update_after_step=0
    )
    for _ in range(DISTINCT):
        train(model)
        ema.update_(model)
    made = sorted(folder.glob("*.pt"))
    for i in range(NUM_SNAPSHOTS // DISTINCT):
        for path in made:
            k, step = map(int, path.stem.split("."))
            os.link(path, folder / f"{k}.{SPACING * (i * DISTINCT + step)}.pt")
    for path in made:
        path.unlink()


def predecessors_synthesis(folder: Path, model: nn.Module) -> Callable[[], object]:
    """Return what a user of the predecessor calls, for one length."""
    ema = posthoc_ema.PostHocEMA.from_path(folder, model)

    def run() -> None:
        with ema.state_dict(ONE[0]):
            pass

    return run


def raw_read(folder: Path, num_threads: int) -> Callable[[], object]:
    """Return a read of every data file of a run, whole, by some threads, each into one buffer."""
    files = sorted(folder.rglob("*.safetensors"))

    def read(paths: Sequence[Path]) -> None:
        buffer = memoryview(bytearray(8 << 20))
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def run() -> None:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(read, [files[i::num_threads] for i in range(num_threads)]))

    return run


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


def main() -> None:
    """Make the runs, measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where to make the files (4.8 GB); default: the temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the runs in --folder, and use those left there")
    parser.add_argument("--memory-of", nargs=4, metavar=("KIND", "RUN", "NUMBER", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        kind, run, number, output = arguments.memory_of
        measure_memory(kind, run, int(number), output)
        return

    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="phema-bench-"))
    try:
        compare(folder, num_layers=1 if arguments.quick else 24, num_rounds=1 if arguments.quick else 4)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


def compare(folder: Path, num_layers: int, num_rounds: int) -> None:
    """Print the tables."""
    ours, theirs, files = folder / "ours", folder / "predecessor", folder / "files"
    model = make_model(num_layers)
    if not ours.exists():
        write_run(ours, model)
        write_predecessors_run(theirs, model)
    os.sync()
    num_bytes = sum(path.stat().st_size for path in ours.rglob("*.safetensors"))
    print(f"{timing.machine()}; {NUM_SNAPSHOTS} snapshots x 2 profiles, {num_bytes / 1e9:.2f} GB")

    for name, sigma_rels in (("one sigma_rel", ONE), ("eight sigma_rels (posthoc_ema: 8 x one)", EIGHT)):
        outputs = {sigma_rel: files / f"{sigma_rel}.safetensors" for sigma_rel in sigma_rels}
        times = timing.in_turns(
            {
                "raw read, 1 thread": raw_read(ours, 1),
                "raw read, 2 threads": raw_read(ours, 2),
                "phema_dist, tensors": lambda s=sigma_rels: synthesize(ours, s),
                "phema_dist, files": lambda o=outputs: synthesize_files(ours, o, overwrite=True),
                "posthoc_ema": predecessors_synthesis(theirs, model),
            },
            num_rounds,
        )
        # It makes one length after another, so eight take as long as eight times one: not worth the minutes.
        times["posthoc_ema"] = [seconds * len(sigma_rels) for seconds in times["posthoc_ema"]]
        timing.table(name, times, ["raw read, 1 thread", "raw read, 2 threads", "posthoc_ema"])

    print("\npeak memory beyond the imports, in a process of its own\n")
    rows = []
    for kind in ("tensors", "files"):
        for number in (1, 8):
            shutil.rmtree(files, ignore_errors=True)
            found = timing.in_child(__file__, "--memory-of", kind, str(ours), str(number), str(files))
            sizes = (found["peak"], found["output"], found["peak"] - found["output"])
            rows.append([f"{number} to {kind}", *(f"{n / 1e6:.0f} MB" for n in sizes)])
    timing.print_rows(["", "peak", "output", "beyond it"], rows)


if __name__ == "__main__":
    main()
