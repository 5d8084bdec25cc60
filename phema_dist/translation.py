"""The same averaging length in the numbers of other schools. Pure arithmetic, as in `profile`.

* **A half-life that grows.** An EMA whose half-life is always the share f of the time so far keeps 2^(-dt / (f t)) at
  an update, which is (1 - dt/t)^(ln 2 / f) for a small dt/t: the power profile of gamma = ln 2 / f - 1. f is
  `half_life_fraction` in torchtitan (pytorch/torchtitan#3985, default 0.05), and `ema_rampup_ratio` in EDM (Karras et
  al. 2022), as long as its half-life still grows.
* **A half-life that does not.** A constant beta halves what it holds in ln 2 / -ln beta updates; EDM gives that in
  thousands of images. It has no sigma_rel of its own: translated is the power profile of the same mean age at t.
* **sigma_rel** itself is what EDM2 (Karras et al. 2023) calls the EMA length, and its `std`s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from phema_dist.errors import ProfileError
from phema_dist.profile import gamma_to_sigma_rel, sigma_rel_to_beta, sigma_rel_to_gamma

_LONGEST = math.log(2)  # half-life fraction of the uniform average
_ROUNDING = 1e-12  # how far rounding may push a fraction past it


@dataclass(frozen=True)
class Translation:
    """One averaging length; what depends on t is None without it, and `beta` if no constant beta is as short.

    `half_life_fraction` is by t; `half_life` and `mean_age` are in the unit of t, at t; so is `beta_half_life`, that of
    the constant beta per unit of t with the same mean age.
    """

    sigma_rel: float
    gamma: float
    half_life_fraction: float
    mean_age_fraction: float
    t: float | None = None
    half_life: float | None = None
    mean_age: float | None = None
    beta: float | None = None
    beta_half_life: float | None = None


def sigma_rel_to_half_life(sigma_rel: float) -> float:
    """The half-life by t, f = ln 2 / (gamma + 1). Raises ProfileError if there is no such profile."""
    return _LONGEST / (sigma_rel_to_gamma(sigma_rel) + 1)


def half_life_to_sigma_rel(fraction: float) -> float:
    """sigma_rel of an EMA whose half-life is always this fraction of t.

    Raises:
        ProfileError: the fraction is not in (0, ln 2], where gamma >= 0.
    """
    if not 0 < fraction <= _LONGEST * (1 + _ROUNDING):
        raise ProfileError(
            f"a half-life must be a share of t in (0, ln 2 = 0.693147], where gamma >= 0; got {fraction}."
        )
    return gamma_to_sigma_rel(max(_LONGEST / fraction - 1, 0.0))


def half_life_to_beta(half_life: float) -> float:
    """The constant beta that halves what it holds in `half_life` updates. Raises ProfileError unless it is above 0."""
    if not 0 < half_life < math.inf:
        raise ProfileError(f"a half-life must be a positive number of updates; got {half_life}.")
    return math.exp2(-1 / half_life)


def check_t(t: float) -> None:
    """Raise ProfileError unless t can be the length of a training."""
    if not 0 < t < math.inf:
        raise ProfileError(f"t must be positive and finite, the length of the training; got {t}.")


def translate(sigma_rel: float, t: float | None = None) -> Translation:
    """Say an averaging length in all of these numbers.

    Args:
        sigma_rel: the length, in (0, 0.28867].
        t: training time at which it is to be said in steps too, or in whatever t counts.

    Raises:
        ProfileError: there is no such profile, or t is not positive and finite.
    """
    if t is not None:
        check_t(t)
    gamma = sigma_rel_to_gamma(sigma_rel)
    fraction, age = sigma_rel_to_half_life(sigma_rel), 1 / (gamma + 2)
    if t is None:
        return Translation(sigma_rel, gamma, fraction, age)
    try:
        beta = sigma_rel_to_beta(sigma_rel, t)
    except ProfileError:  # shorter than one update
        return Translation(sigma_rel, gamma, fraction, age, t, fraction * t, age * t)
    # Of beta = (2a - 1) / (2a + 1), without the cancellation of 1 - beta.
    halving = _LONGEST / -math.log1p(-2 / (2 * age * t + 1)) if beta else 0.0
    return Translation(sigma_rel, gamma, fraction, age, t, fraction * t, age * t, beta, halving)
