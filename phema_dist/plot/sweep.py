"""What a sweep measured, over the length of the average."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phema_dist.plot.style import (
    BLUE,
    LABEL_POINTS,
    LEGEND_POINTS,
    ORANGE,
    SIGMA_REL,
    TICK_POINTS,
    new_figure,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure


def sweep_figure(rows: Sequence[tuple[float, Mapping[str, float | None]]], *, maximize: bool = False) -> Figure:
    """Draw what a sweep measured over sigma_rel, a panel for each metric, and mark the best point of each.

    Args:
        rows: sigma_rel and its metrics by name, in any order; those that are None are left out.
        maximize: whether high is good; for the first metric only, of the others low is.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics)) or [""]
    figure = new_figure(2.4, columns=len(names))
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        points = sorted((s, y) for s, metrics in rows if (y := metrics.get(name)) is not None)
        if points:
            best = (max if maximize and not i else min)(points, key=lambda point: point[1])
            axes.plot(*zip(*points, strict=True), "o-", color=BLUE, linewidth=1.2, markersize=3)
            axes.plot(*best, "*", color=ORANGE, markersize=10, label=f"best: {SIGMA_REL} = {best[0]:g}")
            axes.legend(fontsize=LEGEND_POINTS, frameon=False)
        axes.set_xlabel(f"{SIGMA_REL} (standard deviation / $t$)", fontsize=LABEL_POINTS)
        axes.set_ylabel(name, fontsize=LABEL_POINTS, parse_math=False)
        axes.tick_params(labelsize=TICK_POINTS)
        axes.grid(visible=True, linewidth=0.3, alpha=0.6)
    return figure
