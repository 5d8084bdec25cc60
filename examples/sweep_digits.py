"""Choose the averaging length after training: compare many sigma_rels of one run of train_digits.py.

python examples/sweep_digits.py --checkpoint-dir DIR --raw raw.safetensors --out .
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from digits import Judge
from matplotlib import pyplot as plt
from safetensors.torch import load_file

from phema_dist import sweep, synthesize_files

SIGMA_RELS = (0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.11, 0.13, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28)
LOSS, DISTANCE = "denoising loss", "Fréchet distance"  # as the judge names them
BLUE, ORANGE = "#0072B2", "#D55E00"  # two that everyone can tell apart (Okabe and Ito)


def plot(rows: list[tuple[float, float, float]], raw: tuple[float, float], path: Path) -> None:
    """Draw both metrics over sigma_rel, where the raw parameters are the average of length zero."""
    mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.supxlabel("sigma_rel: length of the average, chosen after training", fontsize=11)
    sigma_rels, *metrics = zip(*rows, strict=True)
    titles = ("Denoising loss on held-out digits", "Fréchet distance, samples to held-out digits")
    for panel, title, values, raw_value in zip(panels, titles, metrics, raw, strict=True):
        lowest = min(values)
        best = sigma_rels[values.index(lowest)]
        highest = max(raw_value, *values)
        gap = 0.05 * (highest - lowest)
        panel.axhline(raw_value, color=ORANGE, linestyle="--", linewidth=1)
        panel.plot([0, sigma_rels[0]], [raw_value, values[0]], ":", color=BLUE)
        panel.plot(sigma_rels, values, "o-", color=BLUE, markersize=5)
        panel.plot(0, raw_value, "D", color=ORANGE, markersize=7)
        panel.plot(best, lowest, "*", color=BLUE, markersize=18)
        panel.text(0.15, raw_value + gap / 2, "raw parameters, no EMA", color=ORANGE, ha="center")
        panel.text(best, lowest - 1.5 * gap, f"best: {best:g}", color=BLUE, ha="center", va="top", weight="bold")
        panel.set(title=title, xticks=[0, 0.05, 0.1, 0.15, 0.2, 0.25])
        panel.set_ylim(lowest - 5 * gap, highest + 4 * gap)
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint-dir", required=True, help="folder or URL that train_digits.py wrote to")
    parser.add_argument("--raw", default="raw.safetensors", help="the last parameters, from train_digits.py")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the table, picture and checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    judge = Judge(device)
    raw = judge(load_file(args.raw))
    # All of them in one pass over the run, then a few more around the best: the first metric decides.
    found = sweep(args.checkpoint_dir, SIGMA_RELS, judge)

    lines = ["| sigma_rel | denoising loss | Fréchet distance | profile error |", "|---|---|---|---|"]
    lines += [f"| raw | {raw[LOSS]:.4f} | {raw[DISTANCE]:.3f} | |"]
    for point in found.points:
        loss, distance = point.metrics[LOSS], point.metrics[DISTANCE]
        lines += [f"| {point.sigma_rel:g} | {loss:.4f} | {distance:.3f} | {point.profile_error:.4f} |"]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

    rows = [(point.sigma_rel, point.metrics[LOSS], point.metrics[DISTANCE]) for point in found.points]
    plot(rows, (raw[LOSS], raw[DISTANCE]), args.out / "sweep.png")
    best = found.best
    synthesize_files(args.checkpoint_dir, {best.sigma_rel: args.out / "best.safetensors"}, overwrite=True)
    print(f"best by Fréchet distance: sigma_rel = {best.sigma_rel:g}, {best.value:.3f} against {raw[DISTANCE]:.3f} raw")


if __name__ == "__main__":
    main()
