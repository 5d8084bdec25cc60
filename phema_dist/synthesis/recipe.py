"""From a run and a wanted average to the snapshots that make it, with their coefficients and how good it will be."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from phema_dist import profile
from phema_dist.errors import ProfileError, SnapshotError
from phema_dist.legacy import OneStepProfile
from phema_dist.prediction import in_percent
from phema_dist.profile import Array, PowerProfile, Profile, Stored
from phema_dist.storage.snapshot import HALF_ULP
from phema_dist.synthesis.noise import Noise, noise_of
from phema_dist.synthesis.sums import BATCH
from phema_dist.target import ConstantBeta, Explicit, Power, Shape, Target, as_python, as_target, neighbours, resolve
from phema_dist.walk import GOOD_NOISE

if TYPE_CHECKING:
    from phema_dist.storage.run import Run, Snapshot

_log = logging.getLogger("phema_dist")
GOOD_ERROR = 0.05  # a profile error above this is worth a warning
GOOD_BIAS = 0.01  # and so is it if somebody's own EMA would differ by this share of the first parameters
_POOR_ERROR = 0.5  # and a profile error above this is, whatever is promised of parameters
_CLEARLY = 0.9  # a noise-aware solve is of use if it promises less than this share of the parameter error
_NEAR = 2.0  # a good target is of use to who asked for another one if it is at most so many times as long or short
GOOD_SHARE = 0.1  # and so is an error of the parameters above this share of what their average differs from them by


@dataclass(frozen=True)
class Certificate:
    """How far a synthesis is from the average that was asked for; errors are relative.

    `profile_error` compares the averaging profiles (L2), `recorded_error` does so over the updates that were really
    made. A coefficient norm above 1 amplifies the rounding of what is stored: `rounding_noise` is the expected
    relative error of a parameter from that, for the stored dtype. `left_out` names snapshots that could not be used;
    with them, the profile error would be `error_with_all`. `ends_before` names those that would have been the end, if
    that was left open. `suggestion` is the nearest target of the same family that would be good, if this is not.
    `bias_removed` is how much of the first parameters an EMA of that constant beta would hold that began with them.

    `parameter_error` is what parameters are expected to be off by, root mean square, by that of the parameters: from
    the profile, if they move like a random walk as far as they were measured to, and from rounding. `movement` is what
    the wanted average differs from the parameters at its end by, in the same unit. Both are None if movement was not
    measured, or coefficients were given. For 16-bit snapshots coefficients are then `noise_aware`: they make the
    parameter error least, and not the profile error, except where least squares are good and not clearly worse.
    Tensors count by how much they move.
    """

    profile_error: float
    recorded_error: float
    coefficient_sum: float
    coefficient_norm: float
    rounding_noise: float
    num_snapshots: int
    left_out: tuple[str, ...]
    error_with_all: float = 0.0
    ends_before: tuple[str, ...] = ()
    suggestion: str = ""
    bias_removed: float = 0.0
    parameter_error: float | None = None
    movement: float | None = None
    noise_aware: bool = False

    @property
    def good(self) -> bool:
        """Whether there is nothing to warn of: `GOOD_ERROR` and `GOOD_NOISE`, or `GOOD_SHARE` if noise-aware."""
        if self.noise_aware and self.parameter_error is not None and self.movement is not None:
            return self.parameter_error <= GOOD_SHARE * self.movement and self.profile_error <= _POOR_ERROR
        return _is_good(self.profile_error, self.rounding_noise)


@dataclass(frozen=True)
class Term:
    """One stored average and its factor. Those of one sigma_rel and one batch are added up by themselves."""

    snapshot: Snapshot
    sigma_rel: float
    coefficient: float
    batch: int = 0


@dataclass(frozen=True)
class Recipe:
    """What to add up for one average: terms by sigma_rel, then t, always in the same order."""

    target: Target
    t: int
    terms: tuple[Term, ...]
    newest: Snapshot  # the newest one at or before t, whose buffers the result takes
    certificate: Certificate

    def describe(self) -> dict[str, Any]:
        """The recipe as plain JSON values: equal ones make the same bits, as attempts are known by their tokens.

        Each term is [sigma_rel, t, coefficient, attempt, batch].
        """
        used = [self.newest, *(term.snapshot for term in self.terms)]
        fields = {name: value for name, value in asdict(self.target).items() if name not in {"t", "terms"}}
        facts = {
            "target": self.target.name,
            **fields,
            "t": self.t,
            "terms": [[x.sigma_rel, x.snapshot.t, x.coefficient, x.snapshot.attempt, x.batch] for x in self.terms],
            "buffers": [self.newest.t, self.newest.attempt],
            "attempts": {s.attempt: s.manifests[0].token for s in used},
            "certificate": asdict(self.certificate),
        }
        described: dict[str, Any] = json.loads(json.dumps(facts, allow_nan=False))
        return described


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
        SnapshotError: no complete snapshot at or before t, or none as late, or not one that was given a coefficient;
            if strict, one that cannot be used.
    """
    t = as_python(t)
    snapshots = tuple(replace(s, problem=(unusable or {}).get(s.folder, s.problem)) for s in run.snapshots)
    run = replace(run, snapshots=snapshots)
    run.require_newest()
    noise = cache(partial(noise_of, run))  # most targets end at the same t
    recipes = [_recipe(run, as_target(target), t, noise) for target in targets]
    problems = dict.fromkeys(
        problem for recipe in recipes for problem in recipe.certificate.left_out + recipe.certificate.ends_before
    )
    if strict and problems:
        raise SnapshotError(
            f"{run.store.url} must hold no snapshot that cannot be used; there is {'; '.join(problems)}. "
            "Leave out --strict to go on without."
        )
    return _with_recorded_errors(run, recipes)


def stored_recipe(snapshot: Snapshot, sigma_rel: float) -> Recipe:
    """A stored average as it is, to go on from."""
    noise = _rounding(snapshot)
    certificate = Certificate(0.0, 0.0, 1.0, 1.0, noise, num_snapshots=1, left_out=())
    return Recipe(Power(sigma_rel), snapshot.t, (Term(snapshot, sigma_rel, 1.0),), snapshot, certificate)


def announce(recipes: Sequence[Recipe]) -> None:
    """Log what a person should know before using the result: a poor certificate, snapshots that were left out."""
    for recipe in recipes:
        certificate, what = recipe.certificate, f"{recipe.target} at t={recipe.t}"
        suggestion = f"; {certificate.suggestion}" if certificate.suggestion else ""
        limit = _POOR_ERROR if certificate.noise_aware else GOOD_ERROR
        if certificate.profile_error > limit:
            stored = recipe.newest.t
            _log.warning(
                "%s: the profile error is %.1f%%, above %g%%; %s would be more exact%s", what,
                100 * certificate.profile_error, 100 * limit,
                f"t={stored}, where a snapshot is," if stored != recipe.t
                else "more snapshots, or an average nearer to the tracked ones,",
                suggestion,
            )  # fmt: skip
        elif certificate.noise_aware and not certificate.good:
            off, movement = certificate.parameter_error or 0.0, certificate.movement or 0.0
            _log.warning(
                "%s: parameters are off by about %s, and averaging moves them by about %s; %s would be more exact%s",
                what, in_percent(off), in_percent(movement),
                f"t={recipe.newest.t}, where a snapshot is," if recipe.newest.t != recipe.t
                else f"more snapshots, or float32 ones instead of {recipe.newest.manifests[0].dtype},",
                suggestion,
            )  # fmt: skip
        if not certificate.noise_aware and certificate.rounding_noise > GOOD_NOISE:
            _log.warning(
                "%s: the rounding of %s snapshots changes parameters by about %.1f%%; float32 ones do not%s", what,
                recipe.newest.manifests[0].dtype, 100 * certificate.rounding_noise, suggestion,
            )  # fmt: skip
        if certificate.bias_removed > GOOD_BIAS:
            _log.warning(
                "%s: an EMA that begins with the first parameters would still hold %.1f%% of them; this average has no "
                "such bias", what, 100 * certificate.bias_removed,
            )  # fmt: skip
    for left_out in dict.fromkeys(text for recipe in recipes for text in recipe.certificate.left_out):
        _log.warning("left out a snapshot that cannot be used, %s", left_out)
    for recipe in recipes:
        certificate = recipe.certificate
        without, with_all = in_percent(certificate.profile_error), in_percent(certificate.error_with_all)
        if certificate.left_out and without != with_all:
            _log.warning(
                "%s at t=%d: without what was left out, the profile error is %s instead of %s",
                recipe.target, recipe.t, without, with_all,
            )  # fmt: skip
    for later, t in {text: recipe.t for recipe in recipes for text in recipe.certificate.ends_before}.items():
        _log.warning("averages end at t=%d, before a snapshot that cannot be used, %s", t, later)


def _recipe(run: Run, target: Target, t: int | None, noise_at: Callable[[int], Noise | None]) -> Recipe:
    """The recipe of one target, t being its end if it says none. Its recorded error is not known yet."""
    if isinstance(target, Explicit):
        return _given(run, target)
    end = t if target.t is None else target.t
    newest = run.require_newest(end)
    t = newest.t if end is None else end
    if t > run.complete[-1].t:
        later = "; ".join(_problems(s for s in run.snapshots if run.complete[-1].t < s.t <= t))
        raise SnapshotError(
            f"{run.store.url} has complete snapshots up to t={run.complete[-1].t}; got t={t}. "
            f"{f'Incomplete: {later}. ' if later else ''}Leave t out to have the newest."
        )
    usable = [s for s in run.complete if s.t <= t]
    stored, noise = _averages(run, usable), noise_at(t)
    lost = [s for s in run.snapshots if s.problem and s.t <= t]
    profiles, aim = _profiles(run, stored), resolve(target, t - run.info.origin)
    times = run.update_times if run.info.imported else None
    roundings = np.array([_rounding(s) for _, s in stored])
    x, errors, aware = _fit(profiles, [aim], times, noise, roundings)
    terms, with_all = _terms(run, zip(stored, x[:, 0].tolist(), strict=True)), errors
    if lost:
        more = _profiles(run, _averages(run, lost))
        all_roundings = np.append(roundings, np.full(len(more), roundings[-1]))
        with_all = _fit([*profiles, *more], [aim], times, noise and noise.with_more(more), all_roundings)[1]
    certificate = replace(
        _certificate(terms),
        profile_error=float(errors[0]),
        left_out=_problems(lost),
        error_with_all=float(min(*with_all, *errors)),
        # A snapshot that is not finished is being written, if it is newer than all complete ones.
        ends_before=_problems(s for s in run.snapshots if end is None and s.t > t and not s.unfinished),
        bias_removed=target.beta ** (aim.t / target.every) if isinstance(target, ConstantBeta) else 0.0,
    )
    if noise is not None:
        off, movement = noise.judge(x, [aim])
        certificate = replace(
            certificate, parameter_error=float(off[0]), movement=float(movement[0]), noise_aware=bool(aware[0])
        )
    if not certificate.good:
        certificate = replace(certificate, suggestion=_suggestion(target, aim.t, profiles, roundings, times, noise))
    return Recipe(target, t, terms, newest, certificate)


def _fit(
    stored: Sequence[Stored], aims: Sequence[Profile], times: Array | None, noise: Noise | None, roundings: Array
) -> tuple[Array, Array, Array]:
    """Coefficients, profile errors, and which are noise-aware. Runs of before noise was measured keep their bits."""
    x, errors = profile.fit(stored, aims, times)
    if not (noise and noise.matters):
        return x, errors, np.zeros(len(aims), dtype=bool)
    other, other_errors = noise.fit(aims)
    # What was measured is of all tensors together: where least squares are good for each, that must be of clear use.
    quiet = np.linalg.norm(x * roundings[:, None], axis=0) <= GOOD_NOISE
    useless = noise.judge(other, aims)[0] > _CLEARLY * noise.judge(x, aims)[0]
    plain = quiet & ((other_errors > _POOR_ERROR) | (useless & (errors <= GOOD_ERROR))) & (x != other).any(axis=0)
    return np.where(plain, x, other), np.where(plain, errors, other_errors), ~plain


def _given(run: Run, target: Explicit) -> Recipe:
    """The recipe that was asked for term by term."""
    sigma_rel = min(run.info.sigma_rels) if target.sigma_rel is None else target.sigma_rel
    if sigma_rel not in run.info.sigma_rels:
        raise ProfileError(
            f"coefficients must be those of a tracked sigma_rel, one of {run.info.sigma_rels}; got {sigma_rel}."
        )
    by_t = {s.t: s for s in run.complete}
    missing = [t for t, _ in target.terms if t not in by_t]
    if missing:
        broken = "; ".join(_problems(s for s in run.snapshots if s.t in missing))
        raise SnapshotError(
            f"coefficients must be those of complete snapshots; {run.store.url} has {_listed(by_t)}; "
            f"got {_listed(missing)}.{f' Incomplete: {broken}.' if broken else ''}"
        )
    terms = _terms(run, (((sigma_rel, by_t[t]), float(c)) for t, c in sorted(target.terms)))
    newest = by_t[max(t for t, _ in target.terms)]
    return Recipe(target, newest.t, terms, newest, _certificate(terms))


def _averages(run: Run, snapshots: Sequence[Snapshot]) -> list[tuple[float, Snapshot]]:
    return [(sigma_rel, s) for sigma_rel in run.info.sigma_rels for s in snapshots]


def _profiles(run: Run, averages: Sequence[tuple[float, Snapshot]]) -> Sequence[Stored]:
    of = OneStepProfile if run.info.imported else PowerProfile
    return [of(sigma_rel, s.t - run.info.origin) for sigma_rel, s in averages]


def _terms(run: Run, factors: Iterable[tuple[tuple[float, Snapshot], float]]) -> tuple[Term, ...]:
    """Batches are those of the run, not of what is made: so an average has the same bits beside any others."""
    batches = {s.folder: i // BATCH for i, s in enumerate(run.complete)}
    return tuple(Term(s, sigma_rel, c, batches[s.folder]) for (sigma_rel, s), c in factors if c != 0)


def _certificate(terms: Sequence[Term]) -> Certificate:
    """What the terms alone tell."""
    return Certificate(
        profile_error=0.0,
        recorded_error=0.0,
        coefficient_sum=sum(term.coefficient for term in terms),
        coefficient_norm=math.hypot(*(term.coefficient for term in terms)),
        rounding_noise=math.hypot(*(term.coefficient * _rounding(term.snapshot) for term in terms)),
        num_snapshots=len({term.snapshot.t for term in terms}),
        left_out=(),
    )


def _with_recorded_errors(run: Run, recipes: Sequence[Recipe]) -> list[Recipe]:
    """All at once: a stored average's share of each of many updates is worked out for all targets that use it."""
    stored = _averages(run, run.complete)
    rows = {(sigma_rel, s.folder): row for row, (sigma_rel, s) in enumerate(stored)}
    found, aims = list(recipes), {}
    x = np.zeros((len(stored), len(recipes)))
    for k, recipe in enumerate(recipes):
        if not isinstance(recipe.target, Explicit):
            aims[k] = resolve(recipe.target, recipe.t - run.info.origin)
            for term in recipe.terms:
                x[rows[term.sigma_rel, term.snapshot.folder], k] = term.coefficient
    if aims:
        x, wanted = x[:, list(aims)], list(aims.values())
        errors = profile.recorded_errors(_profiles(run, stored), x, wanted, run.update_times)
        for k, error in zip(aims, errors.tolist(), strict=True):
            found[k] = replace(recipes[k], certificate=replace(recipes[k].certificate, recorded_error=error))
    return found


def _suggestion(
    target: Shape, t: float, profiles: Sequence[Stored], roundings: Array, times: Array | None, noise: Noise | None
) -> str:
    """The nearest target of the same family and end that is good, in words; "" if there is none within `_NEAR`."""
    near, aims = [], []
    for other in neighbours(target, t, {p.t for p in profiles}):
        if not 1 / _NEAR <= _length(other) / _length(target) <= _NEAR:
            continue
        try:
            aims.append(resolve(other, t))
            near.append(other)
        except ProfileError:  # too short
            continue
    if not near:
        return ""
    x, errors, aware = _fit(profiles, aims, times, noise, roundings)
    if noise and aware.any():
        off, movements = noise.judge(x, aims)
        good = np.flatnonzero(np.logical_and.reduce([aware, off <= GOOD_SHARE * movements, errors <= _POOR_ERROR]))
        return f"{near[good[0]]} would be good (off by {in_percent(off[good[0]])})" if len(good) else ""
    noises = np.linalg.norm(x * roundings[:, None], axis=0)
    for other, error, rounding in zip(near, errors.tolist(), noises.tolist(), strict=True):
        if _is_good(error, rounding):
            return f"{other} would be good (error {in_percent(error)})"
    return ""


def _length(target: Shape) -> float:
    """How long it averages, in a unit of its family."""
    if isinstance(target, Power):
        return target.sigma_rel
    return 1 / (1 - target.beta) if isinstance(target, ConstantBeta) else target.fraction


def _is_good(profile_error: float, rounding_noise: float) -> bool:
    return profile_error <= GOOD_ERROR and rounding_noise <= GOOD_NOISE


def _problems(snapshots: Iterable[Snapshot]) -> tuple[str, ...]:
    """Those of the snapshots that cannot be used, and why."""
    return tuple(f"t={s.t}: {s.problem}" for s in snapshots if s.problem)


def _listed(ts: Iterable[int]) -> str:
    return f"t={', '.join(map(str, ts))}"


def _rounding(snapshot: Snapshot) -> float:
    return HALF_ULP[snapshot.manifests[0].dtype] / math.sqrt(3)  # errors lie evenly between 0 and that
