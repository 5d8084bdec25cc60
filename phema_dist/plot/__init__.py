"""Pictures, drawn with matplotlib: functions that return figures, bound to no window.

    reconstruction_error_figure   how exactly each sigma_rel can be made of some snapshots
    comparison_figure             the same for several sets of snapshots, such as a plan and a run
    profiles_figure               the averaging profiles: tracked, asked and synthesized
    coefficients_figure           which snapshots carry which coefficients
    timeline_figure               what a run stored, and how its job fared
    sweep_figure                  what a sweep measured
    save_figure                   to a file, by its suffix; figure_to_image, figure_to_svg without one

matplotlib is optional, and imported only when a picture is asked for.
"""

from __future__ import annotations

from phema_dist.plot.averages import Composition, coefficients_figure, composed, planned, profiles_figure
from phema_dist.plot.error import Snapshots, comparison_figure, reconstruction_error_figure, snapshots_of
from phema_dist.plot.style import figure_to_image, figure_to_svg, save_figure
from phema_dist.plot.sweep import sweep_figure
from phema_dist.plot.timeline import timeline_figure

__all__ = [
    "Composition",
    "Snapshots",
    "coefficients_figure",
    "comparison_figure",
    "composed",
    "figure_to_image",
    "figure_to_svg",
    "planned",
    "profiles_figure",
    "reconstruction_error_figure",
    "save_figure",
    "snapshots_of",
    "sweep_figure",
    "timeline_figure",
]
