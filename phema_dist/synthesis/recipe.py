"""From a run and a wanted average to the snapshots that make it, with their coefficients and how good it will be."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from phema_dist import profile
from phema_dist.errors import SnapshotError
from phema_dist.profile import PowerProfile, UpdateHistory
from phema_dist.storage.snapshot import HALF_ULP
from phema_dist.target import Power, Target, as_target

if TYPE_CHECKING:
    from phema_dist.storage.run import Run, Snapshot

_log = logging.getLogger("phema_dist")
GOOD_ERROR = 0.05  # a profile error above this is worth a warning
GOOD_NOISE = 0.005  # and so is an expected change of the parameters, by the rounding of what is stored, above this


@dataclass(frozen=True)
class Certificate:
    """How far a synthesis is from the average that was asked for; errors are relative.

    `profile_error` compares the averaging profiles (L2), `recorded_error` does so over the updates that were really
    made. A coefficient norm above 1 amplifies the rounding of what is stored: `rounding_noise` is the expected
    relative error of a parameter from that, for the stored dtype. `left_out` names snapshots that could not be used.
    """

    profile_error: float
    recorded_error: float
    coefficient_sum: float
    coefficient_norm: float
    rounding_noise: float
    num_snapshots: int
    left_out: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether there is nothing to warn of."""
        return self.profile_error <= GOOD_ERROR and self.rounding_noise <= GOOD_NOISE


@dataclass(frozen=True)
class Term:
    """One stored average and its factor."""

    snapshot: Snapshot
    sigma_rel: float
    coefficient: float


@dataclass(frozen=True)
class Recipe:
    """What to add up for one average: terms by sigma_rel, then t, always in the same order."""

    target: Target
    t: int
    terms: tuple[Term, ...]
    newest: Snapshot  # the newest one at or before t, whose buffers the result takes
    certificate: Certificate

    def describe(self) -> dict[str, Any]:
        """The recipe as plain values, for a checkpoint's metadata."""
        return {
            "target": self.target.name,
            **asdict(self.target),
            "t": self.t,
            "terms": [[term.sigma_rel, term.snapshot.t, term.coefficient] for term in self.terms],
            "certificate": asdict(self.certificate),
        }


def plan(
    run: Run,
    targets: Sequence[Target | float],
    t: int | None = None,
    *,
    unusable: Mapping[str, str] | None = None,
    strict: bool = False,
) -> list[Recipe]:
    """Find the recipe of each target, at time t where it says none (None: the newest complete snapshot's).

    Args:
        run: where to take snapshots from; incomplete ones are left out.
        targets: what is wanted; a float is a sigma_rel.
        t: end of the averages, as the run counts it.
        unusable: folders of snapshots that are not to be used, and why.
        strict: whether to refuse a run with snapshots, up to t, that cannot be used.

    Raises:
        ProfileError: no such profile, or a t at which nothing was averaged yet.
        SnapshotError: no complete snapshot at or before t, or none as late.
    """
    newest = run.require_newest(t)
    t = newest.t if t is None else t
    if t > run.complete[-1].t:
        raise SnapshotError(
            f"{run.store.url} has complete snapshots up to t={run.complete[-1].t}; got t={t}. Leave t out to have the "
            "newest."
        )
    usable = [s for s in run.complete if s.t <= t]
    stored = [(sigma_rel, s) for sigma_rel in run.info.sigma_rels for s in usable]
    profiles = [PowerProfile(sigma_rel, s.t - run.info.origin) for sigma_rel, s in stored]
    updates = UpdateHistory(run.complete[-1].manifests[0].updates).times()
    left_out = tuple(f"t={s.t}: {s.problem}" for s in run.snapshots if s.problem and s.t <= t)
    recipes = []
    for wanted in map(as_target, targets):
        assert isinstance(wanted, Power)
        target = PowerProfile(wanted.sigma_rel, t - run.info.origin)
        factors = profile.coefficients(profiles, target)
        used = [Term(s, tracked, float(c)) for (tracked, s), c in zip(stored, factors, strict=True) if c != 0]
        certificate = Certificate(
            profile_error=profile.profile_error(profiles, factors, target),
            recorded_error=profile.recorded_error(profiles, factors, target, updates),
            coefficient_sum=sum(term.coefficient for term in used),
            coefficient_norm=math.hypot(*(term.coefficient for term in used)),
            rounding_noise=math.hypot(*(term.coefficient * _rounding(term.snapshot) for term in used)),
            num_snapshots=len({term.snapshot.t for term in used}),
            left_out=left_out,
        )
        recipes.append(Recipe(wanted, t, tuple(used), newest, certificate))
    return recipes


def stored_recipe(snapshot: Snapshot, sigma_rel: float) -> Recipe:
    """A stored average as it is, to go on from."""
    noise = _rounding(snapshot)
    certificate = Certificate(0.0, 0.0, 1.0, 1.0, noise, num_snapshots=1, left_out=())
    return Recipe(Power(sigma_rel), snapshot.t, (Term(snapshot, sigma_rel, 1.0),), snapshot, certificate)


def announce(recipes: Sequence[Recipe]) -> None:
    """Log what a person should know before using the result: a poor certificate, snapshots that were left out."""
    for recipe in recipes:
        certificate, what = recipe.certificate, f"{recipe.target.name} at t={recipe.t}"
        if certificate.profile_error > GOOD_ERROR:
            stored = recipe.newest.t
            _log.warning(
                "%s: the profile error is %.1f%%, above %g%%; %s would be more exact", what,
                100 * certificate.profile_error, 100 * GOOD_ERROR,
                f"t={stored}, where a snapshot is," if stored != recipe.t
                else "more snapshots, or a sigma_rel nearer to the tracked ones,",
            )  # fmt: skip
        if certificate.rounding_noise > GOOD_NOISE:
            _log.warning(
                "%s: the rounding of %s snapshots changes parameters by about %.1f%%; float32 ones do not", what,
                recipe.newest.manifests[0].dtype, 100 * certificate.rounding_noise,
            )  # fmt: skip
    for left_out in recipes[0].certificate.left_out if recipes else ():
        _log.warning("left out an incomplete snapshot, %s", left_out)


def _rounding(snapshot: Snapshot) -> float:
    return HALF_ULP[snapshot.manifests[0].dtype] / math.sqrt(3)  # errors lie evenly between 0 and that
