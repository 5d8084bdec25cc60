"""How the rounding of what is stored compares with how far parameters move: both from what ranks measured.

All of it is relative to the root mean square of the parameters, at the newest snapshot that a synthesis may use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from phema_dist import profile, walk
from phema_dist.profile import Array, PowerProfile, Profile, Stored
from phema_dist.storage.snapshot import HALF_ULP

if TYPE_CHECKING:
    from phema_dist.storage.run import Run, Snapshot

# Mean square of the rounding of a number, by its square and that of HALF_ULP: errors lie evenly within half a unit,
# which is largest for the smallest number of its power of two, and logarithms of numbers lie evenly within that.
_ROUNDING = 2 * math.log(2) / 9
_LEAST = 1e-100  # of squares that are believed
_COARSE = 2.0**-16  # a HALF_ULP above this is worth a solve of its own: float16 and bfloat16


@dataclass(frozen=True, eq=False)
class Noise:
    """What is known of stored averages, and of the parameters that they are of."""

    stored: tuple[Stored, ...]
    roundings: Array  # [n], root mean square of an element's
    times: Array  # of updates
    steps: Array  # [times], mean square of what an element moves by before each update

    @property
    def matters(self) -> bool:
        """Whether there is something stored in 16 bits; else coefficients are found as if there were no rounding."""
        return bool(np.any(self.roundings > _COARSE * math.sqrt(_ROUNDING)))

    @cached_property
    def _shares(self) -> Array:
        return walk.shares(self.stored, self.times)

    def with_more(self, more: Sequence[Stored]) -> Noise:
        """The same, with further averages that are stored like the last one."""
        roundings = np.append(self.roundings, np.full(len(more), self.roundings[-1]))
        return replace(self, stored=(*self.stored, *more), roundings=roundings)

    def fit(self, targets: Sequence[Profile]) -> tuple[Array, Array]:
        """As `profile.fit`, but noise-aware."""
        found = walk.fit(self._shares, targets, self.times, self.steps, self.roundings**2)
        return profile.fit(self.stored, targets, found=found)

    def judge(self, x: Array, targets: Sequence[Profile]) -> tuple[Array, Array]:
        """What a synthesis x [n, m] is expected to err by, and what its target is from the parameters, each [m]."""
        errors, movements = walk.expected_errors(self._shares, x, targets, self.times, self.steps)
        rounded = np.sum((self.roundings[:, None] * x) ** 2, axis=0)
        return np.sqrt(errors + rounded), np.sqrt(movements)


def noise_of(run: Run, t: int) -> Noise | None:
    """Of the first tracked averages of the complete snapshots up to t, then of the next; for targets that end at t.

    None if the ranks of the newest one, which was perhaps written before any did, or is of parameters that do not move,
    have not measured how far they move; or of one tracked average, which does not tell.
    """
    origin, sigma_rels = run.info.origin, run.info.sigma_rels
    snapshots = [s for s in run.complete if s.t <= t]
    known = [(s.t, *found) for s in snapshots if (found := _measured(s)) is not None]
    if not known or known[-1][0] != snapshots[-1].t or run.info.imported:
        return None
    size = known[-1][1]
    moved = [way / size for _, _, way in known]
    if not all(map(_is_plausible, moved)):
        return None
    times = walk.thinned(run.update_times[: np.searchsorted(run.update_times, t - origin) + 1])
    first, last = ([PowerProfile(sigma_rels[k], seen - origin) for seen, _, _ in known] for k in (0, -1))
    steps = walk.estimate(moved, first, last, times)
    if steps is None:
        return None
    sizes = {seen: mean / size for seen, mean, _ in known if _is_plausible(mean / size)}
    halves = [HALF_ULP[s.manifests[0].dtype] * math.sqrt(sizes.get(s.t, 1.0)) for s in snapshots]
    stored = tuple(PowerProfile(sigma_rel, s.t - origin) for sigma_rel in sigma_rels for s in snapshots)
    return Noise(stored, np.tile(halves, len(sigma_rels)) * math.sqrt(_ROUNDING), times, steps)


def _measured(snapshot: Snapshot) -> tuple[float, float] | None:
    """Mean squares of the averages and of how far they are apart, all ranks together, or None if that is not known.

    Tensors count by how much they move: a large one at rest says nothing of those that an average changes.
    """
    moved, squares, ways = [], [], []
    for manifest in snapshot.manifests:
        facts = manifest.measured
        if facts is None:
            return None
        share = facts.moved / max(1, facts.numel)  # of a rank that did not look at its tensors one by one
        moved.append(facts.moved)
        squares.append(facts.moving_squares or facts.squares * share)
        ways.append(facts.moving_moved or facts.moved * share)
    try:
        total, size, way = map(math.fsum, (moved, squares, ways))
    except OverflowError:
        return None
    if not (total > 0 and _is_plausible(size) and _is_plausible(way)):
        return None
    return (size / total, way / total)


def _is_plausible(square: float) -> bool:
    """Whether squares and quotients of it are numbers too. Somebody else may have written it."""
    return _LEAST < square < 1 / _LEAST
