"""Averaging profiles: the weight an average gives to each past moment, and how stored ones make new ones.

Pure float64 arithmetic after Karras et al. 2023 (arXiv 2312.02696, section 3 and appendix C). Nothing here knows of
tensors, files or ranks.

Notation: an average at training time t is the integral of p(tau; t) theta(tau) over 0 < tau <= t, with the power
profile p(tau; t) = (gamma+1) tau^gamma / t^(gamma+1). sigma_rel is the standard deviation of p divided by t. Times
count from the clock's origin, in the run's unit of t. <a, b> is the integral of the product of two profiles,
|a|^2 = <a, a>, and a relative error is |sum_i x_i p_i - target| / |target|, for coefficients x_i. What is stored are
averages of power profiles; a target may be any `Profile`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from phema_dist.errors import ProfileError

Array: TypeAlias = npt.NDArray[np.float64]

MAX_SIGMA_REL = 12**-0.5  # the uniform average, gamma = 0
MAX_KNOTS = 4096  # how finely a history of updates is remembered: 64 KiB of integers
MAX_BINS = 2**14  # how finely averages that are no power profiles are compared
_ROUNDING = 1e-12  # how far rounding may push a sigma_rel past MAX_SIGMA_REL
_EPSILON = 2.0**-52  # of float64


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Solve sigma_rel^2 = (gamma+1) / ((gamma+2)^2 (gamma+3)), the paper's eq. 4, for gamma >= 0.

    gamma + 1 is right to a few units in the last place. Above 12^-0.5 by rounding only is the uniform average.

    Raises:
        ProfileError: No profile with gamma >= 0 has this sigma_rel.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL * (1 + _ROUNDING):
        raise ProfileError(f"sigma_rel must lie in (0, 0.28867], where gamma >= 0; got {sigma_rel}.")
    if sigma_rel >= MAX_SIGMA_REL:
        return 0.0
    # In w = s (gamma+2) this is the cubic w^3 + s w^2 - w + s = 0, whose largest root lies in (0.57, 1). It is
    # convex there and positive at 1, so Newton's steps from 1 only go down, until rounding stops them.
    s, w = float(sigma_rel), 1.0
    while (lower := w - (((w + s) * w - 1) * w + s) / ((3 * w + 2 * s) * w - 1)) < w:
        w = lower
    return max(w / s - 2, 0.0)


def gamma_to_sigma_rel(gamma: float) -> float:
    """sigma_rel = (gamma+1)^(1/2) (gamma+2)^-1 (gamma+3)^(-1/2), the paper's eq. 4.

    Raises:
        ProfileError: gamma is negative or not finite.
    """
    if not 0 <= gamma < math.inf:
        raise ProfileError(f"gamma must be finite and >= 0; got {gamma}.")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def beta(gamma: float, t: float, dt: float) -> float:
    """Share of the old average that an update at t keeps: ((t-dt) / t)^(gamma+1), the paper's eq. 3 for any dt.

    dt is the time since the previous update. The first update has dt = t, and keeps nothing.

    Raises:
        ProfileError: dt is not in (0, t].
    """
    return math.exp(_log_beta(gamma, t, dt))


def update_weight(gamma: float, t: float, dt: float) -> float:
    """Share 1 - beta that an update at t gives to the new parameters, exact however small dt / t is.

    Arguments and errors are those of `beta`. The first update gives exactly 1.0.
    """
    return -math.expm1(_log_beta(gamma, t, dt))


def _log_beta(gamma: float, t: float, dt: float) -> float:
    """(gamma+1) log((t-dt) / t); -inf at the first update."""
    if not 0 < dt <= t < math.inf:
        raise ProfileError(f"an update's dt must lie in (0, t]; got dt={dt} at t={t}.")
    return (gamma + 1) * float(log_ratio(np.float64(t - dt), np.float64(t)))


def log_ratio(earlier: Array | np.float64, later: Array | np.float64) -> Array:
    """log(earlier / later) for 0 <= earlier <= later, without cancellation; -inf where earlier is 0.

    Near 1 the quotient is rounded too coarsely for its logarithm, but there the difference is exact.
    """
    with np.errstate(divide="ignore"):
        near, far = np.log1p((earlier - later) / later), np.log(earlier / later)
    return np.where(2 * earlier > later, near, far)


def sigma_rel_to_beta(sigma_rel: float, t: float) -> float:
    """The constant beta whose mean age after t updates is the profile's: 1/(1-beta) - 1/2 = t / (gamma+2).

    The predecessor's README lists such betas without saying that they hold for t = 1000 only (there this
    formula is within 5e-4 of each), and with a row for sigma_rel 0.40, which no power profile has.

    Raises:
        ProfileError: The profile does not exist, or is shorter than a single update (mean age below 1/2).
    """
    age = t / (sigma_rel_to_gamma(sigma_rel) + 2)
    if not 1 <= 2 * age < math.inf:
        raise ProfileError(
            f"a constant beta has a mean age of at least 0.5 updates; sigma_rel {sigma_rel} at t={t} has {age:.3g}."
        )
    return (2 * age - 1) / (2 * age + 1)


def beta_to_sigma_rel(beta: float, t: float) -> float:
    """sigma_rel of the profile at t with the mean age of a constant beta: the inverse of `sigma_rel_to_beta`.

    Raises:
        ProfileError: beta is not in [0, 1), or averages over longer than the uniform average of t updates.
    """
    if not 0 <= beta < 1:
        raise ProfileError(f"beta must lie in [0, 1); got {beta}.")
    gamma = 2 * t * (1 - beta) / (1 + beta) - 2
    # One unit in beta's last place is a relative change of epsilon / (1 - beta) in the mean age.
    if not -8 * _EPSILON / (1 - beta) <= gamma < math.inf:
        raise ProfileError(f"beta must be at most {(t - 1) / (t + 1):.8g}, uniform over t={t} updates; got {beta}.")
    return gamma_to_sigma_rel(max(gamma, 0.0))


class Stored(Protocol):
    """What is known of any average: where it ends, and what it holds of each past moment."""

    @property
    def t(self) -> float:
        """Where it ends."""

    def masses(self, times: Array) -> Array:
        """Its integral over the interval before each time, from 0 on; what lies beyond t counts nothing."""


class Profile(Stored, Protocol):
    """What a synthesis needs to know of the averaging profile that it aims at, p of mass 1 on (0, t]."""

    @property
    def squared_norm(self) -> float:
        """|p|^2, in units of 1 / t: p averages over about 1 / |p|^2."""

    def products(self, stored: Sequence["PowerProfile"]) -> Array:
        """<p, q> for each q of stored averages, none of which ends after p."""


@dataclass(frozen=True)
class PowerProfile:
    """The power profile that ends at training time `t` > 0 with standard deviation `sigma_rel` t."""

    sigma_rel: float
    t: float

    def __post_init__(self) -> None:
        """Raise ProfileError unless such a profile exists."""
        if not 0 < self.t < math.inf:
            raise ProfileError(f"a profile's t must be positive and finite; got {self.t}.")
        _ = self.gamma

    @cached_property
    def gamma(self) -> float:
        """Exponent of the profile."""
        return sigma_rel_to_gamma(self.sigma_rel)

    @property
    def squared_norm(self) -> float:
        """(gamma+1)^2 / (2 gamma+1) / t."""
        return float(inner_products([self], [self])[0, 0])

    def products(self, stored: Sequence["PowerProfile"]) -> Array:
        """One column of `inner_products`."""
        return inner_products(stored, [self])[:, 0]

    def masses(self, times: Array) -> Array:
        """(t_i/t)^(gamma+1) - (t_(i-1)/t)^(gamma+1) for each time t_i."""
        starts, ends = intervals(times, self.t)
        before_end = np.exp((self.gamma + 1) * log_ratio(ends, np.float64(self.t)))
        masses: Array = before_end * -np.expm1((self.gamma + 1) * log_ratio(starts, ends))
        return masses


def inner_products(a: Sequence[PowerProfile], b: Sequence[PowerProfile]) -> Array:
    """<a, b> = (ga+1) (gb+1) / (ga+gb+1) (t_min/t_max)^g / t_max, where g is the gamma of the later one.

    Appendix C of the paper. Returns an array [len(a), len(b)], in units of 1 / t.
    """
    gamma_a, t_a = np.array([[p.gamma, p.t] for p in a], dtype=np.float64).T.reshape(2, -1, 1)
    gamma_b, t_b = np.array([[p.gamma, p.t] for p in b], dtype=np.float64).T.reshape(2, -1)
    t_min, t_max = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    decay = np.exp(np.where(t_a > t_b, gamma_a, gamma_b) * log_ratio(t_min, t_max))
    products: Array = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * decay / t_max
    return products


def coefficients(stored: Sequence[PowerProfile], target: Profile) -> Array:
    """Coefficients [len(stored)] that make the target of stored averages: least squares, with sum one.

    A stored profile that is the target is looked up, not solved: its coefficient is exactly 1.0, others are 0.0.

    Raises:
        ProfileError: Nothing is stored, or a stored average saw parameters later than the target's t.
    """
    return fit(stored, [target])[0][:, 0]


def products(
    stored: Sequence[Stored], targets: Sequence[Profile], times: Array | None = None
) -> tuple[Array, Array, Array]:
    """Inner products of stored averages [n, n], of them with targets [n, m], and squared norms of the targets [m].

    What is stored are power profiles, or anything if there are `times`: those of all updates, over which all of them
    are step functions, as in `recorded_error`.
    """
    if times is None:
        powers = cast("Sequence[PowerProfile]", stored)
        cross = np.stack([target.products(powers) for target in targets], axis=1)
        return inner_products(powers, powers), cross, np.array([target.squared_norm for target in targets])
    starts = _bins(times, [p.t for p in stored])
    root = np.sqrt(np.add.reduceat(np.diff(times, prepend=0.0), starts))
    steps = np.array([np.add.reduceat(p.masses(times), starts) / root for p in stored])
    aims = [np.add.reduceat(target.masses(times), starts) / root for target in targets]
    return steps @ steps.T, np.stack([steps @ aim for aim in aims], axis=1), np.array([aim @ aim for aim in aims])


def _bins(times: Array, ends: Sequence[float]) -> npt.NDArray[np.intp]:
    """Where to begin anew, so that few bins have all updates: the first has its own, and none goes across an end."""
    spread = np.linspace(0, len(times), MAX_BINS, endpoint=False) if len(times) > MAX_BINS else np.arange(len(times))
    starts = np.unique(np.concatenate([[0, 1], spread, np.searchsorted(times, ends, side="right")]).astype(np.intp))
    return starts[starts < len(times)]


def fit(
    stored: Sequence[Stored], targets: Sequence[Profile], times: Array | None = None, found: Array | None = None
) -> tuple[Array, Array]:
    """`coefficients` [n, m] of several targets at once, and their relative errors [m]; `times` as in `products`.

    What is found for a target has the same bits whichever others are asked for beside it. If coefficients were `found`
    otherwise, these are taken instead of the least squares; what is stored is looked up all the same.
    """
    if not stored:
        raise ProfileError("no averages are stored; there is nothing to synthesize from.")
    latest, end = max(p.t for p in stored), min(target.t for target in targets)
    if latest > end:
        raise ProfileError(f"a stored t must be at most the target's t={end}; got a snapshot at t={latest}.")
    gram, cross, norms = products(stored, targets, times)
    x = constrained_least_squares(gram, cross) if found is None else found.copy()
    for k, target in enumerate(targets):
        same = [i for i, p in enumerate(stored) if _is_same(p, target)]
        if same:
            x[:, k] = np.eye(len(stored))[same[0]]
    one_by_one = [slice(k, k + 1) for k in range(len(targets))]
    return x, np.concatenate([relative_errors(gram, cross[:, k].copy(), norms[k], x[:, k].copy()) for k in one_by_one])


def _is_same(stored: Stored, target: Profile) -> bool:
    return (
        isinstance(stored, PowerProfile)
        and isinstance(target, PowerProfile)
        and stored.t == target.t
        and math.isclose(stored.sigma_rel, target.sigma_rel, rel_tol=1e-9)
    )


def constrained_least_squares(gram: Array, cross: Array) -> Array:
    """The x [n, m] that minimises x' gram x - 2 cross' x with sum(x) = 1, for each column of cross.

    x = G+ c + G+ 1 (1 - 1' G+ c) / (1' G+ 1), where G+ is the pseudo-inverse of the Gram matrix scaled to a unit
    diagonal. Neighbouring snapshots are nearly collinear, and duplicates exactly: directions below the rounding of
    the Gram matrix are left out, and duplicates share their coefficient. Both arguments are inner products of stored
    profiles: gram [n, n] among themselves, cross [n, m] with m targets.
    """
    scale = 1 / np.sqrt(np.diagonal(gram))
    eigenvalues, eigenvectors = np.linalg.eigh(gram * np.outer(scale, scale))
    kept = eigenvalues > len(gram) * _EPSILON * eigenvalues[-1]
    root = scale[:, None] * eigenvectors[:, kept] / np.sqrt(eigenvalues[kept])  # root @ root.T is G+
    shift = root @ root.sum(axis=0)
    shift /= shift.sum()
    # One column after another: a product of matrices would round a column otherwise if it had other neighbours.
    solution = np.empty_like(cross)
    for k, column in enumerate(np.ascontiguousarray(cross.T)):
        free = root @ (root.T @ column)
        solution[:, k] = free + shift * (1 - free.sum())
    return solution


def relative_errors(gram: Array, cross: Array, squared_norms: Array, x: Array) -> Array:
    """Relative errors [m], (x' gram x - 2 cross' x + |target|^2)^(1/2) / |target| for each column of cross and x.

    The terms cancel: an error below about 1e-8 times the size of the coefficients is rounding, clamped at 0.
    """
    squares = np.sum(x * (gram @ x - 2 * cross), axis=0) / squared_norms + 1
    errors: Array = np.sqrt(np.maximum(squares, 0.0))
    return errors


def profile_error(stored: Sequence[PowerProfile], coefficients: npt.ArrayLike, target: Profile) -> float:
    """Relative error of a synthesis, for continuous profiles and coefficients [len(stored)]."""
    x, norms = np.asarray(coefficients, dtype=np.float64)[:, None], np.array([target.squared_norm])
    gram, cross = inner_products(stored, stored), target.products(stored)[:, None]
    return float(relative_errors(gram, cross, norms, x)[0])


def recorded_error(stored: Sequence[PowerProfile], coefficients: npt.ArrayLike, target: Profile, times: Array) -> float:
    """Relative error of a synthesis against the target tracked directly over the same updates.

    What was really averaged is a step function: the parameters seen at t_i stand for the whole interval since
    t_(i-1), with the mass w_i that the profile has there. So |a|^2 is the sum of w_i^2 / (t_i - t_(i-1)), which
    tends to the integral in `profile_error` as the updates become dense. `times` are those of all updates,
    increasing: `UpdateHistory.times`.

    Raises:
        ProfileError: A profile ends after the last update.
    """
    x = np.asarray(coefficients, dtype=np.float64)
    return float(recorded_errors(stored, x[:, None], [target], times)[0])


def recorded_errors(stored: Sequence[Stored], x: Array, targets: Sequence[Profile], times: Array) -> Array:
    """`recorded_error` of several targets, [m], for coefficients x [n, m]; rows of zeros cost nothing."""
    end, last = max([p.t for p in stored] + [p.t for p in targets]), times[-1] if len(times) else 0
    if last < end:
        raise ProfileError(f"profiles must end by the last recorded update, t={last}; got one that ends at t={end}.")
    wanted = np.array([target.masses(times) for target in targets])
    residuals = -wanted
    for p, row in zip(stored, x, strict=True):
        if row.any():
            residuals += row[:, None] * p.masses(times)
    widths = np.diff(times, prepend=0.0)
    errors: Array = np.sqrt(np.sum(residuals**2 / widths, axis=1) / np.sum(wanted**2 / widths, axis=1))
    return errors


def intervals(times: Array, t: float) -> tuple[Array, Array]:
    """Start and end of the interval before each time, from 0 on, and up to t only."""
    # Merged knots forget where a snapshot was, so that its t may cut an interval.
    ends = np.minimum(times, t)
    return np.concatenate([[0.0], ends[:-1]]), ends


class UpdateHistory:
    """When an average was updated: a sequence of knots (t_end, count), each of `count` evenly spaced updates.

    They fill the time since the previous knot, or since 0. Beyond `MAX_KNOTS` knots the older half is merged in
    pairs. That keeps the number of updates, and shifts only the times of old ones, which weigh little.
    """

    def __init__(self, knots: Iterable[tuple[int, int]] = ()) -> None:
        self._knots: list[tuple[int, int]] = []
        for t_end, count in knots:
            if t_end <= self.last or count < 1:
                raise ProfileError(f"knots must increase from t={self.last} and count >= 1; got ({t_end}, {count}).")
            self._knots.append((t_end, count))

    @property
    def knots(self) -> tuple[tuple[int, int], ...]:
        """The knots (t_end, count), oldest first, as they are stored."""
        return tuple(self._knots)

    @property
    def last(self) -> int:
        """The newest update's t; 0 before the first."""
        return self._knots[-1][0] if self._knots else 0

    def append(self, t: int) -> None:
        """Record an update at t, in constant time.

        Raises:
            ProfileError: t is not later than the last update.
        """
        if t <= self.last:
            raise ProfileError(f"an update must come after the last one, t={self.last}; got t={t}.")
        t_end, count = self._knots[-1] if self._knots else (0, 0)
        start = self._knots[-2][0] if len(self._knots) > 1 else 0
        if count and (t - t_end) * count == t_end - start:
            self._knots[-1] = (t, count + 1)
        else:
            self._knots.append((t, 1))
        if len(self._knots) > MAX_KNOTS:
            half = MAX_KNOTS // 2
            pairs = zip(self._knots[:half:2], self._knots[1:half:2], strict=True)
            self._knots[:half] = [(later, n1 + n2) for (_, n1), (later, n2) in pairs]

    def times(self) -> Array:
        """Times of all updates, float64, increasing."""
        ends, counts = np.array(self._knots, dtype=np.int64).reshape(-1, 2).T
        steps = np.diff(ends, prepend=0) / counts
        later_in_knot = np.repeat(np.cumsum(counts), counts) - np.arange(1, counts.sum() + 1)
        # Counted back from the knot's end, so that t_end itself is exact even after merging.
        return np.repeat(ends, counts) - np.repeat(steps, counts) * later_in_knot
