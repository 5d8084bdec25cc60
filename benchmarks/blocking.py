"""What a training job on two ranks pays on its own thread, and what 5 000 parameters cost beyond their bytes.

    python benchmarks/blocking.py                                               5 000 parameters, one process
    torchrun --nproc-per-node 2 benchmarks/blocking.py --wrapper ddp            real steps, with and without the library
    torchrun --nproc-per-node 2 benchmarks/blocking.py --wrapper fsdp2
    … --quick                                                                   small, to see that it runs

Steps with and without phema_dist take turns. "blocked" is the time inside `update_` on the training thread; what the
background threads take from the cores shows in the steps themselves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timing
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from phema_dist.ema import PostHocEMA

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from digits import Denoiser, denoising_loss, load_digits

NEVER = 10**9
NUM_SMALL = 2500  # layers of two parameters


def many_small(num_rounds: int, folder: Path) -> None:
    """An update of 5 000 parameters of 100 elements: the time beyond a copy of the same bytes is ours."""
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(NUM_SMALL)))
    sources = [p.detach() for p in model.parameters()]
    targets = [torch.empty_like(p) for p in sources]
    flat = torch.cat([p.reshape(-1) for p in sources])
    copy = torch.empty_like(flat)
    ema = PostHocEMA.from_model(model, folder / "small", update_every=1, checkpoint_every=NEVER)
    writer = ema._session.writer  # noqa: SLF001

    def update() -> float:
        writer.settle()  # so that it never waits for the averages
        begin = time.perf_counter()
        ema.update_(model)
        return time.perf_counter() - begin

    contestants: dict[str, Callable[[], object]] = {
        "copy of one flat tensor": lambda: copy.copy_(flat),
        "_foreach_copy_ of the 5 000": lambda: torch._foreach_copy_(targets, sources),
    }
    times = timing.in_turns(contestants, num_rounds)
    times["phema_dist update_"] = [update() for _ in range(num_rounds)]
    timing.table(f"{2 * NUM_SMALL} parameters of 55 elements on average", times, ["_foreach_copy_ of the 5 000"])
    writer.abandon(60.0)


def digits(wrap: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, Callable[[], None]]:
    """The model of the examples, and a step of its training."""
    model = wrap(Denoiser())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = load_digits("train")

    def step() -> None:
        chosen = torch.randint(len(images), (128,))
        denoising_loss(model, images[chosen], labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def large(wrap: Callable[[nn.Module], nn.Module], width: int) -> tuple[nn.Module, Callable[[], None]]:
    """Six square layers (100 M parameters of 4096), and a step on 64 samples."""
    model = wrap(nn.Sequential(*(nn.Linear(width, width) for _ in range(6))))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        model(torch.randn(64, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def with_and_without(
    title: str, make: Callable[[], tuple[nn.Module, Callable[[], None]]], num_steps: int, num_rounds: int, folder: Path
) -> None:
    """Turns of `num_steps` steps, one update every ten and one snapshot in each turn."""
    model, step = make()
    ema = PostHocEMA.from_model(model, folder, update_every=10, checkpoint_every=num_steps)
    updates: list[float] = []
    snapshots: list[float] = []
    times: timing.Times = {"without": [], "with phema_dist": []}
    for r in range(num_rounds + 1):
        for name, found in times.items():
            ema._session.writer.drain()  # noqa: SLF001  else its threads would work in the other's turn
            if dist.is_initialized():
                dist.barrier()
            begin = time.perf_counter()
            for i in range(1, num_steps + 1):
                step()
                if name != "without":
                    before = time.perf_counter()
                    ema.update_(model)
                    blocked = time.perf_counter() - before
                    if r and i % 10 == 0:
                        (snapshots if i == num_steps else updates).append(blocked)
            if r:
                found.append((time.perf_counter() - begin) / num_steps)
    ema._session.writer.abandon(60.0)  # noqa: SLF001
    if not dist.is_initialized() or dist.get_rank() == 0:
        timing.table(f"{title}, a step", times, ["without"])
        one = median(times["without"])
        rows = [
            [name, f"{1e3 * median(found):.3g} ms", f"{100 * median(found) / one / share:.2f}%"]
            for name, found, share in (("update", updates, 10), ("snapshot", snapshots, num_steps))
        ]
        print()
        timing.print_rows(["blocked", "each", "share of the steps"], rows)


def main() -> None:
    """Measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--wrapper", choices=["ddp", "fsdp2"], help="under torchrun: real steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_rounds = 1 if arguments.quick else 7
    with timing.shared_folder(distributed=bool(arguments.wrapper)) as (folder, rank):
        if rank == 0:
            print(timing.machine())
        if not arguments.wrapper:
            many_small(20 * num_rounds, folder)
            return
        wrap = DistributedDataParallel if arguments.wrapper == "ddp" else fully_shard
        where = f"{arguments.wrapper} on {dist.get_world_size()} ranks"
        width, large_steps, digit_steps = (256, 20, 20) if arguments.quick else (4096, 20, 200)
        with_and_without(f"digits, {where}", lambda: digits(wrap), digit_steps, num_rounds, folder / "digits")
        with_and_without(
            f"{6 * width**2 / 1e6:.0f} M parameters, {where}", lambda: large(wrap, width), large_steps,
            (num_rounds + 1) // 2, folder / "large",
        )  # fmt: skip


if __name__ == "__main__":
    main()
