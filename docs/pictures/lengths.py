"""Draw lengths.svg: the same two averages early and late in training. `python docs/pictures/lengths.py`."""

# ruff: noqa: INP001  not a package
from pathlib import Path

import numpy as np

from phema_dist import sigma_rel_to_beta, sigma_rel_to_gamma
from phema_dist.plot.style import BLUE, LABEL_POINTS, ORANGE, label_time, legend_above, panels, save_figure

STEPS, SIGMA_REL = 100_000, 0.15

gamma, beta = sigma_rel_to_gamma(SIGMA_REL), sigma_rel_to_beta(SIGMA_REL, STEPS)
figure, rows = panels([0.8, 0.8])
for axes, t in zip(rows, (STEPS // 10, STEPS), strict=True):
    tau = np.linspace(0, t, 400)
    power = (gamma + 1) * (tau / t) ** gamma / t
    constant = -np.log(beta) * beta ** (t - tau)  # begins with the first parameters: beta ** t is left at 0
    axes.fill_between(tau, power, color=BLUE, alpha=0.25, label=f"power profile, sigma_rel = {SIGMA_REL}")
    axes.plot(tau, constant, color=ORANGE, linewidth=1, label=f"constant beta = {beta:.5f}")
    axes.set_yticks([])
    axes.set_ylabel(f"seen from\n{t:,}", fontsize=LABEL_POINTS)
    if (left := beta**t) > 0.01:  # noqa: PLR2004  what can be seen
        axes.vlines(0, 0, power.max() / 2, color=ORANGE, linewidth=2)
        axes.text(0.17, 0.75, f"{100 * left:.0f}% is still the first parameters", fontsize=7, transform=axes.transAxes)
label_time(rows[-1], "step")
legend_above(rows[0], 2)
save_figure(figure, Path(__file__).with_suffix(".svg"))
