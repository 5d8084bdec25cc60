"""What one update of the averages costs, and how long training waits for it.

    python benchmarks/update.py                                          64 M parameters, one process
    torchrun --nproc-per-node 2 benchmarks/update.py --ddp               the same under DDP: each rank owns a half
    python benchmarks/update.py --quick                                  1 M parameters, few rounds

Two profiles, float32 averages, one torch thread in each process as under torchrun. Against the library before this one
(posthoc_ema), ema_pytorch, a plain loop, and the physical limit: a copy that moves as many bytes, where the parameters
are read once and each average is read and written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import ema_pytorch
import posthoc_ema
import timing
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from phema_dist.ema import PostHocEMA
from phema_dist.profile import sigma_rel_to_gamma, update_weight
from phema_dist.ranks import ALONE
from phema_dist.training.layout import read_layout
from phema_dist.training.ownership import agree
from phema_dist.training.staging import Staging, segments
from phema_dist.training.tracker import Tracker

SIGMA_RELS = (0.05, 0.28)
NEVER = 10**9
LIMIT = "copy of the same bytes"
COPY = "copy of the parameters"
WIDTH = 1024  # a layer has 1 M parameters
WIDE = 4096  # 16 M: what a plain loop casts to float32 is too large to be kept by malloc, and paged in every time
STEPS = 4  # of each contestant in its turn


def make_model(num_layers: int, dtype: torch.dtype, width: int = WIDTH) -> nn.Module:
    """Layers of `width` squared parameters."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers))).to(dtype)


class PlainLoop:
    """What people write by hand: float32 averages, `average.lerp_(parameter.float(), weight)`."""

    def __init__(self, model: nn.Module) -> None:
        self.averages = [[p.detach().float().clone() for p in model.parameters()] for _ in SIGMA_RELS]
        self.gammas = [sigma_rel_to_gamma(sigma_rel) for sigma_rel in SIGMA_RELS]
        self.t = 1000

    @torch.no_grad()
    def update_(self, model: nn.Module) -> None:
        """Take all parameters into all averages."""
        self.t += 1
        for gamma, averages in zip(self.gammas, self.averages, strict=True):
            weight = update_weight(gamma, self.t, 1)
            for average, parameter in zip(averages, model.parameters(), strict=True):
                average.lerp_(parameter.float(), weight)


def copy_bytes(num_bytes: int) -> Callable[[], object]:
    """Return a copy that reads and writes `num_bytes` in all."""
    source, target = (torch.zeros(num_bytes // 8) for _ in range(2))
    return lambda: target.copy_(source)


def others(model: nn.Module, folder: Path) -> dict[str, Callable[[], object]]:
    """What a user would pick instead, each updating every time it is called."""
    before = posthoc_ema.PostHocEMA.from_model(
        model,
        folder / "posthoc_ema",
        sigma_rels=SIGMA_RELS,
        update_every=1,
        checkpoint_every=NEVER,
        update_after_step=0,
    )
    pytorch = ema_pytorch.PostHocEMA(
        model, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every_num_steps="manual",
        checkpoint_folder=str(folder / "ema_pytorch"),
    )  # fmt: skip
    loop = PlainLoop(model)
    return {
        "posthoc_ema": lambda: before.update_(model),
        "ema_pytorch": pytorch.update,
        "plain loop": lambda: loop.update_(model),
    }


def arithmetic(num_layers: int, num_rounds: int, folder: Path) -> None:
    """(a) The averages alone, from staged parameters, with the check for non-finite ones."""
    wide = num_layers * WIDTH**2 // WIDE**2
    cases = [(torch.bfloat16, wide, WIDE)] if wide else []  # first: a heap that was in use keeps large blocks, too
    cases += [(dtype, num_layers, WIDTH) for dtype in (torch.float32, torch.bfloat16)]
    for dtype, layers, width in cases:
        model = make_model(layers, dtype, width)
        parts = segments(agree(read_layout(model), ALONE).pieces)
        staging, tracker = Staging(parts), Tracker(parts, SIGMA_RELS)
        staging.fill(0, [part.pieces for part in parts])
        tracker.update(staging.slots[0], 1000)
        numel = sum(p.numel() for p in model.parameters())
        contestants = {
            LIMIT: copy_bytes(numel * (dtype.itemsize + len(SIGMA_RELS) * 2 * 4)),
            "phema_dist tracker": lambda s=staging, t=tracker: t.update(s.slots[0], t.t + 1),
            **others(model, folder / f"{dtype}-{width}"),
        }
        times = timing.in_turns(contestants, num_rounds)
        note = "; the other two average in bfloat16, which stops moving" if dtype == torch.bfloat16 else ""
        timing.table(
            f"(a) arithmetic, {numel / 1e6:.0f} M {dtype} in layers of {width}{note}",
            times,
            [LIMIT, "posthoc_ema", "plain loop"],
        )


class Step:
    """A simulated training step of about `seconds`: products of matrices on the training thread."""

    def __init__(self, seconds: float) -> None:
        self._matrix = torch.rand(512, 512)
        self._num_products = 1
        begin = time.perf_counter()
        for _ in range(20):
            self._matrix @ self._matrix
        self._num_products = round(seconds * 20 / (time.perf_counter() - begin))

    def __call__(self) -> None:
        """Compute."""
        for _ in range(self._num_products):
            self._matrix @ self._matrix


def blocked(
    contestants: dict[str, Callable[[], object]], ema: PostHocEMA, step: Callable[[], None] | None, num_rounds: int
) -> timing.Times:
    """Seconds that each update takes on the training thread, in turns of a few steps each."""
    times: timing.Times = {name: [] for name in contestants}
    for r in range(num_rounds + 1):
        for name, update in contestants.items():
            ema._session.writer.drain()  # noqa: SLF001  the others shall not wait for our thread
            for i in range(STEPS):
                if step is not None:
                    step()
                begin = time.perf_counter()
                update()
                if r and i:  # the first of a turn finds idle threads: not the steady state
                    times[name].append(time.perf_counter() - begin)
    return times


def training(num_layers: int, num_rounds: int, folder: Path, *, ddp: bool) -> None:
    """(b) How long `update_` keeps the training thread: all of the others' work, and our copy to the staging buffer."""
    for dtype in (torch.float32,) if ddp else (torch.float32, torch.bfloat16):
        model = make_model(num_layers, dtype)
        wrapped = DistributedDataParallel(model) if ddp else model
        run = folder / "run" if ddp else folder / f"run-{dtype}"
        ema = PostHocEMA.from_model(wrapped, run, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=NEVER)
        ema.update_(wrapped, t=1000)
        owned = sum(p.box.numel for segment in ema._session.segments for p in segment.pieces)  # noqa: SLF001
        rank = dist.get_rank() if ddp else 0
        contestants: dict[str, Callable[[], object]] = {
            COPY: copy_bytes(2 * owned * dtype.itemsize),
            "phema_dist update_": lambda e=ema, w=wrapped: e.update_(w),
            **others(model, folder / f"{dtype}-{rank}"),
        }
        if ddp:
            del contestants["ema_pytorch"], contestants["plain loop"]
        one_update = timing.in_turns({"": contestants["posthoc_ema"]}, 2)[""]
        for title, seconds in (
            ("compute between updates: a step takes 5 of posthoc_ema's updates", 5 * min(one_update)),
            ("steady state: an update after every short step, of 2 of posthoc_ema's updates", 2 * min(one_update)),
            ("no compute at all: updates come faster than they can be averaged, and wait", 0.0),
        ):
            times = blocked(contestants, ema, Step(seconds) if seconds else None, num_rounds)
            if rank == 0:
                where = f"DDP on {dist.get_world_size()} ranks, rank 0" if ddp else "one process"
                timing.table(
                    f"(b) training thread blocked, {where}, owns {owned / 1e6:.0f} M {dtype}; {title}",
                    times, [COPY, "posthoc_ema"],
                )  # fmt: skip
            if ddp:
                dist.barrier()
        ema._session.writer.abandon(60.0)  # noqa: SLF001  no last snapshot: only the disk would be measured


def main() -> None:
    """Measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    parser.add_argument("--ddp", action="store_true", help="under torchrun: only (b), each rank owns its share")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_layers, num_rounds = (1, 1) if arguments.quick else (64, 5)
    with timing.shared_folder(distributed=arguments.ddp) as (folder, rank):
        if rank == 0:
            print(timing.machine())
        if not arguments.ddp:
            arithmetic(num_layers, num_rounds, folder)
        training(num_layers, (num_rounds + 1) // 2, folder, ddp=arguments.ddp)


if __name__ == "__main__":
    main()
