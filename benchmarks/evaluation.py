"""What it costs to evaluate an average in the live model: the way in and the way out, without the evaluation.

    python benchmarks/evaluation.py                                      67 M parameters, one process
    torchrun --standalone --nproc-per-node 2 benchmarks/evaluation.py    the same under DDP: each rank owns a half
    python benchmarks/evaluation.py --quick                              1 M parameters, few rounds

A tracked length comes from the averages as they are, another one from 8 snapshots in the page cache. Against
posthoc_ema, which reads its snapshots for either (one process), an all-gather of the parameters over gloo (DDP), and
the physical limit: three copies of the parameters, to keep them, to put the average in, and to put them back.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import posthoc_ema
import timing
import torch
import torch.distributed as dist
from torch import nn

from phema_dist.ema import PostHocEMA

SIGMA_RELS = (0.05, 0.28)
WIDTH = 1024
NUM_SNAPSHOTS = 8
LIMIT = "three copies"


def three_copies(model: nn.Module) -> Callable[[], object]:
    """Return what has to be done at least."""
    parameters = [parameter.data for parameter in model.parameters()]
    averages, backup = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def copy() -> None:
        for source, target in ((parameters, backup), (averages, parameters), (backup, parameters)):
            torch._foreach_copy_(target, source)

    return copy


def entered(enter: Callable[[], AbstractContextManager[object]]) -> Callable[[], None]:
    """Return the way in and the way out."""

    def run() -> None:
        with enter():
            pass

    return run


def all_gather(model: nn.Module) -> Callable[[], object]:
    """Return an exchange of the parameters, each rank giving its part: what replicas that share them need at least."""
    numel = sum(parameter.numel() for parameter in model.parameters())
    part = torch.zeros(-(-numel // dist.get_world_size()))
    parts = [torch.zeros_like(part) for _ in range(dist.get_world_size())]
    return lambda: dist.all_gather(parts, part)


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    layers, num_rounds = (1, 3) if quick else (64, 7)
    torch.set_num_threads(1)
    with timing.shared_folder(distributed=int(os.environ.get("WORLD_SIZE", "1")) > 1) as (folder, rank):
        measure(folder, rank, layers, num_rounds)


def measure(folder: Path, rank: int, layers: int, num_rounds: int) -> None:
    """Train for a moment, and enter in turns."""
    ddp = dist.is_initialized()
    bare = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    model = nn.parallel.DistributedDataParallel(bare) if ddp else bare
    ema = PostHocEMA.from_model(model, folder / "run", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=2)
    for _ in range(2 * NUM_SNAPSHOTS):
        with torch.no_grad():
            for parameter in bare.parameters():
                parameter.add_(0.01)
        ema.update_(model)
        ema._session.writer.drain()  # type: ignore[union-attr]  # noqa: SLF001  these steps take no time
    contestants: dict[str, Callable[[], object]] = {LIMIT: three_copies(bare)}
    contestants["phema_dist, tracked"] = entered(lambda: ema.model(model, 0.05, exchange=ddp))
    contestants["phema_dist, from storage"] = entered(lambda: ema.model(model, 0.1))
    if ddp:
        contestants["phema_dist, from storage, exchange"] = entered(lambda: ema.model(model, 0.1, exchange=True))
        contestants["all-gather"] = all_gather(bare)
    else:
        before = posthoc_ema.PostHocEMA.from_model(
            bare, folder / "before", sigma_rels=SIGMA_RELS, update_every=1, checkpoint_every=2, update_after_step=0
        )
        for _ in range(2 * NUM_SNAPSHOTS):
            before.update_(bare)
        contestants["posthoc_ema"] = entered(lambda: before.model(bare, sigma_rel=0.1))
    times = timing.in_turns(contestants, num_rounds)
    if rank == 0:
        numel = sum(parameter.numel() for parameter in bare.parameters())
        timing.table(
            f"an average in the live model, {numel / 1e6:.0f} M float32, {'DDP on 2 ranks' if ddp else 'one process'}",
            times,
            [LIMIT, "all-gather" if ddp else "posthoc_ema"],
        )
    ema.close()


if __name__ == "__main__":
    main()
