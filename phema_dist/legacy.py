"""What other libraries have really averaged: pytorch-posthoc-ema (1.0.10) and ema-pytorch (0.8.3), by their own code.

Both count calls from 1 and update at the first call and each `update_every` calls after it, with

    beta = (1 - 1 / (t + 1))^(gamma + 1),    t calls since averaging began,

which is that of a single unit of t, whatever the time since the last update. So at update_every = k what they hold is
about the profile of gamma' = (gamma + 1) / k - 1, which may be below 0, and a large share of the very first parameters.
It is no power profile; but its mass at each update is known exactly, and that is all that a synthesis needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from phema_dist.errors import ProfileError
from phema_dist.profile import Array, sigma_rel_to_gamma

# What --update-every means if it is not said: the defaults of these libraries. Their sigma_rels must be said.
DEFAULT_UPDATE_EVERY = {"posthoc-ema": 10, "ema-pytorch": 100}


@dataclass(frozen=True)
class OneStepProfile:
    """What a tracked `sigma_rel` holds after its update at `t`, counted from the origin, all with one-step betas."""

    sigma_rel: float
    t: float

    def masses(self, times: Array) -> Array:
        """The share of the parameters seen at each of the times: all updates of the run, those after t too.

        Raises:
            ProfileError: there was no update up to t.
        """
        seen = times[: np.searchsorted(times, self.t, side="right")]
        if not len(seen):
            raise ProfileError(
                f"an average that ends at t={self.t} must have seen an update; none is recorded so early."
            )
        kept = -(sigma_rel_to_gamma(self.sigma_rel) + 1) * np.log1p(1 / seen)  # log beta of each update
        kept_until_t = np.cumsum(kept[::-1])[::-1] - kept  # of what is held after it
        masses = np.zeros_like(times)
        masses[: len(seen)] = np.exp(kept_until_t) * -np.expm1(kept)
        masses[0] = np.exp(kept_until_t[0])  # the first parameters are copied
        return masses


def spread(masses: Array, times: Array) -> float:
    """Standard deviation of an average's masses over time, by its end: what a sigma_rel really is."""
    mean = masses @ times
    return math.sqrt(masses @ (times - mean) ** 2) / float(times[np.flatnonzero(masses)[-1]])
