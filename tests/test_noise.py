"""How much a synthesis errs, in parameters: what certificates promise, and what random walks say."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import mpmath
import numpy as np
import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from phema_dist import PostHocEMA, profile, walk
from phema_dist.profile import Array, PowerProfile, UpdateHistory
from phema_dist.storage.document import MisfitError, decoder
from phema_dist.storage.manifest import Attempt, Manifest, Measured, RunInfo
from phema_dist.storage.run import Run, Snapshot, open_run
from phema_dist.storage.store import open_store
from phema_dist.synthesis.recipe import GOOD_SHARE, Recipe, announce, plan
from phema_dist.target import ConstantBeta, Explicit, Power, UniformTail
from phema_dist.training.status import Counts, measured

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUM_CASES, NUM_ELEMENTS = 200, 1500


def one_hot(sigma_rel: float, times: Sequence[int], t: int) -> Array:
    """The weights [updates] of the average of this profile at t, by its recursion."""
    seen = np.array([now for now in times if now <= t], dtype=float)
    kept = np.append(np.append(0.0, seen[:-1]) / seen, 1.0) ** (gamma_of(sigma_rel) + 1)  # of what was before
    left = np.cumprod(kept[::-1])[::-1]
    return np.pad((1 - kept[:-1]) * left[1:], (0, len(times) - len(seen)))


@cache
def gamma_of(sigma_rel: float) -> float:
    return float(max(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real))


class Simulated:
    """A random walk, its averages as they would be stored, and the run that says so."""

    def __init__(
        self, times: Sequence[int], ts: Sequence[int], sigma_rels: tuple[float, ...], dtypes: Sequence[str], *,
        step: float, seed: int,
    ) -> None:  # fmt: skip
        generator = np.random.default_rng(seed)
        widths = np.diff(times, prepend=0)
        start = generator.normal(size=NUM_ELEMENTS)
        self.walk = start + np.cumsum(
            generator.normal(size=(len(times), NUM_ELEMENTS)) * step * np.sqrt(widths)[:, None], axis=0
        )
        self.times, self.stored = times, {}
        snapshots, history = [], UpdateHistory()
        for t in times:
            history.append(t)
        info = RunInfo(1, "0", sigma_rels, "steps", 0, only_save_diff=False, tensors={}, aliases={})
        self.hot = {(sigma_rel, t): one_hot(sigma_rel, times, t) for t in ts for sigma_rel in sigma_rels}
        exact = torch.tensor(np.array(list(self.hot.values())) @ self.walk, dtype=torch.float32)
        for t, dtype, averages in zip(ts, dtypes, exact.split(len(sigma_rels)), strict=True):
            for sigma_rel, average in zip(sigma_rels, averages, strict=True):
                self.stored[sigma_rel, t] = average.to(DTYPES[dtype]).double().numpy()
            first, last = averages[0].double(), averages[-1].double()
            seen = Measured(
                0.0, NUM_ELEMENTS, float(first.square().sum()), float((first - last).square().sum()), 0, 0.0, 0, 0, 0, 0
            )
            manifest = Manifest(
                1, t, 0, "token", 0, 1, 1, history.knots, dtype, 4 << 20, files=(), measured=seen
            )  # fmt: skip
            snapshots.append(Snapshot(t, 0, 0, (manifest,), None))
        attempt = Attempt(0, None, 0, 1, "token")
        self.run = Run(None, info, (attempt,), tuple(snapshots), ())  # type: ignore[arg-type]

    def error(self, recipe: Recipe, wanted: Array) -> float:
        """Root mean square, by that of the parameters."""
        made = sum(term.coefficient * self.stored[term.sigma_rel, term.snapshot.t] for term in recipe.terms)
        return rms(made - wanted @ self.walk) / rms(wanted @ self.walk)


def rms(values: Array) -> float:
    return math.sqrt(np.mean(values**2))


def simulated_cases() -> Iterator[tuple[Simulated, float]]:
    generator = np.random.default_rng(1)
    for seed in range(NUM_CASES):
        tracked = [(0.05, 0.28), (0.05, 0.10), (0.03, 0.10, 0.25), (0.10, 0.20)][generator.integers(4)]
        times = np.cumsum(generator.integers(1, [2, 6][generator.integers(2)], int(generator.integers(100, 250))))
        number = int(generator.integers(3, 30))
        if generator.integers(2):
            chosen = times[np.linspace(0, len(times) - 1, number + 1).astype(int)[1:]]
        else:
            chosen = np.append(generator.choice(times[5:-1], number - 1, replace=False), times[-1])
        dtype = list(DTYPES)[seed % 3]
        movement = 10 ** generator.uniform(-2.5, -0.3)
        ts = sorted(int(t) for t in chosen)
        simulated = Simulated(
            [int(t) for t in times], ts, tracked, [dtype] * number, step=movement / math.sqrt(times[-1]), seed=seed
        )
        yield simulated, float(np.exp(generator.uniform(math.log(0.01), math.log(0.28))))


# The model


@pytest.mark.parametrize(("first", "last"), [(0.05, 0.28), (0.01, 0.02), (0.1, 0.25)])
def test_how_far_two_averages_of_a_walk_lie_apart_is_an_integral(first: float, last: float) -> None:
    a, b = (gamma_of(s) + 1 for s in (first, last))
    t = 2000.0
    by_hand = 2 * (a - b) ** 2 * t / ((2 * a + 1) * (2 * b + 1) * (a + b + 1))
    nodes = [0, *(t * (1 - 2.0**-k) for k in range(1, 9)), t]
    integral = float(mpmath.quad(lambda s: ((s / t) ** a - (s / t) ** b) ** 2, nodes))
    assert by_hand == pytest.approx(integral, rel=1e-9)
    dense = np.arange(1, 40001) * t / 40000
    profiles = PowerProfile(first, t), PowerProfile(last, t)
    for times, rel in ((dense, 0.01), (walk.thinned(dense), 0.03)):
        steps = walk.estimate([3.0], profiles[:1], profiles[1:], times)
        assert steps is not None
        assert steps / np.diff(times, prepend=0) == pytest.approx(np.full(len(times), 3 / integral), rel=rel)


def test_of_one_average_or_parameters_that_stay_nothing_is_known() -> None:
    p, times = PowerProfile(0.1, 10.0), np.arange(1.0, 11)
    assert walk.estimate([0.0], [p], [p], times) is None
    assert walk.estimate([1.0], [p], [p], times) is None
    assert walk.estimate([0.0], [p], [PowerProfile(0.2, 10.0)], times) is None


@pytest.mark.parametrize(("power", "rel"), [(0, 1e-9), (1, 0.2), (4, 0.7)])
def test_movement_that_decays_is_found_from_all_snapshots(power: int, rel: float) -> None:
    times, ts = np.arange(1.0, 2001), range(100, 2001, 100)
    true = (1 - (times - 1) / 2000) ** power
    pairs = [[PowerProfile(s, t) for t in ts] for s in (0.05, 0.28)]
    moved = [float(true @ np.subtract(*walk.shares(pair, times)) ** 2) for pair in zip(*pairs, strict=True)]
    found = walk.estimate(moved, *pairs, times)
    assert found is not None
    assert (found >= 0).all()
    x, target = np.eye(40)[:, [19]], [PowerProfile(0.2, 2000)]
    stored = walk.shares(pairs[0] + pairs[1], times)
    off, exact = (walk.expected_errors(stored, x, target, times, v)[1] for v in (found, true))
    assert off == pytest.approx(exact, rel=rel)


@pytest.mark.parametrize("number", [1, 4095, 4096, 4097, 10_000, 1_000_001])
def test_many_updates_are_thinned_and_the_last_one_stays(number: int) -> None:
    times = np.arange(1.0, number + 1)
    found = walk.thinned(times)
    assert len(found) <= 4096
    assert found[-1] == number
    assert len(found) == number or len(found) > 2000
    assert (np.diff(found) > 0).all()


# Certificates


def test_certificates_are_honest() -> None:
    """200 random cases: what is promised lies within a factor of 2 of what random walks come to."""
    ratios = []
    for simulated, sigma_rel in simulated_cases():
        (recipe,) = plan(simulated.run, [sigma_rel])
        facts, times = recipe.certificate, simulated.times
        wanted, widths = one_hot(sigma_rel, times, times[-1]), np.diff(times, prepend=0)
        made = sum(term.coefficient * simulated.hot[term.sigma_rel, term.snapshot.t] for term in recipe.terms)
        off = math.sqrt(np.sum((made - wanted) ** 2 / widths) / np.sum(wanted**2 / widths))
        assert facts.recorded_error == pytest.approx(off, rel=1e-6, abs=1e-9)
        assert facts.parameter_error is not None
        assert facts.movement is not None
        ratios.append(facts.parameter_error / simulated.error(recipe, wanted))
        assert facts.movement == pytest.approx(
            rms(simulated.walk[-1] - wanted @ simulated.walk) / rms(wanted @ simulated.walk), rel=0.5, abs=1e-6
        )
    assert len(ratios) == NUM_CASES
    assert np.mean([0.5 <= ratio <= 2 for ratio in ratios]) >= 0.95, sorted(ratios)


@pytest.mark.parametrize("target", [ConstantBeta(0.97), UniformTail(0.2), Power(0.15, t=290)], ids=str)
def test_certificates_of_other_targets_are_honest_too(target: ConstantBeta | UniformTail | Power) -> None:
    times = range(1, 301)
    simulated = Simulated(times, range(15, 301, 15), (0.05, 0.28), ["BF16"] * 20, step=0.01, seed=0)
    weights = {
        "beta=0.97": 0.97 ** np.arange(299, -1, -1.0),
        "the last 20%": np.arange(300) >= 240,
        "sigma_rel=0.15": one_hot(0.15, times, 290),
    }[str(target)]
    (recipe,) = plan(simulated.run, [target])
    found = simulated.error(recipe, weights / weights.sum())
    assert recipe.certificate.parameter_error == pytest.approx(found, rel=0.25)
    assert recipe.certificate.noise_aware


def test_a_run_that_measured_nothing_is_synthesized_as_before() -> None:
    simulated = Simulated(range(1, 201), range(20, 201, 20), (0.05, 0.28), ["BF16"] * 10, step=0.01, seed=0)
    unmeasured = [
        replace(s, manifests=tuple(replace(m, measured=None) for m in s.manifests)) for s in simulated.run.snapshots
    ]
    for run in (
        replace(simulated.run, snapshots=tuple(unmeasured)),
        replace(simulated.run, snapshots=(*simulated.run.snapshots[:-1], unmeasured[-1])),
    ):
        (recipe,) = plan(run, [0.02])
        facts = recipe.certificate
        assert (facts.parameter_error, facts.movement, facts.noise_aware) == (None, None, False)
        assert_plain(recipe)
    earlier = replace(simulated.run, snapshots=(*unmeasured[:-1], simulated.run.snapshots[-1]))
    found, expected = (plan(run, [0.02])[0].certificate.parameter_error for run in (earlier, simulated.run))
    assert found == pytest.approx(expected, rel=0.1)


def assert_plain(recipe: Recipe) -> None:
    """Its coefficients are the least squares of profiles, bit for bit."""
    stored = [PowerProfile(sigma_rel, t) for sigma_rel in (0.05, 0.28) for t in range(20, 201, 20)]
    x = profile.coefficients(stored, PowerProfile(recipe.target.sigma_rel, 200))  # type: ignore[union-attr, arg-type]
    assert [term.coefficient for term in recipe.terms] == [c for c in x.tolist() if c]


def test_float32_is_solved_as_before_and_judged_all_the_same() -> None:
    simulated = Simulated(range(1, 201), range(20, 201, 20), (0.05, 0.28), ["F32"] * 10, step=0.01, seed=0)
    for recipe in plan(simulated.run, [0.02, 0.1, 0.28]):
        assert not recipe.certificate.noise_aware
        assert recipe.certificate.parameter_error is not None
        assert_plain(recipe)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_noise_is_weighed_against_movement(dtype: str) -> None:
    """Coefficients are better than those of profiles, and no small change makes what they promise better."""
    simulated = Simulated(range(1, 401), range(10, 401, 10), (0.05, 0.28), [dtype] * 40, step=0.003, seed=0)
    for sigma_rel in (0.02, 0.1, 0.2):
        (recipe,) = plan(simulated.run, [sigma_rel])
        stored = [PowerProfile(s, t) for s in (0.05, 0.28) for t in range(10, 401, 10)]
        x = profile.coefficients(stored, PowerProfile(sigma_rel, 400))
        plain = replace(
            recipe,
            terms=tuple(
                replace(recipe.terms[0], sigma_rel=p.sigma_rel, snapshot=simulated.run.complete[int(p.t) // 10 - 1],
                        coefficient=c) for p, c in zip(stored, x.tolist(), strict=True)
            ),
        )  # fmt: skip
        wanted = one_hot(sigma_rel, simulated.times, 400)
        assert simulated.error(recipe, wanted) < 0.7 * simulated.error(plain, wanted)
        assert recipe.certificate.coefficient_sum == pytest.approx(1)


def test_a_stored_average_of_16_bits_is_looked_up_too() -> None:
    simulated = Simulated(range(1, 201), range(20, 201, 20), (0.05, 0.28), ["BF16"] * 10, step=0.01, seed=0)
    (recipe,) = plan(simulated.run, [0.28])
    assert [(term.sigma_rel, term.snapshot.t, term.coefficient) for term in recipe.terms] == [(0.28, 200, 1.0)]
    found = simulated.error(recipe, one_hot(0.28, range(1, 201), 200))
    assert recipe.certificate.parameter_error == pytest.approx(found, rel=0.2)


def test_of_mixed_snapshots_those_in_float32_carry_more() -> None:
    times, ts = range(1, 201), range(10, 201, 10)
    dtypes = ["BF16", "F32"] * 10
    mixed = Simulated(times, ts, (0.05, 0.28), dtypes, step=0.002, seed=0)
    narrow = Simulated(times, ts, (0.05, 0.28), ["BF16"] * 20, step=0.002, seed=0)
    (recipe,), (other,) = plan(mixed.run, [0.12]), plan(narrow.run, [0.12])

    def carried(recipe: Recipe) -> float:
        return sum(term.coefficient**2 for term in recipe.terms if term.snapshot.t % 20)

    assert carried(recipe) < 0.1 * carried(other)
    wanted = one_hot(0.12, times, 200)
    assert recipe.certificate.parameter_error == pytest.approx(mixed.error(recipe, wanted), rel=0.5)
    assert mixed.error(recipe, wanted) < 0.5 * narrow.error(other, wanted)


def test_warnings_are_of_errors_that_matter(caplog: pytest.LogCaptureFixture) -> None:
    def warned(step: float, dtype: str) -> tuple[Recipe, str]:
        simulated = Simulated(range(1, 201), range(10, 201, 10), (0.05, 0.28), [dtype] * 20, step=step, seed=0)
        (recipe,) = plan(simulated.run, [0.08])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            announce([recipe])
        return recipe, caplog.text

    moved, text = warned(0.02, "BF16")
    assert moved.certificate.good
    assert not text
    rested, text = warned(0.001, "BF16")
    assert not rested.certificate.good
    assert rested.certificate.movement is not None
    assert rested.certificate.parameter_error is not None
    assert rested.certificate.parameter_error > GOOD_SHARE * rested.certificate.movement
    assert "float32 ones instead of BF16" in text
    assert f"parameters are off by about {100 * rested.certificate.parameter_error:.2g}%" in text
    assert warned(0.001, "F32")[1] == ""
    assert rested.certificate.suggestion == ""  # nothing within a factor of 2 is good


def test_what_was_left_out_is_judged_alike() -> None:
    simulated = Simulated(range(1, 201), range(10, 201, 10), (0.05, 0.28), ["BF16"] * 20, step=0.003, seed=0)
    lost = replace(simulated.run.snapshots[17], problem="bitten", manifests=())
    run = replace(simulated.run, snapshots=(*simulated.run.snapshots[:17], lost, *simulated.run.snapshots[18:]))
    whole, less = plan(simulated.run, [0.1])[0].certificate, plan(run, [0.1])[0].certificate
    assert less.error_with_all == pytest.approx(min(whole.profile_error, less.profile_error), rel=0.02)


def test_given_coefficients_have_no_target_to_err_from() -> None:
    simulated = Simulated(range(1, 201), range(20, 201, 20), (0.05, 0.28), ["BF16"] * 10, step=0.01, seed=0)
    facts = plan(simulated.run, [Explicit.of({180: 0.5, 200: 0.5})])[0].certificate
    assert (facts.parameter_error, facts.movement) == (None, None)


def test_a_certificate_is_plain_json() -> None:
    simulated = Simulated(range(1, 201), range(20, 201, 20), (0.05, 0.28), ["BF16"] * 10, step=0.01, seed=0)
    facts = plan(simulated.run, [0.1])[0].describe()["certificate"]
    assert facts["noise_aware"] is True
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


# What ranks measure


class Walker(nn.Module):
    """Parameters of every kind that a rank may hold."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(60, 50, generator=generator))
        self.low = nn.Parameter(torch.randn(300, generator=generator).bfloat16())
        self.exact = nn.Parameter(torch.randn(7, dtype=torch.float64, generator=generator))
        self.register_buffer("seen", torch.zeros(3))

    @torch.no_grad()
    def move(self, t: int) -> None:
        generator = torch.Generator().manual_seed(t)
        for p in self.parameters():
            p.add_(torch.randn(p.shape, generator=generator).mul(0.02).to(p.dtype))


def trained(folder: Path, dtype: torch.dtype | None, num_ranks: int = 1) -> Walker:
    model = Walker()
    wrapped = model if num_ranks == 1 else DistributedDataParallel(model)
    with PostHocEMA.from_model(
        wrapped, folder, sigma_rels=(0.05, 0.28), update_every=1, checkpoint_every=20, checkpoint_dtype=dtype
    ) as ema:
        for t in range(1, 201):
            model.move(t)
            ema.update_(wrapped)
            if t % 20 == 0:
                ema._session.writer.drain()  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_what_the_writer_measures_makes_an_honest_certificate(tmp_path: Path, dtype: torch.dtype) -> None:
    trained(tmp_path / "run", dtype)
    run = open_run(open_store(tmp_path / "run"))
    seen = run.complete[-1].manifests[0].measured
    assert seen is not None
    assert seen.numel == 3300  # neither float64 nor buffers
    assert seen.unix_time > 1.7e9
    assert (seen.updates_skipped, seen.updates_refused, seen.snapshots_failed) == (0, 0, 0)

    model, wanted, last = Walker(), one_hot(0.1, range(1, 201), 200), 0.0
    average = torch.zeros(3300, dtype=torch.float64)
    for t in range(1, 201):
        model.move(t)
        now = torch.cat([model.low.float(), model.w.flatten()]).double().detach()
        average += wanted[t - 1] * now
        last = float((now**2).mean().sqrt())
    with PostHocEMA.from_path(tmp_path / "run", Walker()) as ema, ema.state_dict(0.1) as made:
        found = torch.cat([made["low"].flatten(), made["w"].flatten()]).double()
    facts = plan(run, [0.1])[0].certificate
    error = float((found - average).square().mean().sqrt()) / last
    assert facts.parameter_error is not None
    assert 0.5 * error <= facts.parameter_error <= 2 * error
    assert facts.movement == pytest.approx(float((now - average).square().mean().sqrt()) / last, rel=0.2)


def on_two_ranks(folder: Path) -> None:
    trained(folder, None, 2)


def test_what_ranks_measure_adds_up(tmp_path: Path) -> None:
    trained(tmp_path / "one", None)
    ranks.run(2, partial(on_two_ranks, tmp_path / "two"))
    (one,), two = (open_run(open_store(tmp_path / name)).complete[-1].manifests for name in ("one", "two"))
    assert len(two) == 2
    assert one.measured is not None
    for field, exact in (("numel", True), ("squares", False), ("moved", False)):
        total = sum(getattr(m.measured, field) for m in two)
        assert total == pytest.approx(getattr(one.measured, field), rel=0 if exact else 1e-5)
        assert all(getattr(m.measured, field) > 0 for m in two)


def test_a_refused_manifest_says_what_the_job_did_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=5) as ema:
        for t in range(1, 11):
            with torch.no_grad():
                model.weight.fill_(math.nan if t == 5 else t)
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]
    text = next((tmp_path / "run/snapshots/000000000005-a0").glob("rank-*.json")).read_bytes()
    facts = json.loads(text)
    assert facts["refused"] == "its parameters are not finite"
    assert facts["measured"]["updates_refused"] == 1
    assert (facts["measured"]["numel"], facts["measured"]["squares"]) == (0, 0)  # no averages were read for it
    assert "not finite" in caplog.text


def test_huge_parameters_are_measured_and_infinite_sums_cost_no_snapshot(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 1e25)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=5) as ema:
        for _ in range(5):
            ema.update_(model)
    seen = open_run(open_store(tmp_path / "run")).complete[-1].manifests[0].measured
    assert seen is not None
    assert seen.squares == pytest.approx(16e50, rel=1e-6)
    assert measured(Counts(), 0, 16, math.inf, 0.0) is None
    assert measured(Counts(), 0, 16, math.inf, math.nan) is None


@pytest.mark.parametrize(
    ("still", "numel"), [(torch.full((1,), 1e7), 1000), (torch.full((1,), 1000.0), 1001), (torch.ones(4000), 5000)]
)
def test_what_does_not_move_has_no_part(tmp_path: Path, still: torch.Tensor, numel: int) -> None:
    torch.manual_seed(0)
    model = nn.ParameterDict({"still": nn.Parameter(still), "w": nn.Parameter(0.02 * torch.randn(1000))})
    with PostHocEMA.from_model(
        model, tmp_path, sigma_rels=(0.05, 0.28), update_every=1, checkpoint_every=20, checkpoint_dtype=torch.float16
    ) as ema:
        for t in range(1, 201):
            with torch.no_grad():
                model["w"] += 1e-3 * torch.randn(1000)
            ema.update_(model)
            if t % 20 == 0:
                ema._session.writer.drain()  # type: ignore[union-attr]
    run = open_run(open_store(tmp_path))
    seen = run.complete[-1].manifests[0].measured
    assert seen is not None
    assert seen.numel == numel  # not what is beyond float16, and so stored as float32
    assert seen.moving_squares / seen.moved < 0.01  # that of the weights
    assert plan(run, [0.08])[0].certificate.profile_error < 0.2


def with_measured(run: Run, **values: float) -> Run:
    def changed(m: Manifest) -> Manifest:
        return replace(m, measured=replace(m.measured, **values))  # type: ignore[type-var, arg-type]

    return replace(
        run, snapshots=tuple(replace(s, manifests=tuple(map(changed, s.manifests)) * 3) for s in run.snapshots)
    )


@pytest.mark.parametrize("value", [1e308, 1e150, 1e-320, 0.0])
@pytest.mark.parametrize("field", ["squares", "moved", "moving_squares", "moving_moved"])
def test_odd_numbers_of_somebody_else_do_not_stop_a_synthesis(field: str, value: float) -> None:
    simulated = Simulated(range(1, 201), range(20, 201, 20), (0.05, 0.28), ["BF16"] * 10, step=0.01, seed=0)
    assert plan(with_measured(simulated.run, **{field: value}), [0.1])[0].describe()["certificate"]


@pytest.mark.parametrize("field", ["squares", "moved", "moving_squares", "moving_moved"])
def test_sums_of_squares_are_not_negative(field: str) -> None:
    facts = asdict(measured(Counts(), 0, 1, 1.0, 1.0))  # type: ignore[arg-type]
    assert decoder(Measured)(facts)
    with pytest.raises(MisfitError, match="must not be negative"):
        decoder(Measured)(facts | {field: -1e-300})


def test_where_the_noise_is_absurd_least_squares_are_taken_and_poor_ones_are_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    simulated = Simulated(range(1, 201), range(20, 201, 20), (0.05, 0.28), ["F16"] * 10, step=0.01, seed=0)
    (recipe,) = plan(with_measured(simulated.run, moving_squares=1e12, moving_moved=1.0), [0.1])
    assert not recipe.certificate.noise_aware
    assert_plain(recipe)
    poor = replace(recipe.certificate, noise_aware=True, profile_error=0.6, parameter_error=0.0)
    assert not poor.good
    announce([replace(recipe, certificate=poor)])
    assert "the profile error is 60.0%, above 50%" in caplog.text
