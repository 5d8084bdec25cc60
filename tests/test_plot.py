"""Pictures show the numbers that they should, read back from what was drawn, and say what they show."""

import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Target as Place
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

from phema_dist import PostHocEMA
from phema_dist.cli import main
from phema_dist.errors import ProfileError, SettingsError, SnapshotError
from phema_dist.plot import (
    Snapshots,
    coefficients_figure,
    comparison_figure,
    composed,
    figure_to_image,
    planned,
    profiles_figure,
    reconstruction_error_figure,
    save_figure,
    snapshots_of,
    timeline_figure,
)
from phema_dist.prediction import in_percent
from phema_dist.profile import Array
from phema_dist.schedule import reconstruction_errors
from phema_dist.storage.manifest import Attempt, Imported, Measured
from phema_dist.storage.run import Run, open_run
from phema_dist.storage.store import open_store
from phema_dist.synthesis.recipe import plan
from phema_dist.target import ConstantBeta, Explicit, Power, UniformTail

TS, PAIR = range(1000, 9000, 1000), (0.05, 0.28)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """100 updates from t = 50 on, seven of them for each snapshot."""
    model, folder = nn.Linear(4, 4), tmp_path_factory.mktemp("plot") / "run"
    with PostHocEMA.from_model(
        model, folder, update_every=1, checkpoint_every=7, update_after_step=50, t_unit="samples"
    ) as ema:
        for i in range(100):
            ema.update_(model, t=52 + 2 * i)
            ema._session.writer.drain()  # type: ignore[union-attr]
    return open_run(open_store(folder))


def texts(figure: Figure) -> str:
    """All that stands on a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))  # type: ignore[attr-defined]


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def drawn(axes: Axes, label: str) -> tuple[Array, Array]:
    """The points of a line, by its label."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    x, y = line.get_data()
    return np.asarray(x, dtype=float), np.asarray(y, dtype=float)


# How exactly each sigma_rel can be made


def one_hot_averages(sigma_rels: Sequence[float], times: Array, ts: Collection[float]) -> dict[float, Array]:
    """The weight of each update in each average [sigma_rel, update] at some ts: a recursion over one-hot parameters."""
    power = np.array([gamma_of(sigma_rel) + 1 for sigma_rel in sigma_rels])[:, None]
    weights, last, found = np.zeros((len(power), len(times))), 0.0, {}
    for i, now in enumerate(times):
        kept = (last / now) ** power
        weights[:, :i] *= kept
        weights[:, i : i + 1] = 1 - kept
        last = now
        if now in ts:
            found[now] = weights.copy()
    return found


def gamma_of(sigma_rel: float) -> float:
    """The exponent, by the roots of the cubic that defines it: (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2."""
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


@pytest.mark.parametrize("sigma_rels", [(0.05, 0.28), (0.05, 0.10)])
def test_the_curve_agrees_with_one_hot_averages_to_two_digits(sigma_rels: tuple[float, ...]) -> None:
    steps, count = 4000, 20
    ts = [steps // count * (i + 1) for i in range(count)]
    (axes,) = reconstruction_error_figure(ts, sigma_rels).axes
    x, percent = (np.asarray(values)[::12] for values in axes.lines[0].get_data())
    times = np.arange(1.0, steps + 1)
    columns = np.concatenate(list(one_hot_averages(sigma_rels, times, ts).values())).T
    wanted = one_hot_averages(x, times, [steps])[steps].T
    last = columns[:, -1:]  # its coefficient is 1 minus the others, so that they add up to one
    free = np.linalg.lstsq(columns[:, :-1] - last, wanted - last, rcond=None)[0]
    made = columns[:, :-1] @ free + last * (1 - free.sum(axis=0))
    expected = np.linalg.norm(made - wanted, axis=0) / np.linalg.norm(wanted, axis=0)
    compared = expected > 1e-4
    assert compared.sum() > 10
    np.testing.assert_allclose(percent[compared] / 100, expected[compared], rtol=5e-3)
    assert np.all(percent[~compared] < 0.012)


def test_the_curve_is_the_reconstruction_error_in_percent() -> None:
    (axes,) = reconstruction_error_figure(TS, PAIR).axes
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(y, np.maximum(100 * reconstruction_errors(TS, PAIR, x), 1e-3), rtol=1e-6)
    assert set(PAIR) < set(x)
    assert y[list(x).index(0.05)] == 1e-3
    assert axes.get_yscale() == "log"
    assert "%" in axes.get_ylabel()
    assert r"\sigma" in axes.get_xlabel()
    assert axes.get_title() == "8 snapshots, synthesized at t = 8000"


def test_the_end_may_lie_behind_the_newest_snapshot() -> None:
    at_end, later = (
        reconstruction_error_figure(Snapshots(TS, PAIR, end), (), (0.1, 0.2)).axes[0].lines[0].get_ydata()
        for end in (None, 8400)
    )
    assert np.all(np.asarray(later) > 3 * np.asarray(at_end))


def test_the_tracked_sigma_rels_are_marked() -> None:
    (axes,) = reconstruction_error_figure(TS, PAIR).axes
    assert [line.get_xdata()[0] for line in axes.lines[1:]] == [0.05, 0.28]
    assert labels(axes) == ["tracked"]


def test_the_range_is_the_one_asked_for() -> None:
    (axes,) = reconstruction_error_figure(TS, PAIR, (0.1, 0.2)).axes
    assert axes.get_xlim() == (0.1, 0.2)
    for draw in (
        reconstruction_error_figure,
        lambda ts, *rest: comparison_figure({"a": Snapshots(ts, PAIR)}, *rest[1:]),
    ):
        with pytest.raises(ProfileError, match=r"got 0\.4\."):
            draw(TS, PAIR, (0.1, 0.4))
        with pytest.raises(ProfileError, match="no averages are stored"):
            draw([], PAIR)
    with pytest.raises(SettingsError, match="at least one set"):
        comparison_figure({})


def test_several_sets_are_compared_by_their_labels() -> None:
    sets = {
        "pair": Snapshots(TS, PAIR), "more": Snapshots(range(1, 21), PAIR), "three": Snapshots(TS, (0.05, 0.1, 0.2)),
        "one": Snapshots(TS, (0.04,)),
    }  # fmt: skip
    (axes,) = comparison_figure(sets).axes
    assert labels(axes) == list(sets)
    assert axes.get_xlim() == pytest.approx((0.02, 12**-0.5))
    for label, found in sets.items():
        x, y = drawn(axes, label)
        errors = reconstruction_errors(found.ts, found.sigma_rels, x)
        np.testing.assert_allclose(y, np.maximum(100 * errors, 1e-3), rtol=1e-5)
    marks = [line for line in axes.lines if line.get_marker() == "^"]
    assert [tuple(line.get_xdata()) for line in marks] == [found.sigma_rels for found in sets.values()]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines if line.get_marker() != "^"}
    assert len(looks) == len({colour for colour, _ in looks}) == len({style for _, style in looks}) == 4


# What an average is made of


def steps(axes: Axes, label: str) -> tuple[Array, Array]:
    """Heights and edges of a step function, by its label."""
    (patch,) = [patch for patch in axes.patches if patch.get_label() == label]
    data = patch.get_data()  # type: ignore[attr-defined]
    return np.asarray(data.values), np.asarray(data.edges)


@pytest.mark.parametrize("target", [Power(0.15), Power(0.15, t=205), UniformTail(0.5), ConstantBeta(0.98)], ids=str)
def test_the_profiles_are_those_of_the_recorded_updates(run: Run, target: Power | UniformTail | ConstantBeta) -> None:
    (recipe,) = plan(run, [target])
    above, below = profiles_figure(composed(run, recipe)).axes
    values, edges = steps(above, "synthesized")
    end = recipe.t - 50
    times = np.append(np.arange(2.0, end, 2), end)
    np.testing.assert_array_equal(edges, np.append(50, times + 50))
    widths = np.diff(edges) / end
    assert np.sum(values * widths) == pytest.approx(1)
    averages = one_hot_averages(PAIR, times, [s.t - 50 for s in run.complete])
    made = sum(term.coefficient * averages[term.snapshot.t - 50][PAIR.index(term.sigma_rel)] for term in recipe.terms)
    np.testing.assert_allclose(values * widths, made, atol=1e-9)

    asked, _ = steps(above, "asked")
    assert np.sum(asked * widths) == pytest.approx(1)
    (difference,) = below.patches
    np.testing.assert_allclose(difference.get_data().values, values - asked, atol=1e-12)  # type: ignore[attr-defined]
    error = np.sqrt(np.sum((values - asked) ** 2 * widths) / np.sum(asked**2 * widths))
    if target.t is None:  # else an interval is cut that in the run is not
        assert error == pytest.approx(recipe.certificate.recorded_error, rel=1e-6, abs=1e-9)
    for sigma_rel, expected in zip(PAIR, averages[max(averages)], strict=True):
        tracked, _ = steps(above, f"tracked {sigma_rel:g}")
        np.testing.assert_allclose(tracked * widths, expected, atol=1e-9)
    assert labels(above) == ["asked", "synthesized", "tracked 0.05", "tracked 0.28"]
    assert above.get_ylabel() == "weight (% per % of t)"
    assert below.get_xlabel() == "t (samples)"


def test_an_imported_run_is_drawn_as_what_its_averages_really_are(run: Run) -> None:
    imported = replace(run, info=replace(run.info, imported=Imported("posthoc-ema", 2)))
    recipes = plan(imported, [0.1, 0.2])
    for recipe in recipes:
        above, _ = profiles_figure(composed(imported, recipe)).axes
        synthesized, edges = steps(above, "synthesized")
        asked, _ = steps(above, "asked")
        widths = np.diff(edges) / (recipe.t - 50)
        error = np.sqrt(np.sum((synthesized - asked) ** 2 * widths) / np.sum(asked**2 * widths))
        assert error == pytest.approx(recipe.certificate.recorded_error, rel=1e-6)
    errors = snapshots_of(imported).errors(np.array([0.1, 0.2]))
    assert errors == pytest.approx([recipe.certificate.profile_error for recipe in recipes], rel=1e-6)
    assert errors != pytest.approx(snapshots_of(run).errors(np.array([0.1, 0.2])), rel=0.01)


def test_dense_updates_are_drawn_as_their_mean_and_a_short_average_with_its_end_only() -> None:
    made = planned(20, PAIR, Power(0.1))
    dense = replace(made, times=np.linspace(0, 100, 200_001)[1:])
    above, _ = profiles_figure(dense).axes
    values, edges = steps(above, "synthesized")
    assert 1000 < len(values) <= 1200
    assert np.sum(values * np.diff(edges)) / 100 == pytest.approx(1)
    short = replace(dense, target=replace(made.target, sigma_rel=0.002))  # type: ignore[type-var]
    above, below = profiles_figure(short).axes
    _, edges = steps(above, "asked")
    assert edges[-1] == 0
    assert -8 < edges[0] < -4
    assert below.get_xlabel() == "t minus end (% of training)"
    assert np.sum(steps(above, "asked")[0] * np.diff(edges)) / 100 == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.28), (0.05, 0.10, 0.20)])
@pytest.mark.parametrize("count", [2, 64])
def test_a_plan_is_drawn_over_shares_of_training(sigma_rels: tuple[float, ...], count: int) -> None:
    made = planned(count, sigma_rels, Power(0.15))
    assert made.coefficients.sum() == pytest.approx(1)
    error = reconstruction_errors(range(1, count + 1), sigma_rels, [0.15])[0]
    above, below = profiles_figure(made).axes
    difference = below.patches[0].get_data()  # type: ignore[attr-defined]
    asked, edges = steps(above, "asked")
    widths = np.diff(edges)
    found = np.sqrt(np.sum(difference.values**2 * widths) / np.sum(asked**2 * widths))
    assert found == pytest.approx(error, rel=0.15)  # what is drawn are means of 1200 parts
    assert f"profile error {in_percent(error)}" in texts(profiles_figure(made))
    axes = coefficients_figure(made).axes
    assert len(axes) == len(sigma_rels)
    assert axes[-1].get_xlabel() == "t (% of training)"


def stems(axes: Axes) -> dict[float, float]:
    """The coefficients drawn, by t; each is a stem from 0 with a dot at its end."""
    (lines,) = axes.collections
    found = {float(top[0]): float(top[1]) for bottom, top in lines.get_segments() if bottom[1] == 0}  # type: ignore[attr-defined]
    dots = {
        (float(x), float(y))
        for line in axes.lines
        if line.get_linestyle() == "None"
        for x, y in zip(*line.get_data(), strict=True)
    }
    assert dots == set(found.items())
    return found


@pytest.mark.parametrize("target", [Power(0.15), Power(0.05, t=120), Explicit.of({64: 0.25, 106: 0.75})], ids=str)
def test_the_coefficients_are_drawn_with_their_sign_and_their_certificate(run: Run, target: Power | Explicit) -> None:
    (recipe,) = plan(run, [target])
    figure = coefficients_figure(composed(run, recipe))
    for sigma_rel, axes in zip(PAIR, figure.axes, strict=True):
        expected = {s.t: 0.0 for s in run.complete if s.t <= recipe.t}
        expected |= {term.snapshot.t: term.coefficient for term in recipe.terms if term.sigma_rel == sigma_rel}
        assert stems(axes) == expected
        assert f"= {sigma_rel:g}" in axes.get_title(loc="left")
        assert axes.get_ylabel() == "coefficient"
    assert figure.axes[-1].get_xlabel() == "t (samples)"
    title, certificate = figure.get_suptitle(), recipe.certificate
    assert f"at t = {recipe.t}, from snapshots: {certificate.num_snapshots}\n" in title
    assert f"norm {certificate.coefficient_norm:.3g}" in title
    assert f"rounding {in_percent(certificate.rounding_noise)}" in title
    exact = isinstance(target, Explicit)
    assert (f"profile error {in_percent(certificate.profile_error)}" in title) is not exact
    above, below = profiles_figure(composed(run, recipe)).axes
    assert ("asked" in labels(above)) is not exact
    assert len(below.patches) == (not exact)


# A run's timeline


def measured(rank: int, t: int, **values: Any) -> Measured:
    facts = {
        "unix_time": 1e9 + 0.25 * t + rank, "numel": 20, "squares": 1.0, "moved": 0.5, "lag": rank,
        "stall_seconds": 0.01 * t * (1 + rank), "updates_skipped": 0, "updates_refused": 0, "snapshots_skipped": 0,
        "snapshots_failed": 0,
    }  # fmt: skip
    return Measured(**(facts | values))


def with_ranks(run: Run, world_size: int, **values: Any) -> Run:
    """The same run as if so many ranks had measured."""
    snapshots = []
    for s in run.snapshots:
        facts = [measured(rank, s.t, **values) for rank in range(world_size)]
        manifests = tuple(replace(s.manifests[0], rank=m, measured=fact) for m, fact in enumerate(facts))
        snapshots.append(replace(s, manifests=manifests))
    return replace(
        run, snapshots=tuple(snapshots), attempts=tuple(replace(a, world_size=world_size) for a in run.attempts)
    )


def test_the_timeline_has_a_panel_for_each_thing_that_ranks_measured(run: Run) -> None:
    ranks = 1024
    figure = timeline_figure(with_ranks(run, ranks, snapshots_failed=2))
    first, lag, stalls, skipped, wall = figure.axes
    assert "1 attempt of 1024 ranks" in figure.get_suptitle()
    ts = [s.t for s in run.complete]
    assert drawn(first, f"complete {len(ts)}")[0].tolist() == ts
    assert drawn(lag, "highest of the ranks")[1].tolist() == [1023] * len(ts)
    assert drawn(lag, "median")[1].tolist() == [511.5] * len(ts)
    assert drawn(stalls, "highest of the ranks")[0].tolist() == ts
    np.testing.assert_allclose(drawn(stalls, "highest of the ranks")[1], 0.01 * np.array(ts) * ranks)
    np.testing.assert_allclose(drawn(stalls, "median")[1], 0.01 * np.array(ts) * 512.5)
    assert labels(skipped) == ["snapshots failed"]
    assert set(drawn(skipped, "snapshots failed")[1]) == {2}
    x, y = (np.asarray(values) for values in wall.lines[0].get_data())
    assert x[0] == ts[0]
    assert x[-2] == ts[-1]
    np.testing.assert_allclose(y[~np.isnan(y)], 0.25)
    assert wall.get_xlabel() == "t (samples)"
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == [
        "attempt", "lag", "waited in", "count on the", "wall time"
    ]  # fmt: skip


def test_snapshots_are_drawn_by_attempt_and_state(run: Run) -> None:
    ts = [s.t for s in run.complete]
    early, later = run.snapshots[:5], run.snapshots[5:]
    whole = with_ranks(run, 2)
    lost = replace(later[1], attempt=1, problem="bitten", manifests=())
    resumed = replace(
        whole,
        attempts=(*whole.attempts, Attempt(1, 0, early[-1].t, 4, "y")),
        snapshots=(*whole.snapshots[:5], *(replace(s, attempt=1) for s in whole.snapshots[5:6]), lost,
                   *(replace(s, attempt=1) for s in whole.snapshots[7:])),
        abandoned=later[:2],
        pins=frozenset({ts[0], ts[-1], 7777}),
    )  # fmt: skip
    figure = timeline_figure(resumed)
    axes, lag = figure.axes[:2]
    assert "2 attempts of 2 to 4 ranks" in figure.get_suptitle()
    points = {label: list(zip(*drawn(axes, label), strict=True)) for label in labels(axes)}
    old, new = [(t, 0) for t in ts[:5]], [(t, 1) for t in ts[5:]]
    assert points == {
        f"complete {len(ts) - 1}": [*old, new[0], *new[2:]],
        "incomplete 1": [new[1]],
        "hidden 2": [(t, 0) for t in ts[5:7]],
        "pinned 2": [old[0], new[-1]],
    }
    begun = [tuple(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "-"]
    assert begun == [(run.attempts[0].t, ts[6]), (ts[4], ts[-1])]
    x, _ = drawn(lag, "median")
    assert np.flatnonzero(np.isnan(x)).tolist() == [5], "a line ends where an attempt does"
    assert x[~np.isnan(x)].tolist() == [*ts[:6], *ts[7:]]


def test_a_run_that_measured_nothing_says_so(run: Run) -> None:
    bare = replace(
        run, snapshots=tuple(replace(s, manifests=(replace(s.manifests[0], measured=None),)) for s in run.snapshots)
    )
    figure = timeline_figure(bare)
    assert len(figure.axes) == 1
    assert "lag, stalls and wall time were not recorded" in figure.get_suptitle()
    some = replace(bare, snapshots=(*bare.snapshots[:-2], *with_ranks(run, 1).snapshots[-2:]))
    figure = timeline_figure(some)
    assert len(figure.axes) == 3, "what was 0 all the time has no panel"
    assert f"at {len(run.complete) - 2} of {len(run.complete)} snapshots nothing was measured" in figure.get_suptitle()
    one = replace(bare, snapshots=(*bare.snapshots[:-1], *with_ranks(run, 1).snapshots[-1:]))
    assert len(timeline_figure(one).axes) == 2, "a wall time needs two snapshots"
    with pytest.raises(SnapshotError, match="no complete snapshot yet"):
        timeline_figure(replace(run, snapshots=()))


# How they look


def overlapping(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pairs of texts that lie on one another, and texts that leave the figure, of those that are really drawn."""
    shown: dict[Text, None] = {}
    draw = Text.draw
    with monkeypatch.context() as patched:
        patched.setattr(Text, "draw", lambda text, renderer: (shown.setdefault(text), draw(text, renderer)))
        figure.draw_without_rendering()  # type: ignore[no-untyped-call]
    written = [text for text in shown if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in written]
    found = [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]
    whole = figure.bbox.padded(1)
    return found + [
        (text, "the border")
        for text, box in boxes
        if box.x0 < whole.x0 or box.x1 > whole.x1 or box.y0 < whole.y0 or box.y1 > whole.y1
    ]


def several(run: Run) -> list[Figure]:
    recipes = plan(run, [Power(0.15), ConstantBeta(0.9), Explicit.of({64: 0.25, 106: 0.75})])
    made = [composed(run, recipe) for recipe in recipes]
    plans = [planned(2, (0.1,), Power(0.2)), planned(64, (0.05, 0.1, 0.2), Power(0.15))]
    worst = with_ranks(run, 1024, snapshots_failed=3, snapshots_skipped=200, updates_skipped=70, updates_refused=1)
    broken = replace(worst.snapshots[3], problem="bitten")
    worst = replace(worst, snapshots=(*worst.snapshots[:3], broken, *worst.snapshots[4:]))
    worst = replace(worst, abandoned=worst.snapshots[:2], pins=frozenset({worst.snapshots[0].t}))
    return [
        *map(profiles_figure, (*made[:2], *plans)),
        *map(coefficients_figure, (made[2], *plans)),
        *map(timeline_figure, (run, worst)),
        reconstruction_error_figure(range(1, 65), (0.05, 0.1, 0.2)),
        comparison_figure({f"alternative {i} of what may be kept": Snapshots(TS, PAIR[: i % 2 + 1]) for i in range(5)}),
    ]


def test_every_picture_fits_a_column_and_no_text_lies_on_another(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for figure in several(run):
        assert figure.get_figwidth() == 3.5
        assert overlapping(figure, monkeypatch) == [], figure.get_suptitle()
        sizes = [text.get_fontsize() for axes in figure.axes for text in axes.get_xticklabels()]  # type: ignore[attr-defined]
        assert min(sizes) >= 7
        assert all(axes.get_ylabel() for axes in figure.axes)
        assert figure.axes[-1].get_xlabel()


def test_a_figure_becomes_an_image() -> None:
    image = figure_to_image(reconstruction_error_figure(TS, PAIR))
    assert image.size == (700, 480)
    assert image.mode == "RGB"
    assert len(set(image.resize((70, 48)).tobytes())) > 10


def test_the_picture_of_a_run_is_still_an_image(run: Run, tmp_path: Path) -> None:
    assert PostHocEMA.from_path(run.store.url).reconstruction_error().size == (700, 480)
    with PostHocEMA.from_model(nn.Linear(2, 2), tmp_path / "run") as ema:
        assert ema.reconstruction_error((0.1, 0.2)).mode == "RGB"


@pytest.mark.parametrize(
    ("suffix", "head"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("PNG", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_the_suffix_says_which_file_is_written(suffix: str, head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"picture.{suffix}"
    save_figure(reconstruction_error_figure(TS, PAIR), path)
    assert path.read_bytes().startswith(head)
    with pytest.raises(SettingsError, match=r"must end in \.svg, \.png, \.pdf; got .*picture\.safetensors"):
        save_figure(reconstruction_error_figure(TS, PAIR), tmp_path / "picture.safetensors")


def test_a_missing_matplotlib_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (
        lambda: reconstruction_error_figure(TS, PAIR),
        lambda: profiles_figure(planned(2, PAIR, Power(0.1))),
    ):
        with pytest.raises(ImportError, match=r'pip install "phema-dist\[plot\]"'):
            draw()


def test_importing_plot_loads_no_matplotlib() -> None:
    code = "import sys, phema_dist.plot; sys.exit(bool({'matplotlib', 'PIL', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The command


def stored(any_store_url: Place) -> tuple[str, list[str]]:
    """A small run on any storage, and the options of the command that reaches it."""
    import json  # noqa: PLC0415

    url, options = any_store_url
    model = nn.Linear(2, 2)
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=10, storage_options=options) as ema:
        for _ in range(40):
            with torch.no_grad():
                model.weight.add_(1)
            ema.update_(model)
            ema._session.writer.drain()  # type: ignore[union-attr]
    return url, ["--storage-options", json.dumps(options)] if options else []


def test_every_picture_is_drawn_of_a_run_on_any_storage(
    any_store_url: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, options = stored(any_store_url)
    pictures = {"error.svg": [], "timeline.pdf": ["--picture", "timeline"]}
    if not options:  # what is read is the same for all
        pictures |= {
            "early.png": ["--t", "25"],
            "both.svg": ["--sigma-rels", "0.05,0.10", "--snapshots", "30"],
            "profiles.svg": ["--picture", "profiles", "--sigma-rel", "0.15"],
            "coefficients.png": ["--picture", "coefficients", "--sigma-rel", "0.15@25"],
        }
    for name, arguments in pictures.items():
        assert main(["plot", url, *arguments, "--out", str(tmp_path / name), *options]) == 0
        assert (tmp_path / name).stat().st_size > 1000
        assert str(tmp_path / name) in capsys.readouterr().out


def test_a_plan_is_drawn_before_there_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["plot", "--sigma-rels", "0.05,0.28", "--snapshots", "20", "--out"]
    assert main([*plain, str(tmp_path / "plan.png")]) == 0
    with Image.open(tmp_path / "plan.png") as image:
        assert image.size == (700, 480)
    for picture in ("profiles", "coefficients"):
        assert main([*plain, str(tmp_path / "made.svg"), "--picture", picture, "--sigma-rel", "0.1"]) == 0
    assert "of a plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to draw must be said"),
        (["--picture", "timeline", "--snapshots", "3"], "a timeline is that of a RUN"),
        (["RUN", "--picture", "profiles"], "--picture profiles needs --sigma-rel"),
        (["RUN", "--sigma-rel", "0.1"], "--picture error is not of one average"),
        (["RUN", "--picture", "profiles", "--sigma-rel", "0.4"], "must lie in (0, 0.28867]"),
        (["RUN", "--picture", "profiles", "--sigma-rel", "0.1", "--snapshots", "3"], "of a run or of a plan"),
        (["RUN", "--picture", "timeline", "--t", "3"], "leave it out here"),
        (["--snapshots", "3", "--t", "3"], "leave it out here"),
        (["--snapshots", "0"], "must be at least 1; got 0"),
        (["--sigma-rels", "0.05,0.4"], "must lie in (0, 0.28867]"),
        (["--sigma-rels", "0.05;0.28"], "must be numbers like 0.05,0.28"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plot", *arguments, "--out", "picture.svg"])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_that_cannot_be_drawn_is_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "picture.svg"
    for arguments, message in (
        ([str(tmp_path / "none")], "none must hold a run of phema-dist"),
        ([run.store.url, "--t", "1000"], "has complete snapshots up to t=250; got t=1000"),
        ([run.store.url, "--t", "51"], "no complete snapshot at or before t=51"),
        ([run.store.url, "--picture", "profiles", "--sigma-rel", "0.1@1000"], "got t=1000"),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "x.jpg")], "must end in .svg, .png, .pdf"),
    ):
        assert main(["plot", "--out", str(out), *arguments]) == 1 + message.startswith("must end")
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_help_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plot", "--help"])
    example = " ".join(capsys.readouterr().out.split()).rpartition("example: phema ")[2]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(Path(run.store.url).absolute())
    monkeypatch.chdir(tmp_path)
    assert main(example.split()) == 0
    assert (tmp_path / "profiles.svg").exists()


def test_a_unit_with_dollars_is_no_formula(run: Run) -> None:
    made = replace(composed(run, plan(run, [Power(0.1)])[0]), t_unit="$\\foo$")
    figure = profiles_figure(made)
    figure_to_image(figure)
    assert "($\\foo$)" in texts(figure)


def test_what_is_printed_shows_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, model = "memory://user:SECRET@host/plotted", nn.Linear(2, 2)
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=2) as ema:
        for _ in range(4):
            ema.update_(model)
    assert main(["plot", url, "--out", str(tmp_path / "made.svg")]) == 0
    assert "SECRET" not in "".join(capsys.readouterr())
