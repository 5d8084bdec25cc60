"""A run's timeline: what it stored, and how its job fared meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from phema_dist.plot.style import (
    BLUE,
    GREEN,
    GREY,
    LABEL_POINTS,
    ORANGE,
    PURPLE,
    TICK_POINTS,
    TITLE_POINTS,
    from_zero,
    label_seconds,
    label_time,
    legend_above,
    panels,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from phema_dist.storage.manifest import Measured
    from phema_dist.storage.run import Run, Snapshot

_LEAST_HEIGHT, _MOST_HEIGHT, _HEIGHT_PER_ATTEMPT = 0.35, 1.8, 0.13  # inches, of the panel of attempts
_HEIGHT = 0.75  # of the others
_FEW = 40  # snapshots, that do not touch one another
_COUNTS = (
    ("updates_skipped", "updates skipped", ORANGE, "-"),
    ("updates_refused", "updates refused", PURPLE, "--"),
    ("snapshots_skipped", "snapshots skipped", BLUE, "-."),
    ("snapshots_failed", "snapshots failed", GREEN, ":"),
)

Row: TypeAlias = "tuple[Snapshot, list[Measured]]"  # what the ranks measured that did


def timeline_figure(run: Run) -> Figure:
    """Draw a run over t: its snapshots by attempt, and what its ranks measured when they took them.

    That is, of the snapshots that the newest attempt builds on: the lag (updates on their way), the seconds that
    `update_` has waited and what was skipped, each since its attempt began, and the wall time that one unit of t took.
    What was 0 all the time has no panel.
    Lines end where an attempt does. A run that was written before this was measured has the snapshots only.

    Raises:
        ImportError: matplotlib is not installed.
        SnapshotError: the run has no snapshots at all.
    """
    if not (run.snapshots or run.abandoned):
        run.require_newest()
    rows = [(s, found) for s in run.complete if (found := [m.measured for m in s.manifests if m.measured])]
    has_wall = any(before.attempt == after.attempt for (before, _), (after, _) in pairwise(rows))
    drawn = [draw for draw, fields in _PANELS.items() if _any(rows, fields)] + [_draw_wall_time] * has_wall
    figure, (first, *others) = panels([_height(run), *[_HEIGHT] * len(drawn)])
    _draw_snapshots(first, run)
    for draw, axes in zip(drawn, others, strict=True):
        draw(axes, rows)
    label_time([first, *others][-1], f"t ({run.info.t_unit})")
    figure.suptitle(_title(run, rows), fontsize=TITLE_POINTS)
    return figure


def _height(run: Run) -> float:
    wanted = _LEAST_HEIGHT + _HEIGHT_PER_ATTEMPT * (run.next_attempt - 1)
    return min(_MOST_HEIGHT, wanted)


def _title(run: Run, rows: Sequence[Row]) -> str:
    sizes = sorted({attempt.world_size for attempt in run.attempts})
    ranks = f"{sizes[0]} to {sizes[-1]} ranks" if sizes[1:] else _count(sum(sizes), "rank")
    title = f"{_count(len(run.attempts), 'attempt')} of {ranks}"
    if not rows:
        return f"{title}\nlag, stalls and wall time were not recorded"
    missing = len(run.complete) - len(rows)
    return f"{title}\nat {missing} of {len(run.complete)} snapshots nothing was measured" if missing else title


def _draw_snapshots(axes: Axes, run: Run) -> None:
    """One row for each attempt, from the t that it went on from."""
    everything = [*run.snapshots, *run.abandoned]
    for attempt in run.attempts:
        last = max((s.t for s in everything if s.attempt == attempt.number), default=attempt.t)
        axes.plot([attempt.t, last], [attempt.number] * 2, color=GREY, linewidth=0.6, zorder=1)
    size = 3.5 if len(everything) <= _FEW else 2.0
    whole = [s for s in run.snapshots if s.problem is None]
    broken = [s for s in run.snapshots if s.problem is not None]
    pinned = [s for s in everything if s.t in run.pins]
    for snapshots, label, style in (
        (whole, "complete", {"marker": "o", "color": BLUE, "markersize": size}),
        (broken, "incomplete", {"marker": "x", "color": ORANGE, "markersize": size + 1}),
        (run.abandoned, "hidden", {"marker": "o", "color": GREY, "markersize": size, "markerfacecolor": "white"}),
        (pinned, "pinned", {"marker": "s", "color": "black", "markersize": size + 3, "markerfacecolor": "none"}),
    ):
        if snapshots:
            ts, attempts = [s.t for s in snapshots], [s.attempt for s in snapshots]
            axes.plot(ts, attempts, linestyle="", markeredgewidth=0.8, label=f"{label} {len(snapshots)}", **style)  # type: ignore[arg-type]
    whole_numbers(axes)
    axes.set_ylim(-0.7, run.next_attempt - 0.3)
    axes.set_ylabel("attempt", fontsize=LABEL_POINTS)
    legend_above(axes, columns=2)


def _draw_lag(axes: Axes, rows: Sequence[Row]) -> None:
    _draw_over_ranks(axes, rows, attrgetter("lag"))
    whole_numbers(axes)
    from_zero(axes, least=1)
    axes.set_ylabel("lag\n(updates)", fontsize=TICK_POINTS)
    legend_above(axes, columns=2)


def _draw_stalls(axes: Axes, rows: Sequence[Row]) -> None:
    _draw_over_ranks(axes, rows, attrgetter("stall_seconds"))
    label_seconds(axes)
    from_zero(axes)
    axes.set_ylabel("waited in\nupdate_, total", fontsize=TICK_POINTS)


def _draw_skipped(axes: Axes, rows: Sequence[Row]) -> None:
    """The counts of the worst rank, only those that are not always 0."""
    for field, label, colour, line in _COUNTS:
        values = [max(getattr(measured, field) for measured in ranks) for _, ranks in rows]
        if any(values):
            _line(axes, rows, values, color=colour, linestyle=line, label=label)
    whole_numbers(axes)
    from_zero(axes, least=1)
    axes.set_ylabel("count on the\nworst rank", fontsize=TICK_POINTS)
    legend_above(axes, columns=2)


def _draw_wall_time(axes: Axes, rows: Sequence[Row]) -> None:
    """From one snapshot to the next of an attempt, by the median of the ranks' clocks."""
    ts: list[float] = []
    seconds: list[float] = []
    clocks = [float(np.median([measured.unix_time for measured in ranks])) for _, ranks in rows]
    for ((before, _), start), ((after, _), end) in pairwise(zip(rows, clocks, strict=True)):
        if before.attempt == after.attempt:
            pace = (end - start) / (after.t - before.t)
            ts += [before.t, after.t, np.nan]
            seconds += [pace, pace, np.nan]
    axes.plot(ts, seconds, color=BLUE, linewidth=1.2)
    label_seconds(axes)
    from_zero(axes)
    axes.set_ylabel("wall time\nper unit of t", fontsize=TICK_POINTS)


def _draw_over_ranks(axes: Axes, rows: Sequence[Row], value: Callable[[Measured], float]) -> None:
    values = [[value(measured) for measured in ranks] for _, ranks in rows]
    _line(axes, rows, [max(of_ranks) for of_ranks in values], color=ORANGE, linestyle="-", label="highest of the ranks")
    _line(axes, rows, [float(np.median(of_ranks)) for of_ranks in values], color=BLUE, linestyle="--", label="median")


def _line(axes: Axes, rows: Sequence[Row], values: Sequence[float], *, color: str, linestyle: str, label: str) -> None:
    """A line over t for each attempt."""
    ts: list[float] = []
    heights: list[float] = []
    last = None
    for (snapshot, _), height in zip(rows, values, strict=True):
        if last not in {None, snapshot.attempt}:
            ts.append(np.nan)
            heights.append(np.nan)
        ts.append(snapshot.t)
        heights.append(height)
        last = snapshot.attempt
    axes.plot(ts, heights, color=color, linestyle=linestyle, linewidth=1.0, marker=".", markersize=2.5, label=label)


def _any(rows: Sequence[Row], fields: Sequence[str]) -> bool:
    return any(getattr(measured, field) for _, ranks in rows for measured in ranks for field in fields)


_PANELS = {
    _draw_lag: ("lag",),
    _draw_stalls: ("stall_seconds",),
    _draw_skipped: tuple(field for field, *_ in _COUNTS),
}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
