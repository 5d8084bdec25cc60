"""What an average is made of: its averaging profile beside the one that was asked for, and its coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from phema_dist.legacy import OneStepProfile
from phema_dist.plot.style import (
    BLUE,
    GREY,
    LABEL_POINTS,
    LEGEND_POINTS,
    LINES,
    ORANGE,
    SIGMA_REL,
    TITLE_POINTS,
    label_time,
    legend_above,
    panels,
)
from phema_dist.prediction import in_percent
from phema_dist.profile import Array, PowerProfile, Profile, Stored, fit
from phema_dist.target import Explicit, Power, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from phema_dist.storage.run import Run
    from phema_dist.synthesis.recipe import Recipe
    from phema_dist.target import Target

_NUM_BINS = 1200  # finer than a printed column shows
_SHORT = 0.02  # of training: an average that is shorter is drawn with the end only
_SHOWN_LENGTHS = 15  # ... of so many times its own length
_PLANNED_T, _PLANNED_UNIT = 100.0, "% of training"


@dataclass(frozen=True)
class Composition:
    """An average as a sum of stored ones, for pictures: of a recipe (`composed`), or of a plan (`planned`).

    All times count from the run's origin. `times` are those of the updates that were made, None if they were not yet.
    """

    name: str  # what was asked for
    certificate: str  # how good it is, in words
    stored: tuple[PowerProfile | OneStepProfile, ...]  # all there is, that with coefficient 0 too
    coefficients: Array  # [len(stored)]
    target: Profile | None  # None: a given sum, which aims at nothing
    t: float
    times: Array | None
    origin: int
    t_unit: str

    @property
    def sigma_rels(self) -> tuple[float, ...]:
        """The tracked ones."""
        return tuple(dict.fromkeys(p.sigma_rel for p in self.stored))

    @property
    def title(self) -> str:
        """Two lines."""
        return f"{self.name}\n{self.certificate}"


def composed(run: Run, recipe: Recipe) -> Composition:
    """What a recipe of `synthesis.recipe.plan` is made of."""
    origin, certificate = run.info.origin, recipe.certificate
    factors = {(term.sigma_rel, term.snapshot.t): term.coefficient for term in recipe.terms}
    keys = [(sigma_rel, s.t) for sigma_rel in run.info.sigma_rels for s in run.complete if s.t <= recipe.t]
    of = OneStepProfile if run.info.imported else PowerProfile
    error = "" if isinstance(recipe.target, Explicit) else f"profile error {in_percent(certificate.profile_error)}, "
    noise = f"rounding {in_percent(certificate.rounding_noise)}"
    return Composition(
        name=f"{_words(recipe.target)} at t = {recipe.t}, from snapshots: {certificate.num_snapshots}",
        certificate=f"{error}{noise}, norm {certificate.coefficient_norm:.3g}",
        stored=tuple(of(sigma_rel, t - origin) for sigma_rel, t in keys),
        coefficients=np.array([factors.get(key, 0.0) for key in keys]),
        target=None if isinstance(recipe.target, Explicit) else resolve(recipe.target, recipe.t - origin),
        t=recipe.t - origin,
        times=run.update_times,
        origin=origin,
        t_unit=run.info.t_unit,
    )


def planned(snapshots: int, sigma_rels: Sequence[float], target: Power) -> Composition:
    """What an average at the end would be made of, if so many snapshots were spread evenly.

    Raises:
        ProfileError: a sigma_rel is not feasible, or there is no snapshot.
    """
    ts = [_PLANNED_T * (i + 1) / snapshots for i in range(snapshots)]
    aim = PowerProfile(target.sigma_rel, _PLANNED_T)
    stored = tuple(PowerProfile(sigma_rel, t) for sigma_rel in sigma_rels for t in ts)
    x, errors = fit(stored, [aim])
    return Composition(
        name=f"{_words(target)} at the end, from snapshots: {snapshots}",
        certificate=f"profile error {in_percent(float(errors[0]))}, norm {np.linalg.norm(x):.3g}",
        stored=stored,
        coefficients=x[:, 0],
        target=aim,
        t=_PLANNED_T,
        times=None,
        origin=0,
        t_unit=_PLANNED_UNIT,
    )


def profiles_figure(made: Composition) -> Figure:
    """Draw the averaging profiles over t: those tracked, the one asked for and the one synthesized.

    Below is the difference of the last two. A density is in percent of the weight for each percent of t. Once
    updates were made it is constant from one to the next, as parameters stand for the time since the update before;
    where updates are denser than the picture, it is their mean.

    Raises:
        ImportError: matplotlib is not installed.
    """
    edges = _edges(made)
    shown = edges + made.origin if edges[0] == 0 else edges - made.t  # of a short average, time before its end
    figure, (above, below) = panels([1.5, 0.7])
    synthesized = np.zeros(len(edges) - 1)
    for p, x in zip(made.stored, made.coefficients.tolist(), strict=True):
        if x:
            synthesized += x * _density(made, p, edges)
    if made.target:
        asked = _density(made, made.target, edges)
        _step(above, asked, shown, color=ORANGE, linewidth=0.8, label="asked", zorder=4)
        _step(below, synthesized - asked, shown, color=BLUE, linewidth=0.8)
    _step(above, synthesized, shown, color=BLUE, linewidth=1.6, label="synthesized", zorder=3)
    for i, sigma_rel in enumerate(made.sigma_rels):
        newest = max((p for p in made.stored if p.sigma_rel == sigma_rel), key=lambda p: p.t)
        line = LINES[1 + i % (len(LINES) - 1)]
        density = _density(made, newest, edges)
        _step(above, density, shown, color=GREY, linewidth=0.8, linestyle=line, label=f"tracked {sigma_rel:g}")
    below.axhline(0, color="black", linewidth=0.5)
    above.set_ylabel("weight (% per % of t)", fontsize=LABEL_POINTS)
    below.set_ylabel("synthesized\nminus asked", fontsize=LABEL_POINTS)
    below.set_xlim(shown[0], shown[-1])
    label_time(below, f"{'t' if edges[0] == 0 else 't minus end'} ({made.t_unit})")
    legend_above(above, columns=3)
    figure.suptitle(made.title, fontsize=TITLE_POINTS)
    return figure


def coefficients_figure(made: Composition) -> Figure:
    """Draw which snapshots carry which coefficients, over t, signed: one panel for each tracked sigma_rel.

    Snapshots with none are dots on the line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, found = panels([0.8] * len(made.sigma_rels))
    at = np.array([p.t for p in made.stored]) + made.origin
    of = np.array([p.sigma_rel for p in made.stored])
    for axes, sigma_rel in zip(found, made.sigma_rels, strict=True):
        ts, x = at[of == sigma_rel], made.coefficients[of == sigma_rel]
        axes.axhline(0, color="black", linewidth=0.5)
        axes.vlines(ts, 0, x, color=BLUE, linewidth=0.9)
        axes.plot(ts[x != 0], x[x != 0], "o", color=BLUE, markersize=2.5)
        axes.plot(ts[x == 0], x[x == 0], ".", color=GREY, markersize=2)
        axes.set_title(f"tracked {SIGMA_REL} = {sigma_rel:g}", loc="left", fontsize=LEGEND_POINTS, pad=2)
        axes.set_ylabel("coefficient", fontsize=LABEL_POINTS)
        axes.margins(y=0.15)
    found[-1].set_xlim(left=made.origin)
    label_time(found[-1], f"t ({made.t_unit})")
    figure.suptitle(made.title, fontsize=TITLE_POINTS)
    return figure


def _words(target: Target) -> str:
    return f"{SIGMA_REL} = {target.sigma_rel:g}" if isinstance(target, Power) else str(target)


def _edges(made: Composition) -> Array:
    """Ends of what is drawn as constant: the updates themselves, or some of them, or a grid where none were made."""
    length = 1 / made.target.squared_norm if made.target else made.t
    start = 0.0 if length > _SHORT * made.t else made.t - _SHOWN_LENGTHS * length
    grid = np.linspace(start, made.t, _NUM_BINS + 1)
    if made.times is None:
        return grid
    edges = np.concatenate([[0.0], made.times[made.times < made.t], [made.t]])
    return np.unique(edges[np.searchsorted(edges, grid)])


def _density(made: Composition, p: Stored, edges: Array) -> Array:
    """The mean of a profile in each interval, by that of a uniform average over all of training."""
    times = edges[edges > 0] if made.times is None else made.times
    before = np.searchsorted(times, edges, side="right")
    before[-1] = 1 + np.searchsorted(times, made.t)  # the end may cut the interval of an update
    masses = np.diff(np.concatenate([[0.0], np.cumsum(p.masses(times))])[before])
    density: Array = masses / np.diff(edges) * made.t
    return density


def _step(axes: Axes, density: Array, edges: Array, **style: Any) -> None:
    """A step function without verticals at its ends."""
    axes.stairs(density, edges, baseline=None, **style)
