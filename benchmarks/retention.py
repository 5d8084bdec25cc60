"""How good the snapshots are that retention keeps, at every moment of a run, and what the choice costs.

    python benchmarks/retention.py                     20 kept of 200, 1 000 and 10 000 snapshots, as Markdown
    python benchmarks/retention.py --count 1000        up to so many

A snapshot comes, retention chooses, and the worst relative profile error over [min(sigma_rels), 0.28], at the newest t,
is compared with that of other 20 snapshots of the same run:

- evenly: at t/20, 2t/20, ... t, which only one who knows the length of the run could have kept;
- the last 20, which every other library keeps;
- best: anywhere on (0, t], found by an optimizer: the limit, which needs hindsight, too, and no grid.

Needs scipy, which comes with the extra `demo`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize  # type: ignore[import-untyped]

from phema_dist.schedule import snapshots_to_keep, worst_error

KEPT = 20
TRACKED = [(0.05, 0.28), (0.05, 0.10), (0.05, 0.10, 0.20)]
COUNTS = (200, 1000, 10_000)


def best_error(sigma_rels: Sequence[float]) -> float:
    """The worst error that the best 20 moments leave: a descent from evenly spread ones."""

    def moments(logs: npt.NDArray[np.float64]) -> list[float]:
        ends = np.cumsum(np.exp(logs))
        found: list[float] = (ends / ends[-1]).tolist()
        return found

    def loss(logs: npt.NDArray[np.float64]) -> float:
        return float(np.log(worst_error(moments(logs), sigma_rels)))

    starts = (np.zeros(KEPT), np.linspace(-2, 0, KEPT))
    found = [minimize(loss, start, method="Powell", options={"maxiter": 20, "xtol": 1e-2}) for start in starts]
    return float(np.exp(min(result.fun for result in found)))


def rows(sigma_rels: tuple[float, ...], count: int) -> None:
    """Play a run of `count` snapshots, and print a row at each of COUNTS."""
    even = worst_error(range(1, KEPT + 1), sigma_rels)
    best = best_error(sigma_rels)
    kept: tuple[int, ...] = ()
    ratios, milliseconds = [], []
    for t in range(1, count + 1):
        begin = time.process_time()
        kept = snapshots_to_keep((*kept, t), sigma_rels, KEPT)
        milliseconds.append(1e3 * (time.process_time() - begin))
        error = worst_error(kept, sigma_rels)
        if t >= KEPT:
            ratios.append(error / even)
        if t in COUNTS or t == count:
            last = worst_error(range(t - KEPT + 1, t + 1), sigma_rels)
            print(
                f"| {', '.join(map(str, sigma_rels))} | {t:,} | {error:.4f} | {even:.4f} | {last:.3f} | {best:.4f} | "
                f"{max(ratios):.2f} | {last / (max(ratios) * even):.1f} | {np.median(milliseconds):.1f} | "
                f"{np.quantile(milliseconds, 0.999):.0f} |",
                flush=True,
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=max(COUNTS), help="snapshots of the run")
    count = parser.parse_args().count
    others = f"evenly | last {KEPT} | best | largest ratio to evenly so far | last / that largest"
    print(f"| sigma_rels | snapshots | error of the {KEPT} kept | {others} | CPU ms a choice | 99.9% |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for sigma_rels in TRACKED:
        rows(sigma_rels, count)


if __name__ == "__main__":
    main()
