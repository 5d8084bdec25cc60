"""Pictures: what accuracy a set of snapshots gives, drawn with matplotlib.

matplotlib is optional, and imported only when a picture is asked for. Figures are made without pyplot: no window, no
global state, no display needed.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from phema_dist.profile import MAX_SIGMA_REL, sigma_rel_to_gamma
from phema_dist.schedule import reconstruction_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from matplotlib.figure import Figure
    from PIL.Image import Image

_NUM_TARGETS = 240  # smooth at the width of a page
_MIN_PERCENT = 1e-3  # at tracked sigma_rels the error falls to 0, which a logarithmic axis cannot show
_BLUE, _ORANGE = "#0072B2", "#D55E00"  # from Okabe and Ito's palette: distinct for every kind of colour vision


def reconstruction_error_figure(
    ts: Collection[float],
    sigma_rels: Sequence[float],
    target_sigma_rel_range: tuple[float, float] | None = None,
) -> Figure:
    """Draw the relative error of a synthesis at the newest t over the sigma_rel wanted, in percent.

    Args:
        ts: Times of the snapshots, in any order.
        sigma_rels: The tracked sigma_rels; a dashed line marks each.
        target_sigma_rel_range: Lowest and highest sigma_rel drawn; None is from half of the smallest tracked one to
            the uniform average.

    Returns:
        A figure as wide as a column of a paper, bound to no window.

    Raises:
        ImportError: matplotlib is not installed.
        ProfileError: There is no snapshot, or a sigma_rel is not feasible.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise ImportError('pictures need matplotlib; install it with: pip install "phema-dist[plot]"') from error
    low, high = target_sigma_rel_range or (min(sigma_rels) / 2, MAX_SIGMA_REL)
    for end in (low, high):
        sigma_rel_to_gamma(end)  # an infeasible end is named as it was given, before any grid is made of it
    targets = np.linspace(low, high, _NUM_TARGETS)
    percent = 100 * reconstruction_errors(ts, sigma_rels, targets)

    figure = Figure(figsize=(3.5, 2.4), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(targets, np.maximum(percent, _MIN_PERCENT), color=_BLUE, linewidth=1.2)
    for i, sigma_rel in enumerate(sigma_rels):
        label = "tracked" if i == 0 else None
        axes.axvline(sigma_rel, color=_ORANGE, linewidth=0.9, linestyle="--", label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=_MIN_PERCENT)
    axes.set_xlabel(r"$\sigma_\mathrm{rel}$ wanted (standard deviation / $t$)", fontsize=8)
    axes.set_ylabel("relative error of the profile (%)", fontsize=8)
    axes.set_title(f"{len(ts)} snapshots, synthesized at t = {max(ts)}", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, linewidth=0.3, alpha=0.6)
    axes.legend(fontsize=7, frameon=False)
    return figure


def figure_to_image(figure: Figure) -> Image:
    """Render a figure to an RGB image, at the figure's own resolution."""
    from PIL import Image  # noqa: PLC0415 (matplotlib brings it)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return Image.open(buffer).convert("RGB")
