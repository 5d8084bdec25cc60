"""How the rounding of what is stored compares with how far parameters move: both from what ranks measured.

All of it is relative to the root mean square of the parameters, at the newest snapshot that a synthesis may use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from phema_dist import profile, walk
from phema_dist.profile import Array, PowerProfile, Profile, Stored, UpdateHistory
from phema_dist.storage.snapshot import HALF_ULP

if TYPE_CHECKING:
    from phema_dist.storage.run import Run, Snapshot

# Mean square of the rounding of a number, by its square and that of HALF_ULP: errors lie evenly within half a unit,
# which is largest for the smallest number of its power of two, and logarithms of numbers lie evenly within that.
_ROUNDING = 2 * math.log(2) / 9
_COARSE = 2.0**-16  # a HALF_ULP above this is worth a solve of its own: float16 and bfloat16


@dataclass(frozen=True)
class Noise:
    """What is known of the stored averages, in the order in which they are given."""

    variance: float  # of an element's increments, in a unit of t
    roundings: Array  # [n], root mean square of an element's
    times: Array  # of updates

    @property
    def matters(self) -> bool:
        """Whether there is something stored in 16 bits; else coefficients are found as if there were no rounding."""
        return bool(np.any(self.roundings > _COARSE * math.sqrt(_ROUNDING)))

    def with_more(self, number: int) -> Noise:
        """The same, for so many further averages that are stored like the last one."""
        return replace(self, roundings=np.append(self.roundings, np.full(number, self.roundings[-1])))

    def fit(self, stored: Sequence[Stored], targets: Sequence[Profile]) -> tuple[Array, Array]:
        """As `profile.fit`, but noise-aware."""
        found = walk.fit(stored, targets, self.times, self.roundings**2 / self.variance)
        return profile.fit(stored, targets, found=found)

    def judge(self, stored: Sequence[Stored], x: Array, targets: Sequence[Profile]) -> tuple[Array, Array]:
        """What a synthesis x [n, m] is expected to err by, and what its target is from the parameters, each [m]."""
        errors, movements = walk.expected_errors(stored, x, targets, self.times)
        rounded = np.sum((self.roundings[:, None] * x) ** 2, axis=0)
        return np.sqrt(self.variance * errors + rounded), np.sqrt(self.variance * movements)


def noise_of(run: Run, snapshots: Sequence[Snapshot], t: int) -> Noise | None:
    """Of the first tracked averages of these complete snapshots, by t, then of the next; for targets that end at t.

    None if the ranks of the newest one, which was perhaps written before any did, or is of parameters that do not move,
    have not measured how far they move; or of one tracked average, which does not tell.
    """
    newest, sigma_rels = snapshots[-1], run.info.sigma_rels
    size = _mean_square(newest)
    if not size or run.info.imported:
        return None
    times = UpdateHistory(run.complete[-1].manifests[0].updates).times()
    times = walk.thinned(times[: np.searchsorted(times, t - run.info.origin) + 1])
    ends = [PowerProfile(sigma_rel, newest.t - run.info.origin) for sigma_rel in sigma_rels]
    variance = walk.variance(_sum(newest, "moved") / _sum(newest, "numel"), ends[0], ends[-1], times)
    if variance is None:
        return None
    halves = [HALF_ULP[s.manifests[0].dtype] * math.sqrt((_mean_square(s) or size) / size) for s in snapshots]
    return Noise(variance / size, np.tile(halves, len(sigma_rels)) * math.sqrt(_ROUNDING), times)


def _mean_square(snapshot: Snapshot) -> float | None:
    """Of the averages, all ranks together; None or 0 if that is not known."""
    if any(m.measured is None for m in snapshot.manifests) or not (numel := _sum(snapshot, "numel")):
        return None
    return _sum(snapshot, "squares") / numel


def _sum(snapshot: Snapshot, field: str) -> float:
    return math.fsum(getattr(m.measured, field) for m in snapshot.manifests)
