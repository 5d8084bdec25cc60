"""What an error of a profile does to parameters, if they move like a random walk.

Model: in the time w_j before update j, each element of the parameters moves by an independent increment of variance
v_j w_j. An average holds a share S_j of that increment: the mass that its profile has from update j on. So two averages
with shares S and Q differ by sum_j v_j w_j (S_j - Q_j)^2, mean square over the elements; for dense updates and a
constant v that is v times the integral of (P - Q)^2, where P and Q are the cumulated profiles: for two power profiles
with a = gamma + 1 and b that end at t, 2 (a - b)^2 t / ((2a + 1) (2b + 1) (a + b + 1)). A synthesis errs by
sum_j v_j w_j R_j^2, where R = sum_i x_i S_i - S_target, and by the rounding of what is stored, sum_i x_i^2 s_i^2. v
changes as the learning rate does; each snapshot tells of another while. Pure float64 arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from phema_dist.profile import Array, Profile, Stored, constrained_least_squares

GOOD_NOISE = 0.005  # an expected relative change of the parameters, by rounding, above this is worth a warning
_MOST_TIMES = 4096  # about 40 in the shortest average that people want, 0.01 of a run
_NUM_STEPS = 30  # of Richardson-Lucy: more would follow the noise of what was measured


def thinned(times: Array) -> Array:
    """At most `_MOST_TIMES` of the times of all updates, evenly chosen, with the last: as if there were no others."""
    return times[:: -math.ceil(len(times) / _MOST_TIMES)][::-1] if len(times) else times


def shares(profiles: Sequence[Stored], times: Array) -> Array:
    """The share [n, times] that each average has of the increment before each time."""
    masses = np.array([p.masses(times) for p in profiles]).reshape(len(profiles), len(times))
    found: Array = np.cumsum(masses[:, ::-1], axis=1)[:, ::-1]
    return found


def estimate(moved: Sequence[float], first: Sequence[Stored], last: Sequence[Stored], times: Array) -> Array | None:
    """The mean square v w of the step before each update, if the averages of pairs of profiles differ by `moved`.

    v is constant between the ends of the pairs, which increase; after the last one it stays. It is found by
    Richardson-Lucy: updates that multiply by how much more was seen than is explained, so that it is never negative.
    It begins with the v that each pair tells if v is constant, so that then it is exact; few updates keep it smooth.
    So if training comes to rest within the last interval, what is left of its movement comes out too large, 2x or more.

    Returns:
        [times], or None if they do not tell.
    """
    widths = np.diff(times, prepend=0.0)
    bins = np.minimum(np.searchsorted([p.t for p in first], times), len(first) - 1)
    kernel = np.zeros((len(first), len(first)))
    for k, pair in enumerate(zip(first, last, strict=True)):
        one, other = shares(pair, times)
        kernel[k] = np.bincount(bins, widths * (one - other) ** 2, minlength=len(first))
    expected, seen = kernel.sum(axis=1), np.array(moved)
    if not (np.all(expected > 0) and seen[-1] > 0):
        return None
    v = seen / expected
    weights = np.maximum(kernel.sum(axis=0), np.finfo(float).tiny)
    for _ in range(_NUM_STEPS):
        v = v * (seen / np.maximum(kernel @ v, np.finfo(float).tiny) @ kernel) / weights
    found: Array = v[bins] * widths
    return found


def fit(stored: Array, targets: Sequence[Profile], times: Array, steps: Array, ridge: Array) -> Array:
    """Coefficients [n, m] that minimise the expected error of the parameters, with sum one.

    It is the noise-aware counterpart of `profile.fit`: V |profile error|^2 + |s x|^2, where V is no number, but v times
    the square of the integral, because parameters are changed by what a profile lacks over a while and not by how it
    ripples between snapshots. A number V, even the best one for each target with hindsight, was no better for any
    16-bit average that benchmarks/noise.py solves for.

    Args:
        stored: [n, times], the `shares` of the stored averages.
        targets: What is wanted of them.
        times: Times of updates.
        steps: [times], mean square v w of the step before each.
        ridge: [n], mean square s^2 of the rounding of each stored average.
    """
    root = np.sqrt(steps)
    have, wanted = stored * root, shares(targets, times) * root
    return constrained_least_squares(have @ have.T + np.diag(ridge), np.stack([have @ row for row in wanted], axis=1))


def expected_errors(
    stored: Array, x: Array, targets: Sequence[Profile], times: Array, steps: Array
) -> tuple[Array, Array]:
    """Mean squares [m]: what a synthesis x [n, m] errs by, and what its target differs from the parameters by.

    `stored` are the `shares` [n, times] of the stored averages.
    """
    wanted = shares(targets, times)
    begun = np.array([[target.t] for target in targets]) > times - np.diff(times, prepend=0.0)
    residual = x.T @ stored - wanted
    return np.sum(steps * residual**2, axis=1), np.sum(steps * (begun - wanted) ** 2, axis=1)
