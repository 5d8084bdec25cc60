"""The averaging mathematics against oracles that share no code with it."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phema_dist.errors import ProfileError
from phema_dist.profile import (
    MAX_KNOTS,
    MAX_SIGMA_REL,
    Array,
    PowerProfile,
    UpdateHistory,
    beta,
    beta_to_sigma_rel,
    coefficients,
    fit,
    gamma_to_sigma_rel,
    inner_products,
    profile_error,
    recorded_error,
    recorded_errors,
    sigma_rel_to_beta,
    sigma_rel_to_gamma,
    update_weight,
)

ORACLES = json.loads(Path(__file__).with_name("oracles.json").read_text())
DIGITS = 60


def exact_gamma(sigma_rel: float) -> mpmath.mpf:
    """The paper's cubic in gamma, all roots, in high precision."""
    with mpmath.workdps(DIGITS):
        s2 = 1 / mpmath.mpf(sigma_rel) ** 2
        roots = mpmath.polyroots([1, 7, 16 - s2, 12 - s2], maxsteps=500, extraprec=400)
        return max(mpmath.re(root) for root in roots)


def exact_inner_product(a: PowerProfile, b: PowerProfile) -> mpmath.mpf:
    """The integral of the product by quadrature, with nodes crowded at the end, where a large gamma puts its mass."""
    with mpmath.workdps(30):
        (ga, ta), (gb, tb) = ((exact_gamma(p.sigma_rel), mpmath.mpf(p.t)) for p in (a, b))
        end = min(ta, tb)

        def product(tau: mpmath.mpf) -> mpmath.mpf:
            return (ga + 1) * tau**ga / ta ** (ga + 1) * (gb + 1) * tau**gb / tb ** (gb + 1)

        return mpmath.quad(product, [0, *(end * (1 - mpmath.mpf(2) ** -k) for k in range(1, 9)), end])


def exact_problem(stored: Sequence[PowerProfile], target: PowerProfile) -> mpmath.matrix:
    """Gram matrix of [*stored, target] in high precision, from the antiderivative of tau^(ga+gb)."""
    profiles = [(exact_gamma(p.sigma_rel), mpmath.mpf(p.t)) for p in (*stored, target)]

    def product(a: tuple[mpmath.mpf, mpmath.mpf], b: tuple[mpmath.mpf, mpmath.mpf]) -> mpmath.mpf:
        (ga, ta), (gb, tb) = a, b
        n = ga + gb + 1
        return (ga + 1) * (gb + 1) * min(ta, tb) ** n / n / ta ** (ga + 1) / tb ** (gb + 1)

    return mpmath.matrix([[product(a, b) for b in profiles] for a in profiles])


def exact_solution(stored: Sequence[PowerProfile], target: PowerProfile) -> tuple[Array, float, float]:
    """(coefficients, relative error, condition number), from the dense KKT system in high precision."""
    with mpmath.workdps(DIGITS):
        n = len(stored)
        full = exact_problem(stored, target)
        kkt = mpmath.ones(n + 1)
        kkt[:n, :n] = full[:n, :n]
        kkt[n, n] = 0
        right = mpmath.matrix([*(full[i, n] for i in range(n)), 1])
        x = mpmath.lu_solve(kkt, right)[:n]
        z = mpmath.matrix([*x, -1])
        error = mpmath.sqrt((z.T * full * z)[0] / full[n, n])
    scale = [1 / math.sqrt(full[i, i]) for i in range(n)]
    scaled = np.array([[float(full[i, j]) * scale[i] * scale[j] for j in range(n)] for i in range(n)])
    return np.array([float(v) for v in x]), float(error), np.linalg.cond(scaled)


def grid(ts: Iterable[float], sigma_rels: Iterable[float]) -> list[PowerProfile]:
    ts = tuple(ts)
    return [PowerProfile(s, t) for s in sigma_rels for t in ts]


def evenly(count: int, t: float = 1.0) -> list[float]:
    return [t * i / count for i in range(1, count + 1)]


# sigma_rel and gamma


@pytest.mark.parametrize("sigma_rel", [1e-5, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.28, 0.2886, 0.2886751, MAX_SIGMA_REL])
def test_gamma_is_the_largest_root_of_the_papers_cubic(sigma_rel: float) -> None:
    assert sigma_rel_to_gamma(sigma_rel) + 1 == pytest.approx(float(exact_gamma(sigma_rel)) + 1, rel=1e-14)


@pytest.mark.parametrize(("sigma_rel", "gamma"), ORACLES["gamma"].items())
def test_gamma_matches_the_reference_numbers(sigma_rel: str, gamma: float) -> None:
    assert sigma_rel_to_gamma(float(sigma_rel)) == pytest.approx(gamma, rel=1e-13)


def test_the_widest_profile_is_the_uniform_average_even_if_rounded_up() -> None:
    assert sigma_rel_to_gamma(MAX_SIGMA_REL) == 0.0
    assert sigma_rel_to_gamma(MAX_SIGMA_REL * (1 + 1e-13)) == 0.0
    assert gamma_to_sigma_rel(0.0) == pytest.approx(MAX_SIGMA_REL, rel=1e-15)


@pytest.mark.parametrize("sigma_rel", [0.35, 0.2887, 0.0, -0.1, math.nan, math.inf])
def test_an_infeasible_sigma_rel_is_refused_with_its_bounds(sigma_rel: float) -> None:
    with pytest.raises(ProfileError) as caught:
        sigma_rel_to_gamma(sigma_rel)
    assert str(caught.value) == f"sigma_rel must lie in (0, 0.28867], where gamma >= 0; got {sigma_rel}."


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_an_infeasible_gamma_is_refused(gamma: float) -> None:
    with pytest.raises(ProfileError, match="gamma must be finite and >= 0"):
        gamma_to_sigma_rel(gamma)


@given(st.floats(1e-5, MAX_SIGMA_REL))
def test_sigma_rel_survives_a_round_trip_through_gamma(sigma_rel: float) -> None:
    assert gamma_to_sigma_rel(sigma_rel_to_gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-14)


@given(st.floats(0, 1e5))
def test_gamma_survives_a_round_trip_through_sigma_rel(gamma: float) -> None:
    assert sigma_rel_to_gamma(gamma_to_sigma_rel(gamma)) + 1 == pytest.approx(gamma + 1, rel=1e-14)


@given(st.floats(1e-4, 0.288), st.floats(1.0001, 2))
def test_a_shorter_average_has_a_larger_gamma(sigma_rel: float, factor: float) -> None:
    assert sigma_rel_to_gamma(sigma_rel / factor) > sigma_rel_to_gamma(sigma_rel)


# One update


@pytest.mark.parametrize(("key", "expected"), ORACLES["beta"].items())
def test_beta_matches_the_reference_numbers(key: str, expected: float) -> None:
    sigma_rel, t, dt = (float(part.split("=")[1]) for part in key.split(","))
    assert beta(sigma_rel_to_gamma(sigma_rel), t, dt) == pytest.approx(expected, rel=1e-13)


@given(st.floats(0, 100), st.integers(1, 10**9), st.data())
def test_beta_and_its_complement_are_exact(gamma: float, t: float, data: st.DataObject) -> None:
    dt = data.draw(st.integers(1, t))
    with mpmath.workdps(DIGITS):
        exact = (mpmath.mpf(t - dt) / t) ** (mpmath.mpf(gamma) + 1)
        assert beta(gamma, t, dt) == pytest.approx(float(exact), rel=1e-12, abs=1e-300)
        assert update_weight(gamma, t, dt) == pytest.approx(float(1 - exact), rel=1e-14)


def test_the_first_update_takes_the_parameters_as_they_are() -> None:
    assert update_weight(16.97, 12345, 12345) == 1.0
    assert beta(16.97, 12345, 12345) == 0.0


@pytest.mark.parametrize(("t", "dt"), [(10, 0), (10, -1), (10, 11), (0, 0), (math.nan, 1), (10, math.nan)])
def test_an_update_needs_a_dt_within_its_t(t: float, dt: float) -> None:
    with pytest.raises(ProfileError, match=r"dt must lie in \(0, t\]"):
        beta(1.0, t, dt)
    with pytest.raises(ProfileError, match=r"dt must lie in \(0, t\]"):
        update_weight(1.0, t, dt)


def one_hot_average(gamma: float, times: Sequence[int]) -> Array:
    """What an average holds of the parameters seen at each time, by running the updates one after another."""
    shares, last = [], 0
    for t in times:
        kept = (last / t) ** (gamma + 1)
        shares = [share * kept for share in shares] + [1 - kept]
        last = t
    return np.array(shares)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.28])
@pytest.mark.parametrize("cadence", ["every", "tenth", "irregular"])
def test_skipped_updates_keep_the_width(sigma_rel: float, cadence: str) -> None:
    rng = np.random.default_rng(0)
    times = {
        "every": range(1, 1001),
        "tenth": range(10, 1001, 10),
        "irregular": sorted({*rng.integers(1, 1000, 300), 1000}),
    }[cadence]
    times = [int(t) for t in times]
    gamma = sigma_rel_to_gamma(sigma_rel)
    average = np.zeros(len(times))
    last = 0
    for i, t in enumerate(times):
        average *= beta(gamma, t, t - last)
        average[i] += update_weight(gamma, t, t - last)
        last = t
    np.testing.assert_allclose(average, one_hot_average(gamma, times), atol=1e-14)
    middles = np.array(times) - np.diff(times, prepend=0) / 2
    mean = average @ middles
    width = math.sqrt(average @ (middles - mean) ** 2) / times[-1]
    assert average.sum() == pytest.approx(1, abs=1e-13)
    assert width == pytest.approx(sigma_rel, rel=5e-3)


# Constant betas


@pytest.mark.parametrize(("sigma_rel", "expected"), list(ORACLES["beta_table_T_1000"].items())[1:])
def test_the_predecessors_table_holds_at_t_1000(sigma_rel: str, expected: float) -> None:
    assert sigma_rel_to_beta(float(sigma_rel), 1000) == pytest.approx(expected, abs=5e-4)


def test_the_predecessors_row_of_an_impossible_profile_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"got 0\.4\."):
        sigma_rel_to_beta(0.40, 1000)


def test_a_constant_beta_has_the_mean_age_of_its_profile() -> None:
    t, sigma_rel = 4000, 0.03
    b = sigma_rel_to_beta(sigma_rel, t)
    ages = np.arange(20 * t) + 0.5  # parameters stand for the step before them
    mean_age = np.sum((1 - b) * b ** np.arange(20 * t) * ages)
    assert mean_age == pytest.approx(t / (float(exact_gamma(sigma_rel)) + 2), rel=1e-9)


@given(st.floats(1e-3, MAX_SIGMA_REL), st.integers(1000, 10**7))
def test_sigma_rel_survives_a_round_trip_through_beta(sigma_rel: float, t: float) -> None:
    assert beta_to_sigma_rel(sigma_rel_to_beta(sigma_rel, t), t) == pytest.approx(sigma_rel, rel=1e-7)


def test_a_beta_that_fits_no_profile_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"beta must be at most 0\.998002, uniform over t=1000"):
        beta_to_sigma_rel(0.9999, 1000)
    with pytest.raises(ProfileError, match=r"beta must lie in \[0, 1\); got 1\.0"):
        beta_to_sigma_rel(1.0, 1000)
    with pytest.raises(ProfileError, match=r"mean age of at least 0\.5 updates"):
        sigma_rel_to_beta(0.05, 5)


# Inner products


@pytest.mark.parametrize("t", [0, -1, math.nan, math.inf])
def test_a_profile_needs_a_positive_t(t: float) -> None:
    with pytest.raises(ProfileError, match="t must be positive and finite"):
        PowerProfile(0.1, t)


def test_a_profile_that_cannot_exist_cannot_be_made() -> None:
    with pytest.raises(ProfileError, match=r"got 0\.35\."):
        PowerProfile(0.35, 1000)


def test_inner_products_are_integrals_of_products() -> None:
    a = [PowerProfile(s, t) for s, t in [(0.05, 1000), (0.28, 4000), (MAX_SIGMA_REL, 3999), (0.01, 17)]]
    b = [PowerProfile(s, t) for s, t in [(0.05, 1000), (0.1, 3999.5), (0.2, 1e6)]]
    expected = [[float(exact_inner_product(p, q)) for q in b] for p in a]
    np.testing.assert_allclose(inner_products(a, b), expected, rtol=1e-12)


@given(st.floats(0.01, MAX_SIGMA_REL), st.floats(0.01, MAX_SIGMA_REL), st.integers(1, 10**9), st.integers(1, 10**9))
def test_inner_products_are_symmetric_and_obey_cauchy_schwarz(s: float, u: float, t: float, v: int) -> None:
    a, b = PowerProfile(s, t), PowerProfile(u, v)
    gram = inner_products([a, b], [a, b])
    assert gram[0, 1] == gram[1, 0]
    assert gram[0, 1] ** 2 <= gram[0, 0] * gram[1, 1] * (1 + 1e-12)


def test_no_profiles_have_no_inner_products() -> None:
    assert inner_products([], [PowerProfile(0.1, 1)]).shape == (0, 1)


# Coefficients


@pytest.mark.parametrize(
    ("ts", "sigma_rels", "target"),
    [
        (evenly(4, 4000), (0.05, 0.10), 0.07),
        ((500, 1500, 4000), (0.05, 0.28), 0.15),
        (range(181, 201), (0.05, 0.28), 0.25),
        ((2000, 3000), (0.05, 0.10, 0.20), 0.12),
        (evenly(8, 1e6), (0.05, 0.28), 0.20),
        (evenly(8, 8), (0.05, 0.10), 0.03),
        ((1, 10, 100, 1000), (0.1,), MAX_SIGMA_REL),
    ],
)
def test_coefficients_solve_the_constrained_problem(
    ts: Sequence[float], sigma_rels: tuple[float, ...], target: float
) -> None:
    stored, wanted = grid(ts, sigma_rels), PowerProfile(target, max(ts))
    expected, error, condition = exact_solution(stored, wanted)
    x = coefficients(stored, wanted)
    np.testing.assert_allclose(x, expected, atol=max(1e-15 * condition, 1e-13) * np.abs(expected).max() * 10)
    assert profile_error(stored, x, wanted) == pytest.approx(error, rel=1e-6)


def test_coefficients_match_the_reference_numbers() -> None:
    cases = ORACLES["coefficients"]
    for key, ts, sigma_rels, target in [
        ("4 x (0.05, 0.10), t = 1000..4000, target 0.07", (1000, 2000, 3000, 4000), (0.05, 0.10), 0.07),
        ("3 x (0.05, 0.28), t = 500, 1500, 4000, target 0.15", (500, 1500, 4000), (0.05, 0.28), 0.15),
        ("2 x (0.05, 0.10, 0.20), t = 2000, 3000, target 0.12", (2000, 3000), (0.05, 0.10, 0.20), 0.12),
    ]:
        x = coefficients(grid(ts, sigma_rels), PowerProfile(target, ts[-1]))
        np.testing.assert_allclose(x, cases[key], rtol=0, atol=1e-10)


ERRORS = [(key, target, e) for key, errors in ORACLES["error"].items() for target, e in errors.items()]


@pytest.mark.parametrize(("key", "target", "expected"), ERRORS)
def test_the_error_of_a_synthesis_matches_the_reference_numbers(key: str, target: str, expected: float) -> None:
    count, _, sigma_rels = key.partition(" x ")
    stored = grid(evenly(int(count)), [float(s) for s in sigma_rels.strip("()").split(",")])
    wanted = PowerProfile(float(target), 1.0)
    assert profile_error(stored, coefficients(stored, wanted), wanted) == pytest.approx(expected, rel=1e-3)


def test_synthesizing_a_stored_profile_looks_it_up() -> None:
    stored = grid((1000, 2000, 3000), (0.05, 0.28))
    x = coefficients(stored, PowerProfile(0.28 * (1 + 1e-10), 3000))
    assert x.tolist() == [0, 0, 0, 0, 0, 1]
    assert profile_error(stored, x, stored[-1]) == 0.0


def test_a_stored_sigma_rel_at_another_t_is_solved() -> None:
    x = coefficients(grid((1000, 2000), (0.05, 0.28)), PowerProfile(0.28, 2500))
    assert np.count_nonzero(x) > 1


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=12),
    st.lists(st.floats(0.02, MAX_SIGMA_REL), min_size=1, max_size=3),
    st.floats(0.02, MAX_SIGMA_REL),
)
def test_coefficients_sum_to_one_and_beat_the_nearest_snapshot(
    ts: Sequence[float], sigma_rels: tuple[float, ...], target: float
) -> None:
    stored, wanted = grid(ts, sigma_rels), PowerProfile(target, max(ts))
    x = coefficients(stored, wanted)
    assert x.sum() == pytest.approx(1, abs=1e-12 * max(1, np.abs(x).sum()))
    alone = [profile_error([p], [1.0], wanted) for p in stored]
    assert profile_error(stored, x, wanted) <= min(alone) + 1e-5


def test_the_sum_is_one_after_a_million_steps_above_the_tracked_range() -> None:
    # Here the predecessor's sum to 0.94.
    x = coefficients(grid(evenly(20, 1e6), (0.05, 0.28)), PowerProfile(MAX_SIGMA_REL, 1e6))
    assert x.sum() == pytest.approx(1, abs=1e-12)


def test_duplicates_share_their_coefficient() -> None:
    once, wanted = grid((1000, 2000), (0.05, 0.28)), PowerProfile(0.15, 2000)
    x = coefficients(once, wanted)
    np.testing.assert_allclose(coefficients([*once, *once], wanted), [*x / 2, *x / 2], atol=1e-10)


@pytest.mark.parametrize("sigma_rels", [(0.05, 0.10), (0.05, 0.28), (0.05, 0.05 * (1 + 1e-12))])
@pytest.mark.parametrize("spacing", [1, 8000])
def test_many_nearly_collinear_snapshots_are_solved(sigma_rels: tuple[float, ...], spacing: int) -> None:
    ts = [10**6 - spacing * i for i in range(125)]
    stored, wanted = grid(ts, sigma_rels), PowerProfile(0.06, 10**6)
    x = coefficients(stored, wanted)
    assert x.sum() == pytest.approx(1, abs=1e-9)
    alone = profile_error([PowerProfile(sigma_rels[0], 10**6)], [1.0], wanted)
    assert profile_error(stored, x, wanted) <= alone


def test_nothing_stored_and_parameters_from_the_future_are_refused() -> None:
    with pytest.raises(ProfileError, match="no averages are stored"):
        coefficients([], PowerProfile(0.1, 1000))
    with pytest.raises(ProfileError, match="at most the target's t=1000; got a snapshot at t=2000"):
        coefficients(grid((500, 2000), (0.1,)), PowerProfile(0.1, 1000))


# What was recorded


@pytest.mark.parametrize("times", [range(1, 401), range(10, 401, 10), [1, 2, 3, 50, 51, 100, 200, 230, 400]])
def test_recorded_error_is_the_one_hot_recursions(times: Sequence[int]) -> None:
    times = list(times)
    snapshots, sigma_rels, wanted = (100, 200, 400), (0.05, 0.28), PowerProfile(0.15, 400)
    stored = grid(snapshots, sigma_rels)
    x = coefficients(stored, wanted)
    widths = np.diff(times, prepend=0)

    def held(p: PowerProfile) -> Array:
        shares = one_hot_average(float(exact_gamma(p.sigma_rel)), [t for t in times if t <= p.t])
        return np.pad(shares, (0, len(times) - len(shares)))

    synthesized = sum(c * held(p) for c, p in zip(x, stored, strict=True))
    tracked = held(wanted)
    expected = math.sqrt(np.sum((synthesized - tracked) ** 2 / widths) / np.sum(tracked**2 / widths))
    assert recorded_error(stored, x, wanted, np.array(times, float)) == pytest.approx(expected, rel=1e-10)


def test_recorded_error_tends_to_the_profile_error() -> None:
    stored, wanted = grid((1000, 2000, 3000, 4000), (0.05, 0.10)), PowerProfile(0.07, 4000)
    x = coefficients(stored, wanted)
    times = np.arange(1, 40001) / 10
    assert recorded_error(stored, x, wanted, times) == pytest.approx(profile_error(stored, x, wanted), rel=1e-3)


def test_recorded_error_of_a_stored_profile_is_zero() -> None:
    stored = grid((1000, 2000), (0.05, 0.28))
    x = coefficients(stored, stored[1])
    assert recorded_error(stored, x, stored[1], np.arange(1.0, 2001)) == 0.0


def test_errors_of_several_targets_are_those_of_each_alone() -> None:
    stored, times = grid((1000, 2000, 3000), (0.05, 0.28)), np.arange(5.0, 3001, 5)
    targets = [PowerProfile(s, 3000) for s in (0.07, 0.28, 0.15)]
    x, errors = fit(stored, targets)
    recorded = recorded_errors(stored, x, targets, times)
    for k, target in enumerate(targets):
        alone, error = fit(stored, [target])
        assert x[:, k].tolist() == alone[:, 0].tolist() == coefficients(stored, target).tolist()
        assert errors[k] == error[0]
        assert errors[k] == pytest.approx(profile_error(stored, x[:, k], target), abs=1e-8)
        assert recorded[k] == recorded_error(stored, x[:, k], target, times)
    assert errors[1] == recorded[1] == 0.0  # looked up


def test_a_target_that_ends_before_what_is_stored_is_refused_beside_others() -> None:
    with pytest.raises(ProfileError, match=r"at most the target's t=1500; got a snapshot at t=2000"):
        fit(grid((1000, 2000), (0.05,)), [PowerProfile(0.1, 2000), PowerProfile(0.1, 1500)])


def test_recorded_error_needs_updates_up_to_the_target() -> None:
    p = PowerProfile(0.1, 1000)
    for times in (np.arange(1.0, 1000), np.array([])):
        with pytest.raises(ProfileError, match="must end by the last recorded update"):
            recorded_error([p], [1.0], p, times)


# The history of updates


@given(st.lists(st.integers(1, 3), max_size=300))
def test_a_history_gives_back_every_update(steps: list[int]) -> None:
    times = np.cumsum(steps, dtype=np.int64)
    history = UpdateHistory()
    for t in times:
        history.append(int(t))
    assert history.times().tolist() == times.tolist()
    assert history.last == (times[-1] if len(times) else 0)
    assert UpdateHistory(history.knots).times().tolist() == times.tolist()


def test_regular_updates_are_one_knot() -> None:
    history = UpdateHistory()
    for t in [*range(10, 1001, 10), *range(1003, 1301, 3)]:
        history.append(t)
    assert history.knots == ((1000, 100), (1300, 100))


def test_a_resumed_history_goes_on_where_it_was() -> None:
    history = UpdateHistory([(1000, 100)])
    history.append(1010)
    assert history.knots == ((1010, 101),)


def test_an_irregular_history_stays_bounded_and_keeps_its_count() -> None:
    history, t, rng = UpdateHistory(), 0, np.random.default_rng(0)
    for step in rng.integers(1, 1000, 20_000).tolist():
        t += step
        history.append(t)
    times = history.times()
    assert len(history.knots) <= MAX_KNOTS
    assert len(times) == 20_000
    assert times[-1] == history.last == t
    assert (np.diff(times, prepend=0) > 0).all()


def test_merging_hardly_moves_the_recorded_error() -> None:
    history, times, t, rng = UpdateHistory(), [], 0, np.random.default_rng(0)
    for step in rng.integers(1, 20, 12_000).tolist():
        t += step
        times.append(t)
        history.append(t)
    snapshots = [times[i] for i in range(1999, 12_000, 2000)]
    stored, wanted = grid(snapshots, (0.05, 0.28)), PowerProfile(0.15, t)
    x = coefficients(stored, wanted)
    exact = recorded_error(stored, x, wanted, np.array(times, float))
    assert recorded_error(stored, x, wanted, history.times()) == pytest.approx(exact, rel=0.05)


def test_history_refuses_to_go_back() -> None:
    history = UpdateHistory([(1000, 100)])
    with pytest.raises(ProfileError, match="after the last one, t=1000; got t=1000"):
        history.append(1000)
    with pytest.raises(ProfileError, match=r"knots must increase from t=1000 .* got \(900, 3\)"):
        UpdateHistory([(1000, 100), (900, 3)])
    with pytest.raises(ProfileError, match="count >= 1"):
        UpdateHistory([(1000, 0)])
