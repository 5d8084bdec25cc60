"""The command that draws: `phema plot`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from phema_dist.cli.arguments import add_run, number_at, opened, telling
from phema_dist.target import Power

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from phema_dist.cli.arguments import Commands
    from phema_dist.plot import Composition, Snapshots
    from phema_dist.storage.run import Run

_SIGMA_RELS, _NUM_SNAPSHOTS = (0.05, 0.28), 20  # of PostHocEMA.from_model
_OF_ONE_AVERAGE = ("profiles", "coefficients")


def add(commands: Commands) -> None:
    """Add this command."""
    drawing = commands.add_parser(
        "plot",
        description="Draw a picture of a run. error: how exactly each sigma_rel can be made of its snapshots. "
        "profiles: the averaging profiles that are tracked, asked for and synthesized. coefficients: which snapshots "
        "an average is made of. timeline: the snapshots of all attempts, lag, stalls, what was skipped, wall time. "
        "Without RUN, of a plan: of evenly spread snapshots; with both, error compares them.",
        epilog="example: phema plot runs/digits --picture profiles --sigma-rel 0.15 --out profiles.svg",
    )  # fmt: skip
    add_run(drawing, required=False)
    drawing.add_argument(
        "--picture", choices=["error", *_OF_ONE_AVERAGE, "timeline"], default="error", help="default: error"
    )
    drawing.add_argument(
        "--sigma-rel", type=number_at(Power), metavar="S[@T]", dest="target",
        help="the average of profiles and coefficients; @T ends it at T instead of --t",
    )  # fmt: skip
    drawing.add_argument("--t", type=int, help="end of the average (default: the newest complete snapshot)")
    drawing.add_argument(
        "--sigma-rels", type=_sigma_rels, metavar="S,S,…",
        help=f"that a plan tracks (default: {','.join(map(str, _SIGMA_RELS))})",
    )  # fmt: skip
    drawing.add_argument("--snapshots", type=_at_least_one, metavar="N", help=f"of a plan (default: {_NUM_SNAPSHOTS})")
    drawing.add_argument(
        "--out", required=True, metavar="FILE", help="ends in .svg, .png or .pdf; one that exists is replaced"
    )
    drawing.set_defaults(command=_plot, usage_error=drawing.error)


def _sigma_rels(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
        for sigma_rel in found:
            Power(sigma_rel)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers like 0.05,0.28: {error}") from error
    return found


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def _plot(arguments: argparse.Namespace) -> None:
    _check(arguments)

    from phema_dist import plot  # noqa: PLC0415  --help need not wait for numpy
    from phema_dist.plot.style import check_suffix  # noqa: PLC0415
    from phema_dist.storage.remote import without_credentials  # noqa: PLC0415

    check_suffix(arguments.out)  # before anything is read
    with telling(f"drawing {arguments.out}"):
        figure = _of_plan(arguments) if arguments.run is None else _of_run(arguments)
        plot.save_figure(figure, arguments.out)
    print(f"{arguments.out}: {arguments.picture} of {without_credentials(arguments.run or 'a plan')}")


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what has no meaning together."""
    picture, of_plan = arguments.picture, arguments.sigma_rels or arguments.snapshots
    if (arguments.target is None) == (picture in _OF_ONE_AVERAGE):
        arguments.usage_error(
            f"--picture {picture} needs --sigma-rel, the average that is drawn"
            if arguments.target is None
            else f"--picture {picture} is not of one average; leave out --sigma-rel, or add --picture profiles"
        )
    if arguments.run is None and (picture == "timeline" or not of_plan):
        arguments.usage_error(
            "a timeline is that of a RUN" if of_plan else "what to draw must be said: a RUN, or --sigma-rels of a plan"
        )
    if arguments.run is not None and of_plan and picture != "error":
        arguments.usage_error(f"--picture {picture} is of a run or of a plan: leave out RUN, or --sigma-rels")
    has_end = arguments.t is not None or (arguments.target is not None and arguments.target.t is not None)
    if has_end and (arguments.run is None or picture == "timeline" or (picture == "error" and of_plan)):
        arguments.usage_error("a t is the end of a run's average; leave it out here")


def _planned(arguments: argparse.Namespace) -> tuple[int, tuple[float, ...]]:
    return arguments.snapshots or _NUM_SNAPSHOTS, arguments.sigma_rels or _SIGMA_RELS


def _of_plan(arguments: argparse.Namespace) -> Figure:
    from phema_dist import plot  # noqa: PLC0415

    count, sigma_rels = _planned(arguments)
    if arguments.picture == "error":
        title = f"{count} snapshots, evenly spread, at the end"
        return plot.reconstruction_error_figure(range(1, count + 1), sigma_rels, title=title)
    return _of_average(arguments, plot.planned(count, sigma_rels, arguments.target))


def _of_run(arguments: argparse.Namespace) -> Figure:
    from phema_dist import plot  # noqa: PLC0415
    from phema_dist.storage.run import open_run  # noqa: PLC0415
    from phema_dist.synthesis.recipe import plan  # noqa: PLC0415

    run = open_run(opened(arguments))
    if arguments.picture == "timeline":
        return plot.timeline_figure(run)
    if arguments.picture == "error":
        return _error_of(run, arguments)
    (recipe,) = plan(run, [arguments.target], arguments.t)
    return _of_average(arguments, plot.composed(run, recipe))


def _error_of(run: Run, arguments: argparse.Namespace) -> Figure:
    from phema_dist import plot  # noqa: PLC0415

    found = plot.snapshots_of(run, arguments.t)
    t = found.t + run.info.origin
    if arguments.sigma_rels or arguments.snapshots:
        count, sigma_rels = _planned(arguments)
        planned = plot.Snapshots(range(1, count + 1), sigma_rels)
        return plot.comparison_figure(
            {
                f"run: {_said(found)}, at t = {t}": found,
                f"plan: {_said(planned)}, evenly spread": planned,
            }
        )
    return plot.reconstruction_error_figure(found, title=f"{len(found.ts)} snapshots, synthesized at t = {t}")


def _said(found: Snapshots) -> str:
    return f"{len(found.ts)} x ({', '.join(f'{s:g}' for s in found.sigma_rels)})"


def _of_average(arguments: argparse.Namespace, made: Composition) -> Figure:
    from phema_dist import plot  # noqa: PLC0415

    return plot.profiles_figure(made) if arguments.picture == "profiles" else plot.coefficients_figure(made)
