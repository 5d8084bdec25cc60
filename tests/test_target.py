"""Targets, and the profiles that they stand for, against oracles that share no code with them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phema_dist.errors import ProfileError
from phema_dist.profile import (
    MAX_SIGMA_REL,
    Array,
    PowerProfile,
    coefficients,
    fit,
    profile_error,
    recorded_error,
)
from phema_dist.target import (
    ConstantBeta,
    Explicit,
    ExponentialProfile,
    Power,
    Shape,
    Target,
    UniformTail,
    _mean_decay,
    as_target,
    neighbours,
    resolve,
)

SHAPES: list[Shape] = [Power(0.12), ConstantBeta(0.99), ConstantBeta(0.9, every=100), UniformTail(0.2), UniformTail(1)]
STORED = [PowerProfile(s, t) for s in (0.05, 0.28) for t in (150, 400, 799, 801, 1000)]


def density(target: Shape, t: float, tau: Array) -> Array:
    """What the docstrings say, at a grid of moments."""
    if isinstance(target, UniformTail):
        return np.where(tau > t - target.fraction * t, 1 / (target.fraction * t), 0.0)
    if isinstance(target, ConstantBeta):
        falling = target.beta ** ((t - tau) / target.every)
        return falling / (falling.mean() * t)
    return power_density(PowerProfile(target.sigma_rel, t), tau)


def power_density(p: PowerProfile, tau: Array) -> Array:
    return np.where(tau <= p.t, (p.gamma + 1) * tau**p.gamma / p.t ** (p.gamma + 1), 0.0)


def as_sum(target: Shape, times: Sequence[int], t: int) -> Array:
    """Shares of what is seen at each time, by running the average over them, one after another."""
    if isinstance(target, UniformTail):
        start = t - target.fraction * t
        return np.array([max(b - max(a, start), 0) for a, b in zip([0, *times], times, strict=False)]) / (t - start)
    shares, last = np.zeros(len(times)), 0
    for i, now in enumerate(times):
        if isinstance(target, ConstantBeta):
            kept = target.beta ** ((now - last) / target.every)
        else:
            kept = (last / now) ** (PowerProfile(target.sigma_rel, t).gamma + 1)
        shares *= kept
        shares[i] += 1 - kept
        last = now
    return shares / shares.sum()  # 1 / (1 - beta^n): without the bias of its beginning


# What may be asked for


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Power(0.35), r"sigma_rel must lie in \(0, 0.28867\]"),
        (lambda: ConstantBeta(1.0), r"beta must lie in \(0, 1\); got 1\.0"),
        (lambda: ConstantBeta(0.0), r"beta must lie in \(0, 1\)"),
        (lambda: ConstantBeta(math.nan), r"beta must lie in \(0, 1\)"),
        (lambda: ConstantBeta(0.9, every=0), "must be above 0; got 0"),
        (lambda: ConstantBeta(0.9, every=math.inf), "must be above 0; got inf"),
        (lambda: UniformTail(0.0), r"must lie in \(0, 1\]; got 0\.0"),
        (lambda: UniformTail(1.5), r"must lie in \(0, 1\]; got 1\.5"),
        (lambda: UniformTail(math.nan), r"must lie in \(0, 1\]"),
        (lambda: Explicit(()), r"add up to 1; got \{\}"),
        (lambda: Explicit.of({10: 0.5, 20: 0.4}), r"add up to 1; got \{10: 0\.5, 20: 0\.4\}"),
        (lambda: Explicit.of({10: math.nan, 20: 1.0}), "must be finite"),
        (lambda: Explicit.of({10: math.inf, 20: -math.inf}), "must be finite"),
        (lambda: Explicit(((10, 0.5), (10, 0.5))), "must have one coefficient"),
    ],
)
def test_what_is_no_average_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ProfileError, match=message):
        make()


@pytest.mark.parametrize(
    ("target", "words", "name"),
    [
        (Power(0.12), "sigma_rel=0.12", "sigma_rel-0.12"),
        (Power(0.12, t=30), "sigma_rel=0.12", "sigma_rel-0.12-t30"),
        (ConstantBeta(0.9999), "beta=0.9999", "beta-0.9999"),
        (ConstantBeta(0.99999999, every=10, t=5), "beta=0.99999999 every 10", "beta-0.99999999-every-10-t5"),
        (UniformTail(0.2), "the last 20%", "tail-0.2"),
        (UniformTail(0.0125), "the last 1.25%", "tail-0.0125"),
        (Explicit.of({20: 0.25, 10: 0.75}), "the given sum of snapshots (2)", "explicit-t20"),
    ],
)
def test_a_target_has_words_for_people_and_for_files(target: Target, words: str, name: str) -> None:
    assert (str(target), target.name) == (words, name)


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor])
def test_numbers_of_numpy_and_torch_are_pythons_in_names(kind: Any) -> None:
    every = kind(256) if kind is torch.tensor else np.int64(256)
    targets = Power(kind(0.25)), ConstantBeta(kind(0.5), every), UniformTail(kind(0.5), t=np.int64(20))  # type: ignore[arg-type]
    assert [target.name for target in targets] == ["sigma_rel-0.25", "beta-0.5-every-256", "tail-0.5-t20"]
    assert str(targets[0]) == "sigma_rel=0.25"
    assert targets[0] == Power(0.25)
    assert hash(targets[0]) == hash(Power(0.25))


def test_a_number_is_a_sigma_rel() -> None:
    assert as_target(0.1) == Power(0.1)
    assert as_target(np.float32(0.25)) == Power(0.25)  # type: ignore[arg-type]
    tail = UniformTail(0.1)
    assert as_target(tail) is tail
    with pytest.raises(ProfileError):
        as_target(1)


# Profiles


@pytest.mark.parametrize("target", SHAPES, ids=str)
def test_a_profile_is_what_its_integrals_say(target: Shape) -> None:
    """Against sums over a fine grid of the density."""
    t, n = 1000.0, 1_000_000
    tau = (np.arange(n) + 0.5) * t / n
    wanted, found = density(target, t, tau), resolve(target, t)
    assert wanted.mean() * t == pytest.approx(1, rel=1e-9)
    assert found.squared_norm == pytest.approx((wanted**2).mean() * t, rel=1e-6)
    products = [(wanted * power_density(p, tau)).mean() * t for p in STORED]
    np.testing.assert_allclose(found.products(STORED), products, rtol=1e-5, atol=1e-9 * max(products))
    times = np.array([1.0, 100, 101.5, 500, 790, 805, 999, 1000])
    masses = [wanted[(tau > a) & (tau <= b)].sum() * t / n for a, b in zip([0, *times], times, strict=False)]
    np.testing.assert_allclose(found.masses(times), masses, atol=2e-6)


@pytest.mark.parametrize("target", SHAPES, ids=str)
def test_what_is_later_than_a_profile_has_no_mass(target: Shape) -> None:
    masses = resolve(target, 950).masses(np.array([100.0, 900, 1000, 1100]))
    assert masses.sum() == pytest.approx(1, abs=1e-14)
    assert masses[3] == 0
    assert masses[2] > 0.01  # only until 950, but that


@pytest.mark.parametrize("a", [1.0, 1.17, 2.0, 18.0, 1000.0, 1e6])
def test_the_mean_of_a_falling_exponential_is_right_to_rounding(a: float) -> None:
    z = [0.0, 1e-9, 0.01, 0.3, 1, 2.5, 4, 7, 10, 15, 25, 40, 70, 120, 1e3, 1e5, 1e8]
    with mpmath.workdps(40):
        # Kummer's function, as an integral and as a series in 1/z.
        exact = [float(mpmath.hyp1f1(1, mpmath.mpf(a) + 1, -mpmath.mpf(v))) for v in z]
    np.testing.assert_allclose(_mean_decay(np.full(len(z), a), np.array(z)), exact, rtol=2e-15)


@pytest.mark.parametrize(("a", "z"), [(1.0, 3.0), (8.9, 0.2), (17.97, 30.0), (1.17, 200.0)])
def test_the_mean_of_a_falling_exponential_is_that_of_poisson(a: float, z: float) -> None:
    """E[a / (a + K)] for K ~ Poisson(z), summed."""
    probability, total = math.exp(-z), 0.0
    for k in range(2000):
        total += probability * a / (a + k)
        probability *= z / (k + 1)
    assert _mean_decay(np.array([a]), np.array([z]))[0] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(
    "target", [UniformTail(1), UniformTail(1 - 1e-15), ConstantBeta(1 - 1e-15), ConstantBeta(0.5, every=1e300)], ids=str
)
def test_the_longest_of_each_family_is_the_uniform_average(target: Shape) -> None:
    longest, uniform = resolve(target, 1000), PowerProfile(MAX_SIGMA_REL, 1000)
    assert longest.squared_norm == pytest.approx(1e-3, rel=1e-9)
    np.testing.assert_allclose(longest.products(STORED), uniform.products(STORED), rtol=1e-9)
    x = coefficients([*STORED, uniform], longest)
    assert profile_error([*STORED, uniform], x, longest) < 1e-6


def test_all_of_training_is_looked_up_where_its_average_is_stored() -> None:
    stored = [PowerProfile(s, t) for s in (0.05, MAX_SIGMA_REL) for t in (500, 1000)]
    assert coefficients(stored, resolve(UniformTail(1.0), 1000)).tolist() == [0, 0, 0, 1]
    assert np.count_nonzero(coefficients(stored, resolve(UniformTail(0.5), 1000))) > 1


@pytest.mark.parametrize("target", SHAPES, ids=str)
@pytest.mark.parametrize("times", [range(1, 1001), range(10, 1001, 10), [1, 2, 3, 50, 51, 300, 310, 795, 990, 1000]])
def test_recorded_error_is_that_of_the_average_tracked_directly(target: Shape, times: Sequence[int]) -> None:
    t, stored = 1000, [PowerProfile(s, t) for s in (0.05, 0.28) for t in (310, 990, 1000)]
    found = resolve(target, t)
    x = coefficients(stored, found)
    widths = np.diff(times, prepend=0)
    synthesized = np.zeros(len(times))
    for p, c in zip(stored, x, strict=True):
        until = [time for time in times if time <= p.t]
        synthesized[: len(until)] += c * as_sum(Power(p.sigma_rel), until, int(p.t))
    tracked = as_sum(target, list(times), t)
    expected = math.sqrt(np.sum((synthesized - tracked) ** 2 / widths) / np.sum(tracked**2 / widths))
    assert recorded_error(stored, x, found, np.array(times, float)) == pytest.approx(expected, rel=1e-9)


def test_what_is_found_for_a_target_does_not_depend_on_its_neighbours() -> None:
    found = [resolve(target, 1000) for target in SHAPES]
    x, errors = fit(STORED, found)
    for k, alone in enumerate(found):
        x_alone, error_alone = fit(STORED, [alone])
        assert (x[:, k] == x_alone[:, 0]).all()
        assert errors[k] == error_alone[0]
        assert coefficients(STORED, alone).tolist() == x[:, k].tolist()
        assert profile_error(STORED, x[:, k], alone) == pytest.approx(error_alone[0], rel=1e-9)


@given(st.sampled_from(SHAPES), st.integers(1000, 10**9))
def test_coefficients_of_any_profile_sum_to_one_and_beat_the_nearest_snapshot(target: Shape, t: int) -> None:
    found = resolve(target, t)
    stored = [PowerProfile(s, t * i / 7) for s in (0.05, 0.28) for i in range(1, 8)]
    x = coefficients(stored, found)
    assert x.sum() == pytest.approx(1, abs=1e-9)
    assert profile_error(stored, x, found) <= min(profile_error([p], [1.0], found) for p in stored) + 1e-5


# What is shorter than time can tell


@pytest.mark.parametrize(
    "target", [UniformTail(0.009), UniformTail(1e-18), ConstantBeta(0.01), ConstantBeta(0.5, every=1e-310)], ids=str
)
def test_less_than_half_a_unit_of_time_is_refused(target: Shape) -> None:
    with pytest.raises(
        ProfileError, match=r"at least half a unit of t long; .* is shorter, t=50 after the run's origin"
    ):
        resolve(target, 50)


@pytest.mark.parametrize("target", [ConstantBeta(0.05), ConstantBeta(0.999), UniformTail(0.5)], ids=str)
def test_after_one_unit_of_time_there_is_an_average(target: Shape) -> None:
    stored = [PowerProfile(s, 1) for s in (0.05, 0.28)]
    x = coefficients(stored, resolve(target, 1))
    assert recorded_error(stored, x, resolve(target, 1), np.array([1.0])) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("target", [UniformTail(0.02), UniformTail(0.03), ConstantBeta(0.2), Power(1e-4)], ids=str)
def test_the_shortest_averages_have_an_honest_error(target: Shape) -> None:
    stored = [PowerProfile(s, t) for s in (0.05, 0.28) for t in (25, 50)]
    found = resolve(target, 50)
    x = coefficients(stored, found)
    assert 0.5 < profile_error(stored, x, found) <= 1
    assert 0.4 < recorded_error(stored, x, found, np.arange(10.0, 51, 10)) <= 1


def test_a_fast_beta_of_a_long_run_is_finite() -> None:
    found = ExponentialProfile(-math.log(0.3), 1e7)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(found.products(STORED)).all()
        assert found.masses(np.array([1.0, 1e6, 1e7 - 1, 1e7])).tolist() == pytest.approx([0, 0, 0.3, 0.7])


# Neighbours


@pytest.mark.parametrize("target", [Power(0.123, t=9), ConstantBeta(0.9987, 10, t=9)], ids=str)
def test_neighbours_are_of_the_same_family_and_go_outward_in_short_numbers(target: Shape) -> None:
    def length(other: Shape) -> float:
        return -1 / math.log(other.beta) if isinstance(other, ConstantBeta) else getattr(other, "sigma_rel", 0)

    found = list(neighbours(target, 1e6, [1e5]))
    assert target not in found
    assert len(set(found)) == len(found) > 50
    assert {type(other) for other in found} == {type(target)}
    assert {(other.t, getattr(other, "every", 1)) for other in found} == {(target.t, getattr(target, "every", 1))}
    assert max(len(str(other)) for other in found) <= len(str(target)) + 6
    distances = [abs(math.log(length(other) / length(target))) for other in found]
    assert distances[0] < 0.04
    assert max(distances) > 2
    assert all(b > a - 0.01 for a, b in itertools.pairwise(distances))


def test_neighbours_of_a_window_begin_at_snapshots() -> None:
    found = neighbours(UniformTail(0.4, t=9), 3000, [1000, 1800, 2000, 2700, 3000])
    assert list(found) == [UniformTail(f, t=9) for f in (0.333333333, 0.666666667, 1.0, 0.1)]
