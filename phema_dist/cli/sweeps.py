"""The command that chooses a length after training: `phema sweep`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phema_dist.cli.arguments import add_run, progress_bar, size
from phema_dist.cli.averages import DTYPES
from phema_dist.errors import ProfileError
from phema_dist.selection.grid import parse_grid

if TYPE_CHECKING:
    from phema_dist.cli.arguments import Commands
    from phema_dist.selection.results import Point

_LONGEST = 0.288  # to three digits; nothing is longer than the plain mean


def add(commands: Commands) -> None:
    """Add this command."""
    sweeping = commands.add_parser(
        "sweep",
        description="Make averages of many lengths, measure each with a command, and keep the best. The command is "
        "started without a shell; {checkpoint} and {sigma_rel} in it are replaced, and the last number that it prints "
        "is the metric, low being good. After the grid, single points close in on the best one. The same command after "
        "a kill goes on where it was. DIR gets sweep.json, sweep.md, sweep.svg and best.safetensors. A command that "
        "fails is told, and makes the exit code 1.",
        epilog='example: phema sweep runs/digits --sigma-rel 0.05:0.28:12 --eval "python eval.py {checkpoint}" '
        "--out sweep/",
    )  # fmt: skip
    add_run(sweeping)
    sweeping.add_argument(
        "--sigma-rel", type=_grid, required=True, metavar="LOW:HIGH:N|S,S,…", dest="grid",
        help="lengths to try: N that grow by a constant factor, or a list",
    )  # fmt: skip
    sweeping.add_argument(
        "--eval", required=True, metavar="COMMAND", dest="evaluate", help="what measures a checkpoint"
    )
    sweeping.add_argument("--out", required=True, metavar="DIR", help="local, for checkpoints and results")
    sweeping.add_argument("--t", type=int, help="end of the averages (default: the newest complete snapshot)")
    sweeping.add_argument("--maximize", action="store_true", help="a high metric is good")
    sweeping.add_argument(
        "--refine", type=int, default=4, metavar="N", help="points to try around the best, at most (default: 4)"
    )
    room = sweeping.add_mutually_exclusive_group()
    room.add_argument(
        "--disk", type=size, metavar="SIZE",
        help="that checkpoints may take in DIR, as many being made in one pass as fit (default: half of what is free)",
    )  # fmt: skip
    room.add_argument("--keep-all", action="store_true", help="keep all checkpoints, and not only the best")
    sweeping.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters (default: fp32)")
    sweeping.add_argument(
        "--memory", type=size, default=size("256MiB"), metavar="SIZE", help="to use at most (default: 256MiB)"
    )
    sweeping.add_argument("--force", action="store_true", help="begin anew where there is a sweep already")
    sweeping.set_defaults(command=_sweep)


def _grid(text: str) -> tuple[float, ...]:
    try:
        return parse_grid(text)
    except ProfileError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _sweep(arguments: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415  --help need not wait for torch

    from phema_dist.selection.sweep import sweep  # noqa: PLC0415

    found = sweep(
        arguments.run,
        arguments.grid,
        arguments.evaluate,
        out=arguments.out,
        t=arguments.t,
        maximize=arguments.maximize,
        refine=arguments.refine,
        storage_options=arguments.storage_options,
        dtype=getattr(torch, DTYPES[arguments.dtype]),
        budget_bytes=arguments.disk,
        memory_bytes=arguments.memory,
        keep_all=arguments.keep_all,
        force=arguments.force,
        tell=_tell,
        reading=progress_bar,
    )
    print(found.table)
    if found.best:
        print(f"best: sigma_rel = {found.best.sigma_rel:g}, {found.best.value:.4g}; {found.checkpoint}")
        if edge := _edge(found.best, found.points):
            print(f"the best is at the edge of what was tried; {edge} may be better")
    else:
        print("phema: nothing was measured; there is no best one", file=sys.stderr)
    return 0 if found.best and not found.failed else 1


def _edge(best: Point, points: Sequence[Point]) -> str:
    """Which lengths, beyond those that have a metric, may be better; "" if the best lies between others."""
    tried = [point.sigma_rel for point in points if not math.isnan(point.value)]
    beyond = {
        "shorter ones": best.sigma_rel == min(tried),
        "longer ones": best.sigma_rel == max(tried) < _LONGEST,
    }
    return " or ".join(name for name, is_open in beyond.items() if is_open)


def _tell(point: Point) -> None:
    """As soon as it is known, as the next one may take hours."""
    if point.problem:
        print(f"phema: sigma_rel={point.sigma_rel:g}: {point.problem}", file=sys.stderr, flush=True)
    else:
        print(f"sigma_rel = {point.sigma_rel:g}: {point.value:.4g}", flush=True)
