"""From a run to recipes: any profile as a target, what its certificate promises, and what is left out."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from phema_dist import PostHocEMA
from phema_dist.errors import ProfileError, SnapshotError
from phema_dist.prediction import in_percent
from phema_dist.profile import Array
from phema_dist.storage.run import Run, open_run
from phema_dist.storage.store import open_store
from phema_dist.synthesis.consolidate import empty_state, fill_states
from phema_dist.synthesis.recipe import GOOD_ERROR, Recipe, announce, plan, stored_recipe
from phema_dist.synthesis.stream import stream
from phema_dist.target import ConstantBeta, Explicit, Power, Target, UniformTail, neighbours
from phema_dist.walk import GOOD_NOISE

NUM_UPDATES = 400
CADENCES = {
    "steps": list(range(1, NUM_UPDATES + 1)),
    "irregular": np.cumsum(np.random.default_rng(0).integers(1, 12, NUM_UPDATES)).tolist(),
}


class Walk(nn.Module):
    """A random walk of parameters, and beside it which update they were seen at: an average holds the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(NUM_UPDATES))
        self.walk = nn.Parameter(torch.zeros(32))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))


@pytest.fixture(scope="module", params=CADENCES)
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int], Array]:
    """A run, the t of its updates, and the parameters [updates, 32] that were seen."""
    times, generator = CADENCES[request.param], torch.Generator().manual_seed(1)
    walk = torch.randn(NUM_UPDATES, 32, generator=generator).cumsum(0)
    model, folder = Walk(), tmp_path_factory.mktemp("walk") / "run"
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=20) as ema, torch.no_grad():
        for i, t in enumerate(times):
            model.seen.zero_()[i] = 1
            model.walk.copy_(walk[i])
            model.at.fill_(t)
            ema.update_(model, t=t)
            if i % 20 == 19:
                ema._session.writer.drain()  # type: ignore[union-attr]
    return open_run(open_store(folder)), times, walk.double().numpy()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """100 steps and 10 snapshots; tests that break something take `copy_of` it."""
    model, folder = nn.Linear(4, 4), tmp_path_factory.mktemp("plain") / "run"
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=10) as ema:
        for _ in range(100):
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]
    return open_run(open_store(folder))


def broken(run: Run, problems: dict[int, str], *, unfinished: bool = False) -> Run:
    snapshots = [
        replace(s, problem=problems[s.t], manifests=(), unfinished=unfinished) if s.t in problems else s
        for s in run.snapshots
    ]
    return replace(run, snapshots=tuple(snapshots))


def made(run: Run, recipes: Sequence[Recipe]) -> list[dict[str, Array]]:
    states = [empty_state(run.info) for _ in recipes]
    for state, recipe in zip(states, recipes, strict=True):
        stream(run.store, run.info, [recipe], fill_states([state]))
    return [{name: tensor.double().numpy() for name, tensor in state.items()} for state in states]


def ema_of(parameters: Array, times: Sequence[int], beta: float, every: float) -> Array:
    """An EMA as everybody writes it, in float64, started at zero and corrected for that."""
    average, mass, last = np.zeros_like(parameters[0]), 0.0, 0
    for t, now in zip(times, parameters, strict=True):
        kept = beta ** ((t - last) / every)
        average, mass, last = kept * average + (1 - kept) * now, kept * mass + 1 - kept, t
    result: Array = average / mass
    return result


def tail_mean(parameters: Array, times: Sequence[int], fraction: float) -> Array:
    """The mean over the last part; parameters stand for the time since the update before them."""
    start = times[-1] * (1 - fraction)
    spans = [max(0.0, t - max(before, start)) for before, t in zip([0, *times], times, strict=False)]
    return np.average(parameters, axis=0, weights=spans)


def tracked(target: Target, parameters: Array, times: Sequence[int]) -> Array:
    if isinstance(target, ConstantBeta):
        return ema_of(parameters, times, target.beta, target.every)
    assert isinstance(target, UniformTail)
    return tail_mean(parameters, times, target.fraction)


def rate(updates: float) -> Callable[[int], ConstantBeta]:
    """A beta with a mean age of so many updates."""
    return lambda t: ConstantBeta(math.exp(-NUM_UPDATES / t / updates))


# The averages that were tracked directly


@pytest.mark.parametrize(
    ("target_at", "wrong_at"),
    [
        (rate(20), rate(22)),
        (rate(60), rate(66)),
        (lambda t: ConstantBeta(0.9, every=t / 100), lambda t: ConstantBeta(0.89, every=t / 100)),
        (lambda _: UniformTail(0.5), lambda _: UniformTail(0.53)),
        (lambda _: UniformTail(0.2), lambda _: UniformTail(0.25)),
        (lambda _: UniformTail(0.33), None),  # no snapshot there: too poor to tell it from others
    ],
    ids=["beta, 20 updates", "beta, 60 updates", "beta every", "last half", "last fifth", "last third"],
)
def test_an_average_is_within_its_certificate_of_the_one_tracked_directly(
    walked: tuple[Run, list[int], Array], target_at: Callable[[int], Target], wrong_at: Callable[[int], Target] | None
) -> None:
    run, times, walk = walked
    target = target_at(times[-1])
    if isinstance(target, UniformTail) and wrong_at:  # a window that begins at a snapshot, whatever the cadence
        starts = [s.t for s in run.complete]
        start = min(starts, key=lambda s: abs(s / times[-1] - 1 + target.fraction))
        target = UniformTail(1 - start / times[-1])
    (recipe,) = plan(run, [target])
    (average,) = made(run, [recipe])
    one_hot, widths = np.eye(NUM_UPDATES), np.diff(times, prepend=0)

    # What it weighs every update by is as near to the wanted weights as was said.
    wanted = tracked(target, one_hot, times)
    residual = np.sqrt(((average["seen"] - wanted) ** 2 / widths).sum())
    size = np.sqrt((wanted**2 / widths).sum())
    rounding = 2e-6 * recipe.certificate.coefficient_norm
    assert residual / size == pytest.approx(recipe.certificate.recorded_error, rel=1e-3, abs=rounding)

    # So the parameters are as near as Cauchy and Schwarz say: weights add up to 1, and any centre will do.
    centred = walk - np.average(walk, axis=0, weights=widths)
    spread = np.sqrt((centred**2 * widths[:, None]).sum())
    bound = (recipe.certificate.recorded_error + rounding) * size * spread
    assert np.linalg.norm(average["walk"] - tracked(target, walk, times)) <= bound
    if wrong_at is not None:
        assert recipe.certificate.good
        assert np.linalg.norm(average["walk"] - tracked(wrong_at(times[-1]), walk, times)) > bound


def test_an_ema_that_begins_with_the_first_parameters_differs_by_its_share_of_them() -> None:
    walk = np.random.default_rng(0).normal(size=(50, 3)).cumsum(axis=0)
    biased, first = np.array([5.0, -3, 1]), np.array([5.0, -3, 1])
    for now in walk:
        biased = 0.95 * biased + 0.05 * now
    kept = 0.95**50
    unbiased = ema_of(walk, range(1, 51), 0.95, 1)
    np.testing.assert_allclose(biased, kept * first + (1 - kept) * unbiased, rtol=1e-12)


@pytest.mark.parametrize("target", [Power(0.12), ConstantBeta(0.98), UniformTail(0.3)], ids=str)
def test_time_begins_at_the_origin(tmp_path: Path, target: Target) -> None:
    runs = []
    for name, origin in (("at once", 0), ("late", 500)):
        model = nn.Linear(2, 2)
        with PostHocEMA.from_model(
            model, tmp_path / name, update_every=1, checkpoint_every=1, update_after_step=origin
        ) as ema:
            for t in range(origin + 10, origin + 101, 10):
                ema.update_(model, t=t)
                ema._session.writer.drain()  # type: ignore[union-attr]
        runs.append(open_run(open_store(tmp_path / name)))
    assert [run.info.origin for run in runs] == [0, 500]
    (early,), (late,) = (plan(run, [target]) for run in runs)
    assert (early.t, late.t) == (100, 600)
    assert [term.coefficient for term in early.terms] == [term.coefficient for term in late.terms]
    assert early.certificate == late.certificate


# Ends


def test_each_target_may_have_its_own_end(plain: Run) -> None:
    wanted = [0.1, Power(0.1, t=60), ConstantBeta(0.95, t=40), Explicit.of({20: 0.5, 30: 0.5}), UniformTail(0.5, t=55)]
    found = plan(plain, wanted, t=80)
    assert [recipe.t for recipe in found] == [80, 60, 40, 30, 55]
    assert [recipe.newest.t for recipe in found] == [80, 60, 40, 30, 50]
    for recipe, target in zip(found, wanted, strict=True):
        assert max(term.snapshot.t for term in recipe.terms) <= recipe.t
        (alone,) = plan(plain, [target], t=80)
        assert alone == recipe  # bit for bit
    assert plan(plain, [0.1])[0].t == 100


@pytest.mark.parametrize("target", [Power(0.1, t=5), ConstantBeta(0.9, t=5), UniformTail(0.5, t=5)], ids=str)
def test_an_end_outside_of_the_run_is_refused(plain: Run, target: Target) -> None:
    with pytest.raises(SnapshotError, match=r"no complete snapshot at or before t=5; the first complete one is t=10"):
        plan(plain, [target])
    with pytest.raises(SnapshotError, match=r"complete snapshots up to t=100; got t=101\. Leave t out"):
        plan(plain, [replace(target, t=101)])
    with pytest.raises(SnapshotError, match=r"up to t=90; got t=100\. Incomplete: t=100: bitten\. Leave t out"):
        plan(broken(plain, {100: "bitten"}), [replace(target, t=100)])


def test_a_stored_average_is_looked_up(plain: Run) -> None:
    (recipe,) = plan(plain, [Power(0.28, t=70)])
    assert [(term.sigma_rel, term.snapshot.t, term.coefficient) for term in recipe.terms] == [(0.28, 70, 1.0)]
    assert recipe.certificate == replace(
        stored_recipe(recipe.newest, 0.28).certificate, error_with_all=recipe.certificate.error_with_all
    )


# Given coefficients


def test_given_coefficients_are_taken_as_they_are(walked: tuple[Run, list[int], Array]) -> None:
    run, times, _ = walked
    a, b, c = times[99], times[199], times[299]
    short, long = plan(run, [Explicit.of({b: 1.5, a: -0.5, c: 0.0}), Explicit.of({b: 1.5, a: -0.5}, sigma_rel=0.28)])
    assert [(term.sigma_rel, term.snapshot.t, term.coefficient) for term in short.terms] == [
        (0.05, a, -0.5), (0.05, b, 1.5),
    ]  # fmt: skip
    assert (short.t, short.newest.t) == (c, c)  # its buffers are from there
    assert {term.sigma_rel for term in long.terms} == {0.28}
    assert (long.t, long.newest.t) == (b, b)
    facts = long.certificate
    assert (facts.profile_error, facts.recorded_error, facts.left_out) == (0, 0, ())
    assert (facts.coefficient_sum, facts.num_snapshots) == (1, 2)
    assert facts.coefficient_norm == pytest.approx(math.sqrt(2.5))
    assert facts.rounding_noise > 0
    stored = made(run, [stored_recipe(s, 0.28) for s in run.complete if s.t in {a, b}])
    (found,) = made(run, [long])
    np.testing.assert_allclose(found["walk"], 1.5 * stored[1]["walk"] - 0.5 * stored[0]["walk"], rtol=1e-5, atol=1e-5)
    assert found["at"] == b


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (Explicit.of({5: 0.5, 10: 0.5}), SnapshotError, "has t=10, 20, 30, 40, 60, 70, 80, 90, 100; got t=5."),
        (Explicit.of({50: 1.0}), SnapshotError, r"got t=50. Incomplete: t=50: bitten."),
        (Explicit.of({10: 1.0}, sigma_rel=0.1), ProfileError, r"one of \(0.05, 0.28\); got 0.1"),
    ],
)
def test_given_coefficients_must_be_those_of_stored_averages(
    plain: Run, target: Target, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(broken(plain, {50: "bitten"}), [target])


# What is left out


def test_what_is_left_out_is_named_with_what_it_costs(plain: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = broken(plain, {80: "bitten", 90: "chewed"})
    whole, less = plan(plain, [0.1])[0], plan(run, [0.1])[0]
    assert less.certificate.left_out == ("t=80: bitten", "t=90: chewed")
    assert less.certificate.error_with_all == whole.certificate.profile_error < less.certificate.profile_error
    assert whole.certificate.error_with_all == whole.certificate.profile_error
    before = plan(run, [Power(0.1, t=70), Explicit.of({70: 1.0})])
    assert all(recipe.certificate.left_out == () for recipe in before)
    with caplog.at_level(logging.WARNING):
        announce([*before, less, *plan(run, [0.15])])
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert lines[:2] == [
        "left out a snapshot that cannot be used, t=80: bitten",
        "left out a snapshot that cannot be used, t=90: chewed",
    ]
    cost = f"{in_percent(less.certificate.profile_error)} instead of {in_percent(whole.certificate.profile_error)}"
    assert lines[2].startswith("sigma_rel=0.1 at t=100: without what was left out, the profile error is")
    assert lines[2].endswith(cost)
    assert len(lines) == 4


def test_an_unusable_snapshot_is_as_if_it_were_incomplete(plain: Run) -> None:
    folders = {s.t: s.folder for s in plain.complete}
    (found,) = plan(plain, [0.1], unusable={folders[80]: "bitten"})
    assert found == plan(broken(plain, {80: "bitten"}), [0.1])[0]
    assert 80 not in {term.snapshot.t for term in found.terms}
    (earlier,) = plan(plain, [0.1], unusable={folders[100]: "bitten"})
    assert (earlier.t, earlier.newest.t) == (90, 90)
    with pytest.raises(SnapshotError, match="t=100: bitten"):
        plan(plain, [0.1], t=100, unusable={folders[100]: "bitten"})
    for target in (Power(0.1), Explicit.of({10: 1.0})):
        with pytest.raises(SnapshotError, match=r"no complete snapshot yet.*t=10: bitten"):
            plan(plain, [target], unusable=dict.fromkeys(folders.values(), "bitten"))


def test_strict_refuses_what_would_be_left_out(plain: Run) -> None:
    run = broken(plain, {20: "bitten", 80: "chewed"})
    with pytest.raises(SnapshotError, match=r"there is t=20: bitten; t=80: chewed\. Leave out --strict"):
        plan(run, [0.1], strict=True)
    with pytest.raises(SnapshotError, match=r"there is t=20: bitten\. Leave"):
        plan(run, [Power(0.1, t=70)], strict=True)
    with pytest.raises(SnapshotError, match="bitten"):
        plan(plain, [0.1], unusable={plain.complete[3].folder: "bitten"}, strict=True)
    assert plan(run, [Power(0.1, t=15), Explicit.of({100: 1.0})], strict=True)
    assert plan(plain, [0.1], strict=True)


def test_a_damaged_end_is_named_and_one_that_is_being_written_is_not(
    plain: Run, caplog: pytest.LogCaptureFixture
) -> None:
    writing = broken(plain, {100: "manifests of rank 0 are missing"}, unfinished=True)
    (found,) = plan(writing, [0.28], strict=True)
    assert (found.t, found.certificate.left_out, found.certificate.ends_before) == (90, (), ())
    damaged = broken(plain, {100: "bitten"})
    (found,) = plan(damaged, [0.28])
    assert (found.t, found.certificate.left_out, found.certificate.ends_before) == (90, (), ("t=100: bitten",))
    announce([found])
    assert "averages end at t=90, before a snapshot that cannot be used, t=100: bitten" in caplog.text
    with pytest.raises(SnapshotError, match="t=100: bitten"):
        plan(damaged, [0.28], strict=True)
    assert plan(damaged, [0.28], t=90, strict=True)[0].certificate.ends_before == ()
    assert plan(damaged, [Power(0.28, t=90)], strict=True)[0].certificate.ends_before == ()


# Suggestions


@pytest.mark.parametrize("target", [Power(0.02), ConstantBeta(0.7), UniformTail(0.25)], ids=str)
def test_a_poor_target_suggests_the_nearest_good_one(
    plain: Run, caplog: pytest.LogCaptureFixture, target: Power | ConstantBeta | UniformTail
) -> None:
    (poor,) = plan(plain, [target])
    assert not poor.certificate.good
    near = plan(plain, list(neighbours(target, 100, range(10, 101, 10)))[:60])
    nearest = next(recipe for recipe in near if recipe.certificate.good)
    assert nearest.certificate.suggestion == ""
    assert poor.certificate.suggestion == (
        f"{nearest.target} would be good (error {in_percent(nearest.certificate.profile_error)})"
    )
    announce([poor])
    assert f"{target} at t=100: the profile error is" in caplog.text
    assert poor.certificate.suggestion in caplog.text


def test_where_nothing_is_good_nothing_is_suggested(plain: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = broken(plain, {s.t: "bitten" for s in plain.snapshots if s.t != 10})
    recipes = plan(run, [UniformTail(0.5)]) + plan(plain, [Power(0.2)], 95)
    assert [recipe.certificate.suggestion for recipe in recipes] == ["", ""]
    announce(recipes)
    assert "more snapshots, or an average nearer to the tracked ones, would be more exact" in caplog.text
    assert "t=90, where a snapshot is, would be more exact" in caplog.text


def test_noise_is_a_reason_to_suggest_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4)
    with PostHocEMA.from_model(
        model, tmp_path / "run", update_every=1, checkpoint_every=5, checkpoint_dtype=torch.bfloat16
    ) as ema:
        for _ in range(100):
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]
    (poor,) = plan(open_run(open_store(tmp_path / "run")), [UniformTail(0.05)])
    assert poor.certificate.profile_error < GOOD_ERROR
    assert poor.certificate.rounding_noise > GOOD_NOISE
    announce([poor])
    assert "float32 ones do not\n" in caplog.text  # what would be good is more than twice as long


# What is written down


def test_a_description_survives_json_and_tells_recipes_apart(plain: Run) -> None:
    wanted = [0.1, Power(0.1, t=90), ConstantBeta(0.95), UniformTail(0.2), Explicit.of({20: 0.5, 30: 0.5}), 0.28]
    run = broken(plain, {50: "bitten"})
    described = [recipe.describe() for recipe in plan(run, wanted)]
    assert json.loads(json.dumps(described)) == described
    assert described == [recipe.describe() for recipe in plan(open_and_break(run), wanted)]
    assert len({json.dumps(facts["terms"]) + str(facts["t"]) for facts in described}) == len(wanted)
    power, _, beta, tail, explicit, _ = described
    assert (power["target"], power["sigma_rel"], power["t"]) == ("sigma_rel-0.1", 0.1, 100)
    assert (beta["beta"], beta["every"], tail["fraction"]) == (0.95, 1, 0.2)
    assert explicit["terms"] == [[0.05, 20, 0.5, 0, 0], [0.05, 30, 0.5, 0, 0]]
    assert explicit["buffers"] == [30, 0]
    assert power["certificate"]["left_out"] == ["t=50: bitten"]
    assert power["attempts"] == {"0": plain.attempts[0].token}


def open_and_break(run: Run) -> Run:
    return broken(open_run(run.store), {50: "bitten"})


def test_the_same_schedule_of_another_training_is_another_recipe(tmp_path: Path) -> None:
    described = []
    for name in ("one", "other"):
        model = nn.Linear(2, 2)
        with PostHocEMA.from_model(model, tmp_path / name, update_every=1, checkpoint_every=10) as ema:
            for _ in range(10):
                ema.update_(model)
        described += [plan(open_run(open_store(tmp_path / name)), [0.1])[0].describe()]
    assert described[0]["terms"] == described[1]["terms"]
    assert described[0] != described[1]


def test_the_bias_that_somebodys_own_ema_would_have_is_told(plain: Run, caplog: pytest.LogCaptureFixture) -> None:
    short, long = plan(plain, [ConstantBeta(0.9), ConstantBeta(0.98, every=2)])
    assert short.certificate.bias_removed == pytest.approx(0.9**100)
    assert long.certificate.bias_removed == pytest.approx(0.98**50)
    announce([short])
    assert "first parameters" not in caplog.text
    announce([long])
    assert "an EMA that begins with the first parameters would still hold 36.4% of them" in caplog.text
