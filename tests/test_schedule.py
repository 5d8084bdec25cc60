"""Which snapshots are kept, against brute force and the reference numbers."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from phema_dist.errors import ProfileError, SettingsError
from phema_dist.profile import PowerProfile, coefficients, profile_error
from phema_dist.schedule import (
    reconstruction_errors,
    retention_targets,
    snapshots_to_keep,
    update_is_due,
    worst_error,
)

RETENTION = json.loads(Path(__file__).with_name("oracles.json").read_text())["retention"]
PAIR = (0.05, 0.28)


def synthesized_error(ts: Sequence[float], sigma_rels: Sequence[float], target: float) -> float:
    """The same error by the public door: one synthesis, then its certificate."""
    stored = [PowerProfile(s, t) for s in sigma_rels for t in ts]
    wanted = PowerProfile(target, max(ts))
    return profile_error(stored, coefficients(stored, wanted), wanted)


def online(sigma_rels: Sequence[float], max_checkpoints: int, ts: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """What is kept after each snapshot."""
    kept: tuple[int, ...] = ()
    for t in ts:
        kept = snapshots_to_keep((*kept, t), sigma_rels, max_checkpoints)
        yield kept


def ratios(
    sigma_rels: Sequence[float], ts: Sequence[int], max_checkpoints: int = 20, every: int = 1
) -> Iterator[tuple[int, float]]:
    """At every t, or so many apart: the worst error of what is kept to that of as many evenly spread with hindsight."""
    even = worst_error(range(1, max_checkpoints + 1), sigma_rels)
    for number, kept in enumerate(online(sigma_rels, max_checkpoints, ts), 1):
        if number >= max_checkpoints and number % every == 0:
            yield kept[-1], worst_error(kept, sigma_rels) / even


@pytest.mark.parametrize(
    ("t", "last_t", "due"),
    [(1, 0, True), (10_000, 9_999, True), (10_001, 10_000, False), (200_000, 199_980, True), (200_000, 199_981, False)],
)
def test_an_update_is_due_after_one_part_in_ten_thousand(t: float, last_t: int, due: bool) -> None:
    assert update_is_due(t, last_t) is due


def test_updates_that_wait_for_their_turn_grow_with_the_logarithm_of_t() -> None:
    applied = last = 0
    for t in range(1, 100_001):
        if update_is_due(t, last):
            applied, last = applied + 1, t
    assert 10_000 * (1 + np.log(10)) * 0.8 < applied < 10_000 * (1 + np.log(10))


@pytest.mark.parametrize("sigma_rels", [PAIR, (0.05, 0.10, 0.20)])
def test_reconstruction_errors_are_those_of_syntheses(sigma_rels: tuple[float, ...]) -> None:
    ts, targets = [3000, 1000, 2500], (0.03, 0.07, 0.15, 0.25)
    expected = [synthesized_error(ts, sigma_rels, target) for target in targets]
    np.testing.assert_allclose(reconstruction_errors(ts, sigma_rels, targets), expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("name", "ts", "atol"),
    [("last 20", range(181, 201), 0.006), ("20 evenly spread", range(10, 201, 10), 0)],
)
def test_reconstruction_errors_match_the_reference_numbers(name: str, ts: Sequence[float], atol: float) -> None:
    targets, expected = zip(*((float(k), v) for k, v in RETENTION[name].items()), strict=True)
    # Two digits are given for the last 20, and 0.22 is cut off: 120 digits of precision give 0.2259.
    np.testing.assert_allclose(reconstruction_errors(ts, PAIR, targets), expected, rtol=1e-3, atol=atol)


def test_errors_need_a_snapshot_and_feasible_profiles() -> None:
    with pytest.raises(ProfileError, match="no averages are stored"):
        reconstruction_errors([], PAIR, [0.1])
    with pytest.raises(ProfileError, match=r"got 0\.3\."):
        reconstruction_errors([1000], PAIR, [0.3])


def test_the_worst_error_is_the_largest_between_the_shortest_and_028() -> None:
    errors = [synthesized_error(range(1, 9), (0.05, 0.10), s) for s in retention_targets((0.05, 0.10))]
    assert worst_error(range(1, 9), (0.05, 0.10)) == pytest.approx(max(errors), rel=1e-8)
    assert retention_targets((0.05, 0.10))[[0, -1]].tolist() == [0.05, 0.28]


def test_twenty_well_chosen_snapshots_stay_under_one_percent_at_every_t() -> None:
    kept = list(online(PAIR, 20, range(1000, 201_000, 1000)))
    assert max(worst_error(ts, PAIR) for ts in kept[20:]) < 0.01
    assert worst_error(range(181, 201), PAIR) > 0.3
    assert all(len(ts) == min(i, 20) for i, ts in enumerate(kept, 1))
    assert all(ts[-1] == 1000 * i for i, ts in enumerate(kept, 1))
    assert all(set(after) <= {*before, after[-1]} for before, after in pairwise(kept))


def test_targets_far_above_the_tracked_ones_do_not_cost_the_good_ones() -> None:
    *_, kept = online((0.05, 0.10), 20, range(1000, 201_000, 1000))
    good = reconstruction_errors(kept, (0.05, 0.10), [0.07, 0.15, 0.20])
    assert (good < [0.01, 0.02, 0.03]).all()  # of the worst error alone: 0.03, 0.07, 0.10


# The worst along the way of 10 000 snapshots is in benchmarks/retention.py; these are the numbers that must hold.
@pytest.mark.parametrize(("sigma_rels", "gain"), [(PAIR, 20), ((0.05, 0.10), 5), ((0.05, 0.10, 0.20), 5)], ids=str)
def test_what_is_kept_is_nearly_as_good_as_evenly_spread_with_hindsight_at_every_t(
    sigma_rels: tuple[float, ...], gain: float
) -> None:
    even, t = worst_error(range(1, 21), sigma_rels), 0
    for t, ratio in ratios(sigma_rels, range(1, 1001)):
        assert ratio <= 1.25, t
        if t in {200, 500, 1000}:
            assert worst_error(range(t - 19, t + 1), sigma_rels) >= gain * ratio * even
    assert t == 1000


def test_a_long_run_goes_on_as_well_from_wherever_it_is() -> None:
    """As a resume does, which sees what is kept and nothing else: here evenly spread ones of 10 000."""
    even, kept = worst_error(range(1, 21), (0.05, 0.10)), tuple(range(500, 10_001, 500))
    for t in range(10_001, 10_801):
        kept = snapshots_to_keep((*kept, t), (0.05, 0.10), 20)
        if t % 5 == 0:
            assert worst_error(kept, (0.05, 0.10)) <= 1.25 * even, t


@pytest.mark.parametrize(("max_checkpoints", "bound"), [(2, 1.6), (3, 1.6), (4, 1.6), (5, 1.6), (64, 1.0)])
def test_few_and_many_are_spread_too(max_checkpoints: int, bound: float) -> None:
    found = dict(ratios(PAIR, range(1, 151), max_checkpoints, every=3))
    assert max(found.values()) <= bound
    last = worst_error(range(151 - max_checkpoints, 151), PAIR)
    assert last > found[150] * worst_error(range(1, max_checkpoints + 1), PAIR)


def test_uneven_spacing_is_what_the_errors_say_it_is() -> None:
    """Some bursts, as of a job that is killed and restarted: its snapshots are neighbours, and go first."""
    ts = sorted({*range(100, 20_100, 100), *(t + d for t in range(1000, 20_000, 3000) for d in (1, 2, 3))})
    kept = list(online(PAIR, 20, ts))
    even = worst_error(range(1, 21), PAIR)
    assert max(worst_error(found, PAIR) for found in kept[60:]) <= 1.25 * even
    assert sum(later - t < 10 for t, later in pairwise(kept[-1])) <= 1


def test_pins_cost_places_and_the_rest_is_chosen_around_them() -> None:
    kept: tuple[int, ...] = ()
    pins = {3, 4, 5}
    for t in range(1, 301):
        kept = snapshots_to_keep((*kept, t), PAIR, 20, pins)
        assert t < 5 or pins < set(kept)
    assert len(kept) == 20
    assert worst_error(kept, PAIR) <= 1.25 * worst_error(range(1, 18), PAIR)


def test_the_last_ones_are_kept_for_those_who_want_them() -> None:
    ts = [7, 1, 3, 9, 5]
    assert snapshots_to_keep(ts, PAIR, 3, retention="last") == (5, 7, 9)
    assert snapshots_to_keep(ts, PAIR, 3, {1, 2}, "last") == (1, 7, 9)
    assert snapshots_to_keep(ts, PAIR, 1, {1, 3}, "last") == (1, 3, 9)
    assert snapshots_to_keep(ts, PAIR, 5, retention="last") == (1, 3, 5, 7, 9)
    with pytest.raises(SettingsError, match=r"retention must be one of \('best', 'last'\); got 'first'"):
        snapshots_to_keep(ts, PAIR, 9, retention="first")


@pytest.mark.parametrize("sigma_rels", [(0.1,), PAIR, (0.05, 0.10, 0.20)])
def test_the_dropped_snapshot_is_the_one_that_brute_force_drops(sigma_rels: tuple[float, ...]) -> None:
    ts = [1000, 1700, 2000, 4000, 4100, 6000, 9000]
    targets = retention_targets(sigma_rels)
    yardstick = np.maximum(reconstruction_errors(range(1, 7), sigma_rels, targets), 0.02)
    losses = {
        t: sum(
            (synthesized_error([u for u in ts if u != t], sigma_rels, s) / y) ** 32
            for s, y in zip(targets, yardstick, strict=True)
        )
        for t in ts[:-1]
    }
    (dropped,) = set(ts) - set(snapshots_to_keep(ts, sigma_rels, 6))
    assert dropped == min(losses, key=losses.__getitem__)


def test_many_snapshots_are_thinned_at_once() -> None:
    kept = snapshots_to_keep(range(1000, 101_000, 1000), PAIR, 20)
    assert len(kept) == 20
    assert worst_error(kept, PAIR) < 0.012


@pytest.mark.parametrize("sigma_rels", [PAIR, (0.05, 0.10)])
def test_very_many_are_thinned_quickly_and_the_run_goes_on_as_well(sigma_rels: tuple[float, ...]) -> None:
    """As after a resume with a smaller max_checkpoints."""
    start = time.thread_time()
    kept = snapshots_to_keep(range(1, 301), sigma_rels, 20, {7, 8})
    assert time.thread_time() - start < 2
    assert {7, 8, 300} < set(kept)
    kept, even = snapshots_to_keep(range(1, 301), sigma_rels, 20), worst_error(range(1, 21), sigma_rels)
    assert len(kept) == 20
    assert worst_error(kept, sigma_rels) <= 1.25 * even
    for t in range(301, 341):
        kept = snapshots_to_keep((*kept, t), sigma_rels, 20)
        assert worst_error(kept, sigma_rels) <= 1.25 * even, t


def test_pins_are_kept_and_count() -> None:
    ts = range(1000, 11_000, 1000)
    kept = snapshots_to_keep(ts, PAIR, 4, protected={1000, 2000, 99})
    assert {1000, 2000, 10_000} < set(kept)
    assert len(kept) == 4
    assert snapshots_to_keep(ts, PAIR, 1, protected={3000, 4000}) == (3000, 4000, 10_000)


def test_retention_is_a_function_of_the_set_of_snapshots_only() -> None:
    ts = [5000, 1000, 4000, 2000, 3000, 3000]
    assert snapshots_to_keep(ts, PAIR, 3) == snapshots_to_keep(sorted(set(ts)), PAIR, 3)
    assert snapshots_to_keep(ts, PAIR, 5) == (1000, 2000, 3000, 4000, 5000)
    assert snapshots_to_keep([1000 * t for t in ts], PAIR, 3) == tuple(1000 * t for t in snapshots_to_keep(ts, PAIR, 3))


@pytest.mark.parametrize("sigma_rels", [(0.05,), PAIR, (0.05, 0.05)])
def test_one_checkpoint_is_the_newest(sigma_rels: tuple[float, ...]) -> None:
    assert snapshots_to_keep([1000, 3000, 2000], sigma_rels, 1) == (3000,)
    assert snapshots_to_keep([], sigma_rels, 1) == ()


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="max_checkpoints must be at least 1; got 0"):
        snapshots_to_keep([1000], PAIR, 0)


def test_a_drop_costs_next_to_nothing() -> None:
    ts = range(1000, 22_000, 1000)
    snapshots_to_keep(ts, PAIR, 20)
    start = time.thread_time()
    snapshots_to_keep(ts, PAIR, 20)
    assert time.thread_time() - start < 0.05
