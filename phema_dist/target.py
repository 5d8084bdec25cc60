"""What may be asked for after training: an averaging profile, by a number that people think in.

Each is a frozen value; `t` is the end of the average as the run counts it, None for the newest complete snapshot's.
`resolve` makes profiles of them, in the notation of `profile`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from phema_dist.errors import ProfileError
from phema_dist.profile import (
    MAX_SIGMA_REL,
    Array,
    PowerProfile,
    Profile,
    intervals,
    log_ratio,
    sigma_rel_to_gamma,
)

_SUM_TOLERANCE = 1e-6  # how far from 1 given coefficients may add up to: they may have been printed
_STEP, _NUM_STEPS = 1.03, 80  # of `neighbours`: up to 10 times as short or as long
_DIGITS = 3  # of a suggested number
_SHARPEST = 2.0  # squared norm of the shortest average that there may be: what is seen at once stands for a unit of t
_FLAT = 2.0**-52  # a profile that falls by less than this share of itself is flat


@dataclass(frozen=True)
class Power:
    """The power profile of `sigma_rel`, as tracked while training; a plain float means the same."""

    sigma_rel: float
    t: int | None = None

    def __post_init__(self) -> None:
        """Raise ProfileError unless such a profile exists."""
        _make_python(self)
        sigma_rel_to_gamma(self.sigma_rel)

    def __str__(self) -> str:
        return f"sigma_rel={self.sigma_rel!r}"

    @property
    def name(self) -> str:
        """As in file names."""
        return f"sigma_rel-{self.sigma_rel!r}{_at(self.t)}"


@dataclass(frozen=True)
class ConstantBeta:
    """What an EMA of constant `beta` with an update each `every` units of t would hold, if it began without a bias.

    Its profile falls by beta every `every` units back from t, and is cut off, and scaled to mass 1, at the run's
    origin. An EMA that begins with the first parameters differs by just that: after n updates it still holds beta^n
    of them, and (1 - beta^n) of this average.
    """

    beta: float
    every: float = 1
    t: int | None = None

    def __post_init__(self) -> None:
        """Raise ProfileError unless such a profile exists."""
        _make_python(self)
        if not 0 < self.beta < 1:
            raise ProfileError(f"beta must lie in (0, 1); got {self.beta}.")
        if not 0 < self.every < math.inf:
            raise ProfileError(f"the time from one update of beta to the next must be above 0; got {self.every}.")

    def __str__(self) -> str:
        return f"beta={self.beta!r}{'' if self.every == 1 else f' every {self.every!r}'}"

    @property
    def name(self) -> str:
        """As in file names."""
        return f"beta-{self.beta!r}{'' if self.every == 1 else f'-every-{self.every!r}'}{_at(self.t)}"


@dataclass(frozen=True)
class UniformTail:
    """The plain mean over the last `fraction` of training."""

    fraction: float
    t: int | None = None

    def __post_init__(self) -> None:
        """Raise ProfileError unless such a profile exists."""
        _make_python(self)
        if not 0 < self.fraction <= 1:
            raise ProfileError(f"the fraction of training to average over must lie in (0, 1]; got {self.fraction}.")

    def __str__(self) -> str:
        return f"the last {100 * self.fraction:.10g}%"

    @property
    def name(self) -> str:
        """As in file names."""
        return f"tail-{self.fraction!r}{_at(self.t)}"


@dataclass(frozen=True)
class Explicit:
    """A given sum of stored averages: coefficients by the t of their snapshots, which must add up to 1.

    They are those of the tracked `sigma_rel`, None for the shortest one.
    """

    terms: tuple[tuple[int, float], ...]
    sigma_rel: float | None = None

    def __post_init__(self) -> None:
        """Raise ProfileError unless this is an average."""
        total = sum(coefficient for _, coefficient in self.terms)
        if not abs(total - 1) <= _SUM_TOLERANCE:  # nor if one is not finite
            raise ProfileError(f"given coefficients must be finite and add up to 1; got {dict(self.terms)}.")
        if len(dict(self.terms)) < len(self.terms):
            raise ProfileError(f"each snapshot must have one coefficient; got {list(self.terms)}.")

    def __str__(self) -> str:
        return f"the given sum of snapshots ({len(self.terms)})"

    @classmethod
    def of(cls, coefficients: Mapping[int, float], sigma_rel: float | None = None) -> Explicit:
        """From {t: coefficient}."""
        return cls(tuple(sorted(coefficients.items())), sigma_rel)

    @property
    def t(self) -> int | None:
        """The last of them."""
        return max(t for t, _ in self.terms)

    @property
    def name(self) -> str:
        """As in file names."""
        return f"explicit{_at(self.t)}"


Shape = Power | ConstantBeta | UniformTail  # what coefficients are found for
Target = Shape | Explicit


def as_target(wanted: Target | float) -> Target:
    """A float is a sigma_rel."""
    return wanted if isinstance(wanted, Target) else Power(float(wanted))


def resolve(target: Shape, t: float) -> Profile:
    """The profile of a target that ends at t, counted from the run's origin.

    Raises:
        ProfileError: it averages over less than half a unit of t.
    """
    found = _profile(target, t)
    if not isinstance(target, Power) and not found.squared_norm <= _SHARPEST:
        raise ProfileError(
            f"an average must be at least half a unit of t long; {target} is shorter, t={t:g} after the run's origin."
        )
    return found


def _profile(target: Shape, t: float) -> Profile:
    if isinstance(target, Power):
        return PowerProfile(target.sigma_rel, t)
    if isinstance(target, UniformTail):
        # All of it is a power profile too, and a stored average may be it.
        return UniformProfile(target.fraction * t, t) if target.fraction < 1 else PowerProfile(MAX_SIGMA_REL, t)
    rate = -math.log(target.beta) / target.every
    return ExponentialProfile(rate, t) if rate * t > _FLAT else PowerProfile(MAX_SIGMA_REL, t)


def neighbours(target: Shape, t: float, stored: Iterable[float]) -> Iterator[Shape]:
    """Others of the target's family with the same end, nearest first.

    Numbers have few digits. Windows begin at the t of a snapshot, as others are rarely sharp enough. All t are counted
    from the origin.
    """
    if isinstance(target, UniformTail):
        fractions = {float(f"{1 - start / t:.9g}") for start in (0, *stored) if start < t} - {target.fraction}
        for fraction in sorted(fractions, key=lambda other: (abs(math.log(other / target.fraction)), other)):
            yield replace(target, fraction=fraction)
        return
    seen: set[Shape] = {target}
    for k in range(1, _NUM_STEPS + 1):
        for factor in (_STEP**k, _STEP**-k):
            try:
                found = _scaled(target, factor)
            except ProfileError:
                continue
            if found not in seen:
                seen.add(found)
                yield found


def _scaled(target: Power | ConstantBeta, factor: float) -> Shape:
    """The target made longer or shorter, in a number of few digits."""
    if isinstance(target, Power):
        return replace(target, sigma_rel=float(f"{target.sigma_rel * factor:.{_DIGITS}g}"))
    share = -math.expm1(math.log(target.beta) / factor)
    return replace(target, beta=round(1 - share, _DIGITS - 1 - math.floor(math.log10(share))))


@dataclass(frozen=True)
class UniformProfile:
    """Density 1 / width on (t - width, t]."""

    width: float
    t: float

    @property
    def squared_norm(self) -> float:
        """1 / width."""
        return 1 / self.width

    def products(self, stored: Sequence[PowerProfile]) -> Array:
        """What of each stored profile lies in the window, by its width."""
        gamma, t = _as_arrays(stored)
        start = np.minimum(self.t - self.width, t)
        products: Array = -np.expm1((gamma + 1) * log_ratio(start, t)) / self.width
        return products

    def masses(self, times: Array) -> Array:
        """The share of the window that is before each time."""
        starts, ends = (np.maximum(edges, self.t - self.width) for edges in intervals(times, self.t))
        return (ends - starts) / self.width


@dataclass(frozen=True)
class ExponentialProfile:
    """Density rate exp(-rate (t - tau)) / (1 - exp(-rate t)) on (0, t]."""

    rate: float
    t: float

    @property
    def squared_norm(self) -> float:
        """Half the rate, by tanh(rate t / 2)."""
        return self.rate / 2 / math.tanh(self.rate * self.t / 2)

    def products(self, stored: Sequence[PowerProfile]) -> Array:
        """The density at the end of each stored profile, times the mean of what it has fallen by before."""
        gamma, t = _as_arrays(stored)
        at_end = self.rate * np.exp(-self.rate * (self.t - t)) / -math.expm1(-self.rate * self.t)
        products: Array = at_end * _mean_decay(gamma + 1, self.rate * t)
        return products

    def masses(self, times: Array) -> Array:
        """exp(-rate (t - t_i)) - exp(-rate (t - t_(i-1))) for each time t_i, scaled."""
        starts, ends = intervals(times, self.t)
        before_end = np.exp(-self.rate * (self.t - ends)) / -math.expm1(-self.rate * self.t)
        masses: Array = before_end * -np.expm1(-self.rate * (ends - starts))
        return masses


def _mean_decay(a: Array, z: Array) -> Array:
    """The mean of exp(-z (1 - u)) over the density a u^(a-1) on (0, 1], for a >= 1 and z >= 0.

    With u = exp(-y) it is the integral of a exp(-a y - z (1 - u)) over y > 0, by 20 Gauss-Legendre nodes on each of
    panels that double in width: near 0 the integrand falls like exp(-(a + z) y), later never faster for its y. Right
    to about 1e-14.
    """
    nodes, weights = np.polynomial.legendre.leggauss(20)
    # Where a y > 40, nothing is left. Edges are those of the variable (a + z) y.
    num_panels = 1 + math.ceil(math.log2(1 + 40 * float(np.max((a + z) / a, initial=1.0))))
    edges = 2.0 ** np.arange(num_panels + 1) - 1
    widths = np.diff(edges)
    x = (edges[:-1, None] + widths[:, None] * (nodes + 1) / 2).reshape(-1)
    weight = (widths[:, None] * weights / 2).reshape(-1)
    y = x / (a + z)[:, None]
    mean: Array = np.exp(-a[:, None] * y + z[:, None] * np.expm1(-y)) @ weight * a / (a + z)
    return mean


def _as_arrays(stored: Sequence[PowerProfile]) -> tuple[Array, Array]:
    gamma, t = np.array([[p.gamma, p.t] for p in stored], dtype=np.float64).reshape(-1, 2).T
    return gamma, t


def as_python(number: Any) -> Any:
    """Python's number for one of numpy or torch: it is to stand in the name of a file, or in JSON."""
    return number.item() if hasattr(number, "item") else number


def _make_python(target: Shape) -> None:
    for name, value in vars(target).items():
        object.__setattr__(target, name, as_python(value))


def _at(t: int | None) -> str:
    return "" if t is None else f"-t{t}"
