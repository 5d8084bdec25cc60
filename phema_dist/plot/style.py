"""How all pictures look: as wide as a column of a paper, in colours that everybody can tell apart.

Figures are made without pyplot: no window, no global state, no display needed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phema_dist.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Okabe and Ito's palette: distinct for every kind of colour vision, and at different greys in print.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#767676"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
LINES = ("-", "--", "-.", ":")  # so that they are told apart without colours, too
SIGMA_REL = r"$\sigma_\mathrm{rel}$"
TITLE_POINTS, LABEL_POINTS, TICK_POINTS, LEGEND_POINTS = 8, 8, 7, 6.5
SUFFIXES = (".svg", ".png", ".pdf")
_WIDTH, _MARGIN, _DPI = 3.5, 0.9, 200  # inches: a column of a paper; what title and labels take


def new_figure(height: float, columns: int = 1) -> Figure:
    """An empty figure as wide as so many columns of a paper; height in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise ImportError('pictures need matplotlib; install it with: pip install "phema-dist[plot]"') from error
    return Figure(figsize=(columns * _WIDTH, height), dpi=_DPI, layout="constrained")


def panels(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels one above another, with one horizontal axis; heights in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(_MARGIN + sum(heights))
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    found: list[Axes] = list(grid[:, 0])
    for axes in found:
        axes.tick_params(labelsize=TICK_POINTS)
        axes.yaxis.offsetText.set_fontsize(TICK_POINTS)
        axes.grid(visible=True, linewidth=0.3, alpha=0.6)
    figure.align_ylabels(found)
    return figure, found


def label_time(axes: Axes, unit: str) -> None:
    """Label the horizontal axis as training time, few ticks, thousands as k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator  # noqa: PLC0415

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(unit, fontsize=LABEL_POINTS, parse_math=False)


def whole_numbers(axes: Axes) -> None:
    """Mark whole numbers only, of what is counted."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))


def from_zero(axes: Axes, least: float = 0.0) -> None:
    """Let the vertical axis begin at 0, with room for marks there, and reach `least`."""
    high = max(axes.get_ylim()[1], least)
    axes.set_ylim(-0.06 * high, 1.12 * high)


def label_seconds(axes: Axes) -> None:
    """Mark seconds with their unit: ms, s, ks."""
    from matplotlib.ticker import EngFormatter, MaxNLocator  # noqa: PLC0415

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(EngFormatter(unit="s"))


def legend_above(axes: Axes, columns: int) -> None:
    """Put the legend between a panel and the one above, where it hides nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=LEGEND_POINTS, frameon=False,
        borderaxespad=0.2, borderpad=0.1, columnspacing=1.0, handletextpad=0.4, handlelength=1.6,
    )  # fmt: skip


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as SVG, PNG or PDF, by the suffix, in place of what was there.

    Raises:
        SettingsError: another suffix.
    """
    check_suffix(path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix.lower() == ".svg":
        Path(path).write_bytes(figure_to_svg(figure))
    else:
        figure.savefig(path, dpi="figure")


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise SettingsError unless a picture can have this name."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise SettingsError(f"a picture's name must end in {', '.join(SUFFIXES)}; got {os.fspath(path)}.")


def figure_to_image(figure: Figure) -> Image:
    """Render a figure to an RGB image, at the figure's own resolution."""
    from PIL import Image  # noqa: PLC0415 (matplotlib brings it)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure")
    return Image.open(buffer).convert("RGB")


def figure_to_svg(figure: Figure) -> bytes:
    """Write a figure as SVG: the same bytes for the same figure, without the date and random names."""
    import matplotlib as mpl  # noqa: PLC0415 (optional)

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "phema_dist"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
