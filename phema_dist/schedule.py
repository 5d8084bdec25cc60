"""The schedule: which updates to apply, which snapshots to keep, and the error that follows.

Pure functions of numbers; nothing here looks at a clock, a disk or another rank. Notation as in `profile`: ts
are the times of snapshots, each of which holds one average for every tracked sigma_rel.
"""

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from phema_dist.errors import ProfileError, SettingsError
from phema_dist.profile import (
    Array,
    PowerProfile,
    constrained_least_squares,
    inner_products,
    relative_errors,
)

MIN_RELATIVE_DT = 1e-4  # the smallest dt / t at which an update is applied
RETENTIONS = ("best", "last")  # what to keep: what serves every sigma_rel best, or the newest
MAX_TARGET_SIGMA_REL = 0.28  # the longest average that retention cares for, unless a longer one is tracked

_NUM_TARGETS = 24  # errors vary smoothly between the tracked sigma_rels
_GOOD_ERROR = 0.02  # where evenly spread snapshots do better than this, retention aims at this
_NORM = 32  # of the p-norm over the targets: near the largest one, and the others decide where that is the same
_SHARE = 8  # of the surplus: one in so many is dropped at once
_RIDGE = 1e-12  # added to a unit diagonal: bounds the condition, blurs relative errors below about 1e-6


def update_is_due(t: float, last_t: float) -> bool:
    """Whether enough time has passed for an update: dt / t >= MIN_RELATIVE_DT.

    An update moves an average by about (gamma+1) dt/t of its distance to the parameters. Where that is below
    half a unit in the last place of float32, nothing moves: at sigma_rel 0.28 and t = 2e5, updates at every
    step lose 17% of the average's movement. Waiting makes the moves larger and leaves 0.08%; the profile stays
    exact, because dt is measured, and most updates need no work.

    Args:
        t: Training time now, counted from the clock's origin.
        last_t: Training time of the last applied update; 0 if there was none.
    """
    return (t - last_t) / t >= MIN_RELATIVE_DT


def reconstruction_errors(
    ts: Collection[float],
    sigma_rels: Sequence[float],
    targets: npt.ArrayLike,
) -> Array:
    """Relative profile error of each target sigma_rel, synthesized at the newest t from all snapshots.

    Args:
        ts: Times of the snapshots, in any order.
        sigma_rels: The tracked sigma_rels.
        targets: The sigma_rels wanted, [m].

    Returns:
        Array [m]. Values of about 1e-8 and less are rounding, so tracked sigma_rels come out near 0.

    Raises:
        ProfileError: There is no snapshot, or a sigma_rel is not feasible.
    """
    wanted = np.asarray(targets, dtype=np.float64)
    gram, cross, squared_norms = _least_squares_problem(sorted(ts), sigma_rels, wanted)
    return relative_errors(gram, cross, squared_norms, constrained_least_squares(gram, cross))


def worst_error(ts: Collection[float], sigma_rels: Sequence[float]) -> float:
    """The largest relative profile error over the targets that retention cares for, at the newest t.

    Arguments and errors are those of `reconstruction_errors`.
    """
    return float(reconstruction_errors(ts, sigma_rels, retention_targets(sigma_rels)).max())


def retention_targets(sigma_rels: Sequence[float]) -> Array:
    """A small logarithmic grid of targets, from the shortest tracked average to 0.28."""
    return np.geomspace(min(sigma_rels), max(MAX_TARGET_SIGMA_REL, *sigma_rels), _NUM_TARGETS)


def snapshots_to_keep(
    ts: Collection[int],
    sigma_rels: Sequence[float],
    max_checkpoints: int,
    protected: AbstractSet[int] = frozenset(),
    retention: str = "best",
) -> tuple[int, ...]:
    """Choose the snapshots to keep: while there are too many, drop the one whose loss hurts the worst targets least.

    Where many are surplus, as when a run goes on with a smaller `max_checkpoints`, several are dropped at once, no two
    of them neighbours.

    What a loss does to a target is the relative error it leaves at the newest t, measured by what as many evenly
    spread snapshots would leave there, but at least 0.02. Without that yardstick the targets far above any tracked
    sigma_rel, which are never good, would be served at the cost of the good ones: with (0.05, 0.10) tracked and 20
    kept, the error at 0.15 would be 0.06 instead of 0.01. With a finer one, the good ones would be served at the cost
    of the worst, and of what comes: snapshots that are even at every t must be twice as dense as they will be.

    How long the run will be is not known and not needed: what is kept serves the newest t, whenever that is.

    The newest snapshot and protected ones are never dropped. They count towards the number, so more than
    `max_checkpoints` are kept only if that many are protected.

    Args:
        ts: Times of the snapshots, in any order.
        sigma_rels: The tracked sigma_rels.
        max_checkpoints: How many to keep, at least 1.
        protected: Times of pinned snapshots; those not in `ts` are ignored.
        retention: "best", or "last" to drop the oldest instead.

    Returns:
        The times to keep, increasing.

    Raises:
        SettingsError: max_checkpoints is below 1, or there is no such retention.
        ProfileError: A sigma_rel is not feasible.
    """
    if max_checkpoints < 1:
        raise SettingsError(f"max_checkpoints must be at least 1; got {max_checkpoints}.")
    check_retention(retention)
    kept = sorted(set(ts))
    if len(kept) <= max_checkpoints:
        return tuple(kept)
    fixed = protected | {kept[-1]}
    if retention == "last":
        oldest = [t for t in kept if t not in fixed][: len(kept) - max_checkpoints]
        return tuple(t for t in kept if t not in oldest)
    targets, yardstick = retention_targets(sigma_rels), _yardstick(tuple(sigma_rels), max_checkpoints)
    problem = _least_squares_problem(kept, sigma_rels, targets)
    while len(kept) > max_checkpoints and not fixed >= set(kept):
        hurt = ((_errors_without_each(*problem, len(sigma_rels)) / yardstick) ** _NORM).sum(axis=1)
        hurt = np.where([t in fixed for t in kept], np.inf, hurt)
        drops = _apart(hurt, 1 + (len(kept) - max_checkpoints - 1) // _SHARE)
        kept = [t for i, t in enumerate(kept) if i not in drops]
        problem = _without_snapshots(*problem, drops, len(sigma_rels))
    return tuple(kept)


def _apart(hurt: Array, most: int) -> list[int]:
    """Up to `most` of those whose loss hurts least, at least one, without neighbours: they stand in for each other."""
    if most == 1:
        return [int(np.argmin(hurt))]
    chosen: set[int] = set()
    for i in map(int, np.argsort(hurt, kind="stable")):
        if len(chosen) == most or np.isinf(hurt[i]):
            break
        if not chosen & {i - 1, i + 1}:
            chosen.add(i)
    return sorted(chosen)


@lru_cache(maxsize=8)  # asked for at each snapshot of a run
def _yardstick(sigma_rels: tuple[float, ...], max_checkpoints: int) -> Array:
    """What an error at each target is measured by, [m]."""
    evenly_spread = range(1, max_checkpoints + 1)
    return np.maximum(reconstruction_errors(evenly_spread, sigma_rels, retention_targets(sigma_rels)), _GOOD_ERROR)


def check_retention(retention: str) -> None:
    """Raise SettingsError if there is no such retention."""
    if retention not in RETENTIONS:
        raise SettingsError(f"retention must be one of {RETENTIONS}; got {retention!r}.")


def _least_squares_problem(
    ts: Sequence[float],
    sigma_rels: Sequence[float],
    targets: Array,
) -> tuple[Array, Array, Array]:
    """Gram matrix [n, n], snapshot by snapshot, cross products [n, m] and |target|^2 [m], targets at the last t."""
    if not ts:
        raise ProfileError("no averages are stored; there is nothing to synthesize from.")
    stored = [PowerProfile(sigma_rel, t) for t in ts for sigma_rel in sigma_rels]
    wanted = [PowerProfile(float(sigma_rel), ts[-1]) for sigma_rel in targets]
    squared_norms = np.diagonal(inner_products(wanted, wanted))
    return inner_products(stored, stored), inner_products(stored, wanted), squared_norms


def _without_snapshots(
    gram: Array,
    cross: Array,
    squared_norms: Array,
    snapshots: Sequence[int],
    num_profiles: int,
) -> tuple[Array, Array, Array]:
    """The same problem without the rows of these snapshots."""
    rows = (np.asarray(snapshots)[:, None] * num_profiles + np.arange(num_profiles)).ravel()
    return np.delete(np.delete(gram, rows, 0), rows, 1), np.delete(cross, rows, 0), squared_norms


def _errors_without_each(gram: Array, cross: Array, squared_norms: Array, num_profiles: int) -> Array:
    """Relative errors [snapshots, m] that the loss of each snapshot would leave, all from one inverse.

    The problem is quadratic: forbidding the variables J raises its minimum by x_J' (P_JJ)^-1 x_J, where P is
    the upper left block of the inverse of [[gram, 1], [1', 0]], the conditions for a minimum with sum(x) = 1.
    It is first scaled so that all stored profiles and targets have norm 1.
    """
    n, norms = len(gram), np.sqrt(squared_norms)
    scale = 1 / np.sqrt(np.diagonal(gram))
    conditions = np.zeros((n + 1, n + 1))
    conditions[:n, :n] = gram * np.outer(scale, scale) + _RIDGE * np.eye(n)
    conditions[:n, n] = conditions[n, :n] = scale / scale[-1]
    right = np.vstack([scale[:, None] * cross / norms, 1 / (scale[-1] * norms)])
    inverse = np.linalg.inv(conditions)
    solution = inverse @ right
    minimum = 1 - np.sum(right * solution, axis=0)

    snapshots = np.arange(n // num_profiles)
    x = solution[:n].reshape(-1, num_profiles, len(norms))
    blocks = inverse[:n, :n].reshape(len(snapshots), num_profiles, -1, num_profiles)[snapshots, :, snapshots]
    raised = np.sum(x * np.linalg.solve(blocks, x), axis=1)
    errors: Array = np.sqrt(np.maximum(minimum + raised, 0.0))
    return errors
