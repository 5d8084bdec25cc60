"""The error of a synthesis over the length that is wanted: of snapshots that are there, or of a plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phema_dist.errors import SettingsError, SnapshotError
from phema_dist.legacy import OneStepProfile
from phema_dist.plot.style import (
    BLUE,
    COLOURS,
    LABEL_POINTS,
    LEGEND_POINTS,
    LINES,
    ORANGE,
    SIGMA_REL,
    TITLE_POINTS,
    legend_above,
    panels,
)
from phema_dist.profile import MAX_SIGMA_REL, Array, PowerProfile, fit, sigma_rel_to_gamma

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from phema_dist.storage.run import Run

_NUM_TARGETS = 240  # smooth at the width of a page
_MIN_PERCENT = 1e-3  # at tracked sigma_rels the error falls to 0, which a logarithmic axis cannot show
_ROW = 0.045  # of the height of the panel, for the marks of one set


@dataclass(frozen=True)
class Snapshots:
    """What averages are made of: snapshots at `ts`, in any order, each of an average for every tracked sigma_rel.

    They make averages that end at `end`, at or after the newest of them; None: there. All count from the run's origin.
    Those of a run that was `imported` are what `legacy` knows of them, and `times` are those of its updates.
    """

    ts: Collection[float]
    sigma_rels: Sequence[float]
    end: float | None = None
    times: Array | None = None

    @property
    def t(self) -> float:
        """Where averages end."""
        return max(self.ts, default=1.0) if self.end is None else self.end

    def errors(self, targets: Array) -> Array:
        """The relative profile errors [m] of the sigma_rels wanted [m].

        Raises:
            ProfileError: there is no snapshot, or a sigma_rel is not feasible.
        """
        of = PowerProfile if self.times is None else OneStepProfile
        stored = [of(sigma_rel, at) for at in sorted(self.ts) for sigma_rel in self.sigma_rels]
        return fit(stored, [PowerProfile(float(target), self.t) for target in targets], self.times)[1]


def snapshots_of(run: Run, t: int | None = None) -> Snapshots:
    """The complete snapshots of a run, to make averages that end at t; None: the newest one's.

    Raises:
        SnapshotError: there is none at or before t, or none as late.
    """
    newest, origin = run.require_newest(t), run.info.origin
    if t is not None and t > run.complete[-1].t:
        raise SnapshotError(f"{run.store.url} has complete snapshots up to t={run.complete[-1].t}; got t={t}.")
    end = newest.t if t is None else t
    times = run.update_times if run.info.imported else None
    return Snapshots([s.t - origin for s in run.complete if s.t <= end], run.info.sigma_rels, end - origin, times)


def reconstruction_error_figure(
    ts: Collection[float] | Snapshots,
    sigma_rels: Sequence[float] = (),
    target_sigma_rel_range: tuple[float, float] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Draw the relative error of a synthesis over the sigma_rel wanted, in percent.

    It is the least that the averaging profiles allow; what the rounding of stored averages adds is no part of it.

    Args:
        ts: Times of the snapshots, in any order, counted from the run's origin; or `Snapshots`.
        sigma_rels: The tracked sigma_rels; a dashed line marks each.
        target_sigma_rel_range: Lowest and highest sigma_rel drawn; None is from half of the smallest tracked one to
            the uniform average.
        title: Instead of the number of snapshots and t.

    Returns:
        A figure as wide as a column of a paper, bound to no window.

    Raises:
        ImportError: matplotlib is not installed.
        ProfileError: There is no snapshot, or a sigma_rel is not feasible.
    """
    found = ts if isinstance(ts, Snapshots) else Snapshots(ts, sigma_rels)
    low, high = _range([found.sigma_rels], target_sigma_rel_range)
    targets = _targets(low, high, found.sigma_rels)
    percent = _percent(found, targets)
    figure, (axes,) = panels([1.5])
    axes.plot(targets, percent, color=BLUE, linewidth=1.2)
    for i, sigma_rel in enumerate(found.sigma_rels):
        label = "tracked" if i == 0 else None
        axes.axvline(sigma_rel, color=ORANGE, linewidth=0.9, linestyle="--", label=label)
    _finish(axes, low, high)
    axes.set_title(title or f"{len(found.ts)} snapshots, synthesized at t = {found.t}", fontsize=TITLE_POINTS)
    axes.legend(fontsize=LEGEND_POINTS, frameon=False)
    return figure


def comparison_figure(
    sets: Mapping[str, Snapshots], target_sigma_rel_range: tuple[float, float] | None = None
) -> Figure:
    """Draw what `reconstruction_error_figure` draws for several sets of snapshots, such as a plan and a run.

    Args:
        sets: By label; triangles mark the tracked sigma_rels of each.
        target_sigma_rel_range: As in `reconstruction_error_figure`; None is from half of the smallest one tracked.

    Raises:
        ImportError: matplotlib is not installed.
        SettingsError: There is nothing to compare.
        ProfileError: A set has no snapshot, or a sigma_rel is not feasible.
    """
    if not sets:
        raise SettingsError("a comparison must have at least one set of snapshots; got none.")
    low, high = _range([found.sigma_rels for found in sets.values()], target_sigma_rel_range)
    figure, (axes,) = panels([1.5 + 0.15 * len(sets)])
    for i, (label, found) in enumerate(sets.items()):
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        targets = _targets(low, high, found.sigma_rels)
        axes.plot(targets, _percent(found, targets), color=colour, linestyle=line, linewidth=1.2, label=label)
        shown = [sigma_rel for sigma_rel in found.sigma_rels if low <= sigma_rel <= high]
        heights = [_ROW * (i + 0.5)] * len(shown)
        axes.plot(shown, heights, "^", color=colour, markersize=3, transform=axes.get_xaxis_transform(), clip_on=False)
    _finish(axes, low, high)
    legend_above(axes, columns=1)
    return figure


def _range(sigma_rels: Sequence[Sequence[float]], wanted: tuple[float, float] | None) -> tuple[float, float]:
    low, high = wanted or (min(min(tracked) for tracked in sigma_rels) / 2, MAX_SIGMA_REL)
    for end in (low, high):
        sigma_rel_to_gamma(end)  # an infeasible end is named as it was given, before any grid is made of it
    return low, high


def _targets(low: float, high: float, tracked: Sequence[float]) -> Array:
    """A fine grid, with the tracked ones, where the curve has its cusps."""
    inside = [sigma_rel for sigma_rel in tracked if low <= sigma_rel <= high]
    return np.union1d(np.linspace(low, high, _NUM_TARGETS), inside)


def _percent(found: Snapshots, targets: Array) -> Array:
    percent: Array = np.maximum(100 * found.errors(targets), _MIN_PERCENT)
    return percent


def _finish(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=_MIN_PERCENT)
    axes.set_xlabel(f"{SIGMA_REL} wanted (standard deviation / $t$)", fontsize=LABEL_POINTS)
    axes.set_ylabel("relative error of the profile (%)", fontsize=LABEL_POINTS)
