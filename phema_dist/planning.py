"""The plan: what to track, how often to store it and as what, chosen before a run begins. Pure, needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product

import numpy as np

from phema_dist import profile, schedule
from phema_dist.errors import ProfileError, SettingsError
from phema_dist.prediction import HALF_ULP, ITEMSIZE, Plan, in_units, predict, snapshot_bytes
from phema_dist.profile import PowerProfile
from phema_dist.walk import GOOD_NOISE

GOOD_ERROR = 0.01  # a plan whose worst error, from half of the run on, is at most this needs no more snapshots

_MOST_SNAPSHOTS = 200  # a synthesis reads them all
_SEARCH_SNAPSHOTS = 20  # the best sigma_rels hardly depend on the number of snapshots
_SEARCH_TARGETS = 16
_GOOD_NORM = 4.0  # of coefficients: above that they amplify rounding for an exactness that nobody needs
_INNER, _OUTER, _REACH = 7, 2, 1.25  # sigma_rels tried: in the range, and beyond each end, in such steps
_SHORTEST = 1e-3  # below that the search takes minutes, and no number of snapshots is good
_MOST_CALLS, _MOST_STEPS = 10**9, 2**53  # what can be followed in seconds, and counted exactly in float64
_MOST_FOLLOWED = 2000  # snapshots that are taken: to see what retention keeps of them takes about 20 s
_MOST_KEPT = 1000  # that may be asked for
_UPDATES_PER_AVERAGE = 500  # that the shortest average should hold at the end
_LARGEST_UPDATE_EVERY = 10  # the default of from_model


def plan(
    steps: int,
    num_parameters: int,
    *,
    t_per_call: int = 1,
    ranks: int = 1,
    sigma_rel_range: tuple[float, float] = (0.05, 0.28),
    storage_bytes: int | None = None,
    max_checkpoints: int | None = None,
    checkpoint_dtype: str | None = None,
    sigma_rels: Sequence[float] | None = None,
    update_every: int | None = None,
    checkpoint_every: int | None = None,
    seconds_per_step: float | None = None,
) -> Plan:
    """Choose what to track and to store, such that the worst error over a range of sigma_rel is small.

    Two sigma_rels and float32 are tried first, then three, then (where storage is limited) float16: the first with a
    worst error of at most `GOOD_ERROR` wherever the run is stopped in its second half, with as few snapshots as that
    takes; and if there is none, the one with the least. Snapshots are evenly spaced and all kept. What is given is not
    chosen.

    Args:
        steps: length of the run in units of t.
        num_parameters: elements of the model that are averaged.
        t_per_call: what t grows by from one call of `update_` to the next: 1, or the batch size if t counts samples.
        ranks: that share the work.
        sigma_rel_range: shortest and longest average wanted.
        storage_bytes: that all snapshots together may take; None: as many snapshots as are good.
        max_checkpoints: snapshots to keep, if so many fit; None: as many as are good, and fit.
        checkpoint_dtype: fp32, fp16 or bf16.
        sigma_rels: to track; None: the two or three that serve the range best.
        update_every: calls from one update to the next; None: 10, or less in a run so short that the shortest average
            would hold fewer than 500 updates.
        checkpoint_every: calls from one snapshot to the next. If more snapshots are taken than kept, retention
            chooses, as in the run; to follow it takes a few milliseconds for each.
        seconds_per_step: from one call of `update_` to the next.

    Raises:
        ProfileError: no such sigma_rel.
        SettingsError: another argument that cannot work, or a budget below two snapshots; says what would do.
    """
    _check(steps, num_parameters, t_per_call, ranks, storage_bytes, max_checkpoints, update_every, checkpoint_every)
    _check_range(sigma_rel_range)
    if checkpoint_dtype not in {None, *ITEMSIZE}:
        raise SettingsError(f"checkpoint_dtype must be one of {', '.join(ITEMSIZE)}; got {checkpoint_dtype!r}.")
    if seconds_per_step is not None and not 0 < seconds_per_step < math.inf:
        raise SettingsError(f"seconds_per_step must be above 0; got {seconds_per_step}.")
    calls = steps // t_per_call
    given = None if sigma_rels is None else _checked(sigma_rels)
    numbers = (2, 3) if given is None else (len(given),)
    dtypes = [checkpoint_dtype] if checkpoint_dtype else ["fp32", "fp16"]
    if storage_bytes is None:
        dtypes = dtypes[:1]  # nothing is gained by fewer bytes
    _check_budget(storage_bytes, num_parameters, numbers[0], dtypes[-1])
    found = []
    for dtype, number_tracked in product(dtypes, numbers):
        chosen = given or best_sigma_rels(sigma_rel_range, number_tracked)
        taken = min(calls, math.ceil(calls / (checkpoint_every or 1)))
        wanted = min(max_checkpoints or _MOST_SNAPSHOTS, taken)
        if storage_bytes is not None:
            fitting = storage_bytes // snapshot_bytes(num_parameters, number_tracked, dtype)
            # One more is there while it replaces another.
            wanted = min(wanted, fitting - (checkpoint_every is not None and taken > fitting))
        if wanted < 1:
            continue
        number = wanted if max_checkpoints else enough_snapshots(chosen, sigma_rel_range, wanted)
        updates = update_every or _update_every(calls, min(chosen))
        every = checkpoint_every or _checkpoint_every(calls, number, updates)
        candidate = predict(
            Plan(
                calls * t_per_call, t_per_call, num_parameters, ranks, sigma_rel_range, chosen, updates, every,
                number, dtype, (), 0, math.inf, math.inf, math.inf, 0.0, seconds_per_step,
            )
        )  # fmt: skip
        if candidate.stop_error <= GOOD_ERROR and candidate.rounding_noise <= GOOD_NOISE:
            return candidate
        found.append(candidate)
    return min(found, key=lambda candidate: (candidate.rounding_noise > GOOD_NOISE, candidate.stop_error))


def warnings(chosen: Plan) -> list[str]:
    """What a person should know before following the plan, a sentence each."""
    found = []
    if chosen.stop_error > GOOD_ERROR:
        found.append(
            f"the worst error is {chosen.worst_error:.2%} at the end, and {chosen.stop_error:.2%} if the run is "
            f"stopped in its second half, above {GOOD_ERROR:.0%}; more snapshots, more frequent ones of which as many "
            "are kept, a third sigma_rel or a narrower range would lower it."
        )
    if chosen.rounding_noise > GOOD_NOISE:
        found.append(
            f"the rounding of {chosen.checkpoint_dtype} changes parameters by up to about {chosen.rounding_noise:.2%}, "
            f"above {GOOD_NOISE:.1%}, less where a synthesis can weigh it against how far parameters move; fp32 "
            "snapshots do not."
        )
    return found


def alternatives(chosen: Plan) -> dict[str, Plan]:
    """What else could be done, by what is different: one profile more or less, half or twice the snapshots, dtype.

    And, where all are kept, as many out of twice as many: retention then thins the early ones, so that a run that is
    stopped early has more of them than half.
    """
    calls = chosen.steps // chosen.t_per_call
    number = 2 if len(chosen.sigma_rels) > 2 else 3  # noqa: PLR2004
    found = {f"{number} sigma_rels": replace(chosen, sigma_rels=best_sigma_rels(chosen.sigma_rel_range, number))}
    for what, factor in (("half the snapshots", 0.5), ("twice the snapshots", 2)):
        kept = max(1, min(round(chosen.max_checkpoints * factor), calls))
        every = chosen.checkpoint_every
        if chosen.num_taken <= chosen.max_checkpoints:
            every = _checkpoint_every(calls, kept, chosen.update_every)
        found[what] = replace(chosen, max_checkpoints=kept, checkpoint_every=every)
    if chosen.num_taken <= chosen.max_checkpoints:
        every = _checkpoint_every(calls, min(2 * chosen.max_checkpoints, calls), chosen.update_every)
        found["taken twice as often"] = replace(chosen, checkpoint_every=every)
    predicted = {what: predict(other) for what, other in found.items() if other != chosen}  # a short run has no more
    dtype = "fp16" if chosen.checkpoint_dtype == "fp32" else "fp32"
    noise = chosen.rounding_noise * HALF_ULP[dtype] / HALF_ULP[chosen.checkpoint_dtype]
    return {**predicted, dtype: replace(chosen, checkpoint_dtype=dtype, rounding_noise=noise)}


@lru_cache(maxsize=32)  # it takes a second, and alternatives ask for what the plan has asked for
def best_sigma_rels(sigma_rel_range: tuple[float, float], number: int) -> tuple[float, ...]:
    """The sigma_rels to track that make the worst error over a range the least; to three digits.

    Found on a logarithmic grid, which is then refined around the best. An error that is small only because large
    coefficients cancel counts as larger.
    """
    low, high = sigma_rel_range
    targets = np.geomspace(low, high, _SEARCH_TARGETS)

    def worst(tracked: Sequence[float]) -> float:
        stored = [PowerProfile(s, t) for s in tracked for t in range(1, _SEARCH_SNAPSHOTS + 1)]
        x, errors = profile.fit(stored, [PowerProfile(float(s), _SEARCH_SNAPSHOTS) for s in targets])
        norms = np.linalg.norm(x, axis=0)
        return float((errors * np.maximum(norms / _GOOD_NORM, 1)).max())

    ratio = (high / low) ** (1 / (_INNER - 1))
    grid = [low * ratio**i for i in range(_INNER - 1)] + [high]  # the ends exactly: an average as long as is wanted
    grid += [s for i in range(1, _OUTER + 1) for s in (low / _REACH**i, high * _REACH**i)]
    best = min(combinations(sorted(s for s in grid if s <= profile.MAX_SIGMA_REL), number), key=worst)
    for step in (ratio**0.5, ratio**0.25):
        moves = product(*({s / step, s, min(s * step, profile.MAX_SIGMA_REL)} for s in best))
        best = min((tuple(sorted(m)) for m in moves if len(set(m)) == number), key=worst)
    rounded = tuple(min(float(f"{s:.3g}"), 0.288) for s in best)
    return rounded if len(set(rounded)) == number else best


def enough_snapshots(sigma_rels: Sequence[float], sigma_rel_range: tuple[float, float], most: int) -> int:
    """How many evenly spaced snapshots are good from half of the run on, but not above `most`."""
    targets = np.geomspace(*sigma_rel_range, _SEARCH_TARGETS)
    number = 2
    while 2 * number < most:
        if schedule.reconstruction_errors(range(1, number + 1), sigma_rels, targets).max() <= GOOD_ERROR:
            return 2 * number
        number += 1 + number // 8
    return most


def _update_every(calls: int, shortest: float) -> int:
    """Calls between updates: the shortest average should hold enough of them at the end."""
    length = calls / (PowerProfile(shortest, 1.0).squared_norm or 1.0)
    return int(min(max(length / _UPDATES_PER_AVERAGE, 1), _LARGEST_UPDATE_EVERY))


def _checkpoint_every(calls: int, number: int, update_every: int) -> int:
    """Calls between snapshots, of which `number` are made with the last one; a whole number of updates, if they can."""
    every = math.ceil(calls / number)
    whole = -(-every // update_every) * update_every
    return whole if math.ceil(calls / whole) == number else every


def _check(
    steps: int, num_parameters: int, t_per_call: int, ranks: int, storage_bytes: int | None,
    max_checkpoints: int | None, update_every: int | None, checkpoint_every: int | None,
) -> None:  # fmt: skip
    """Raise SettingsError unless all of them are counts that make sense together."""
    for name, value in list(locals().items()):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise SettingsError(f"{name} must be an integer of at least 1; got {value!r}.")
    if max_checkpoints is not None and not 2 <= max_checkpoints <= _MOST_KEPT:  # noqa: PLR2004
        raise SettingsError(
            "max_checkpoints must be at least 2, as one snapshot makes only what is tracked, and a plan takes minutes "
            f"beyond {_MOST_KEPT}; got {max_checkpoints}."
        )
    calls = steps // t_per_call
    if steps > _MOST_STEPS or calls > _MOST_CALLS:
        raise SettingsError(
            f"a run must have at most 2**53 steps and 10**9 calls of update_; steps={steps} at {t_per_call} a call are "
            f"{calls}. Give a shorter one: a plan for it serves a longer run of as many snapshots as well."
        )
    least = max(update_every or 1, checkpoint_every or 1, 2)
    if calls < least:
        raise SettingsError(
            f"a run must have at least {least} calls of update_; steps={steps} at {t_per_call} a call are {calls}. "
            "Make it longer, or update_every and checkpoint_every smaller."
        )
    if checkpoint_every is not None and calls // checkpoint_every > _MOST_FOLLOWED:
        raise SettingsError(
            f"a plan follows what retention keeps of at most {_MOST_FOLLOWED} snapshots; checkpoint_every="
            f"{checkpoint_every} takes {calls // checkpoint_every}. Make it larger, or leave it out."
        )


def _check_range(sigma_rel_range: tuple[float, float]) -> None:
    low, high = sigma_rel_range
    for end in (low, high):
        profile.sigma_rel_to_gamma(end)
    if low < _SHORTEST:
        raise ProfileError(
            f"sigma_rel_range must begin at {_SHORTEST} or above; got {low}. For less, keep single snapshots."
        )
    if not low < high:
        raise ProfileError(
            f"sigma_rel_range must be a lower and a higher sigma_rel; got {low} and {high}. A single one needs no "
            f"plan: track that one, PostHocEMA.from_model(..., sigma_rels=({low},))."
        )


def _checked(sigma_rels: Sequence[float]) -> tuple[float, ...]:
    """Raise ProfileError or SettingsError unless these can be tracked."""
    tracked = tuple(sorted(map(float, sigma_rels)))
    if not tracked or len(set(tracked)) != len(tracked):
        raise SettingsError(f"sigma_rels must be one or more different numbers; got {tuple(sigma_rels)}.")
    for sigma_rel in tracked:
        profile.sigma_rel_to_gamma(sigma_rel)
    return tracked


def _check_budget(storage_bytes: int | None, num_parameters: int, num_profiles: int, dtype: str) -> None:
    least = 2 * snapshot_bytes(num_parameters, num_profiles, dtype)
    if storage_bytes is not None and storage_bytes < least:
        fewer = "" if ITEMSIZE[dtype] == 2 else f" With fp16, {in_units(least // 2)}."  # noqa: PLR2004
        raise SettingsError(
            f"storage_bytes must hold two snapshots, which are {in_units(least)} for {num_parameters} parameters, "
            f"{num_profiles} sigma_rels and {dtype}; got {in_units(storage_bytes)}.{fewer}"
        )
