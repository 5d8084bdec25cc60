"""What may be asked for after training: an averaging profile, by a number that people think in.

Each is a frozen value; `t` is the end of the average as the run counts it, None for the newest complete snapshot's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Power:
    """The power profile of `sigma_rel`, as tracked while training; a plain float means the same."""

    sigma_rel: float
    t: int | None = None

    @property
    def name(self) -> str:
        """As in file names."""
        return f"sigma_rel-{self.sigma_rel!r}{_at(self.t)}"


@dataclass(frozen=True)
class ConstantBeta:
    """What an EMA of constant `beta` with an update each `every` units of t would hold, if it began without a bias.

    Its profile falls by beta every `every` units back from t, and is cut off, and scaled to mass 1, at the run's
    origin.
    """

    beta: float
    every: float = 1
    t: int | None = None

    @property
    def name(self) -> str:
        """As in file names."""
        return f"beta-{self.beta!r}{'' if self.every == 1 else f'-every-{self.every!r}'}{_at(self.t)}"


@dataclass(frozen=True)
class UniformTail:
    """The plain mean over the last `fraction` of training."""

    fraction: float
    t: int | None = None

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


Target = Power | ConstantBeta | UniformTail | Explicit


def as_target(wanted: Target | float) -> Target:
    """A float is a sigma_rel."""
    return Power(float(wanted)) if isinstance(wanted, int | float) else wanted


def _at(t: int | None) -> str:
    return "" if t is None else f"-t{t}"
