"""What `phema plan` chooses, beside what one would do without it, and whether a run then is as it was predicted.

    python benchmarks/planning.py

For each range of sigma_rel, with 20 snapshots: the worst profile error at the end and at the worst stop in the second
half of the run, of the plan, of the defaults (0.05, 0.28) with retention, and of keeping the last 20 of 200. The
limit is the least worst error that a fine grid of pairs finds. Then runs of one-hot parameters measure what was
predicted. It takes about a minute.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import nn

from phema_dist import Plan, PostHocEMA, plan, synthesize
from phema_dist.prediction import update_times
from phema_dist.profile import PowerProfile
from phema_dist.schedule import reconstruction_errors

RANGES = ((0.05, 0.20), (0.05, 0.28), (0.02, 0.15))
GRID = 24
FINE = 80  # of targets to measure: bumps between tracked sigma_rels may be narrow


def main() -> None:
    """Print both tables."""
    print(f"{'range':<12}{'of 20 snapshots':<28}{'sigma_rels':<22}{'worst':>9}{'if stopped':>12}{'plan takes':>12}")
    for wanted in RANGES:
        low, high = wanted
        begin = time.perf_counter()
        chosen = plan(200_000, 10**9, sigma_rel_range=wanted, max_checkpoints=20)
        seconds = f"{time.perf_counter() - begin:.1f} s"
        default = plan(
            200_000, 10**9, sigma_rel_range=wanted, max_checkpoints=20, sigma_rels=(0.05, 0.28), checkpoint_every=1000
        )
        for name, p, took in (("the plan", chosen, seconds), ("(0.05, 0.28) of 200", default, "")):
            row(wanted, name, p.sigma_rels, p.worst_error, p.stop_error, took)
        row(wanted, "the last 20 of 200", (0.05, 0.28), worst(range(181, 201), (0.05, 0.28), wanted))
        grid = sorted({*np.geomspace(low / 1.4, min(high * 1.4, 12**-0.5), GRID).tolist(), low, high})
        best = min(combinations(grid, 2), key=lambda pair: worst(range(1, 21), pair, wanted))
        row(wanted, "limit: best pair of a grid", best, worst(range(1, 21), best, wanted))
    print(f"\n{'a run of one-hot parameters':<44}{'predicted':>11}{'measured':>11}{'ratio':>8}")
    for name, p in {
        "1200 calls, the plan of 12 snapshots": plan(1200, 1201, max_checkpoints=12),
        "1000 calls, 8 of 43 kept, update_every 7": plan(
            1000, 1001, sigma_rels=(0.05, 0.28), max_checkpoints=8, checkpoint_every=23, update_every=7
        ),
        "300 calls, update_every 15": plan(300, 301, sigma_rels=(0.05, 0.28), max_checkpoints=10, update_every=15),
    }.items():
        found = measured(p)
        print(f"{name:<44}{p.worst_error:>11.3%}{found:>11.3%}{found / p.worst_error:>8.3f}")


def row(
    wanted: Sequence[float], name: str, sigma_rels: Sequence[float], error: float, stop: float = np.nan, took: str = ""
) -> None:
    """Print a line of the first table."""
    tracked = ", ".join(f"{s:.3g}" for s in sigma_rels)
    stopped = "" if np.isnan(stop) else f"{stop:.3%}"
    print(f"{wanted[0]:g}-{wanted[1]:<7g}{name:<28}{tracked:<22}{error:>9.3%}{stopped:>12}{took:>12}")


def worst(ts: Sequence[int], sigma_rels: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest error over a range."""
    return float(reconstruction_errors(ts, sigma_rels, np.geomspace(*wanted, GRID)).max())


def measured(chosen: Plan) -> float:
    """The worst error of a real run, against averages tracked directly, over the updates it made."""
    model = nn.Linear(chosen.steps + 1, 1, bias=False, dtype=torch.float64)
    times = update_times(chosen)
    targets = np.geomspace(*chosen.sigma_rel_range, FINE).tolist()
    with tempfile.TemporaryDirectory() as folder:
        with PostHocEMA.from_model(model, Path(folder) / "run", plan=chosen) as ema, torch.no_grad():
            for t in range(1, chosen.steps + 1):
                model.weight.zero_()
                model.weight[0, t] = 1
                ema.update_(model)
                if t % chosen.checkpoint_every == 0:
                    while ema.status()["snapshots_written"] < t // chosen.checkpoint_every:
                        time.sleep(1e-3)  # or a slow disk would skip snapshots
        averages = synthesize(Path(folder) / "run", targets)
    errors = []
    for sigma_rel, average in zip(targets, averages, strict=True):
        wanted = np.zeros(len(times))
        power = PowerProfile(sigma_rel, float(times[-1])).gamma + 1
        for i, (before, t) in enumerate(zip([0.0, *times[:-1]], times, strict=True)):
            wanted *= (before / t) ** power
            wanted[i] = 1 - (before / t) ** power
        off = (average.state_dict["weight"].numpy()[0, times.astype(int)] - wanted) ** 2
        widths = np.diff(times, prepend=0)
        errors.append(float(np.sqrt((off / widths).sum() / (wanted**2 / widths).sum())))
    return max(errors)


if __name__ == "__main__":
    main()
