"""A command that turns the folder of another library into a run: `phema import`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from phema_dist.cli.arguments import json_object, telling
from phema_dist.errors import SettingsError
from phema_dist.legacy import DEFAULT_UPDATE_EVERY
from phema_dist.prediction import in_units

if TYPE_CHECKING:
    from phema_dist.cli.arguments import Commands

_SHOWN = (0.05, 0.10, 0.15, 0.20, 0.25)  # lengths whose certificates are printed


def add(commands: Commands) -> None:
    """Add this command."""
    coming = commands.add_parser(
        "import",
        description="Copy the snapshots of another library (INDEX.STEP.pt) into a run, with the profiles that its "
        "update_every really made, so that any length can be synthesized from them as far as they allow. The folder "
        "stays as it is. After a kill, the same command goes on.",
        epilog="example: phema import posthoc-ema --from posthoc-ema --sigma-rels 0.05,0.28 --out runs/old",
    )  # fmt: skip
    coming.add_argument("folder", type=Path, metavar="DIR", help="that holds the .pt files")
    coming.add_argument("--from", required=True, choices=sorted(DEFAULT_UPDATE_EVERY), dest="library", help="who wrote")
    coming.add_argument("--out", required=True, metavar="RUN", help="a folder, s3://bucket/run, any fsspec URL")
    coming.add_argument("--storage-options", type=json_object, metavar="JSON", help="for the store of --out")
    coming.add_argument(
        "--sigma-rels", type=_numbers, metavar="A,B", help="as the training had them, in that order: files do not say"
    )
    coming.add_argument(
        "--update-every", type=int, metavar="K", help="as the training had it (default: the library's, "
        f"{', '.join(f'{k} for {library}' for library, k in DEFAULT_UPDATE_EVERY.items())})",
    )  # fmt: skip
    coming.add_argument(
        "--update-after-step", type=int, metavar="N", help="as the training had it (default: as the files tell)"
    )
    coming.set_defaults(command=_import)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, as 0.05,0.28; got {text}") from error


def _import(arguments: argparse.Namespace) -> None:
    if arguments.sigma_rels is None:
        raise SettingsError(
            "--sigma-rels must say what the training tracked, in its order: the files do not. The default of "
            "posthoc-ema is --sigma-rels 0.05,0.28; ema-pytorch has none, so the training was given them. Of gammas, "
            "phema convert --gamma tells the sigma_rel."
        )

    from phema_dist import report  # noqa: PLC0415  --help need not wait for torch
    from phema_dist.migration import Folder, copy_folder  # noqa: PLC0415
    from phema_dist.storage.run import open_run  # noqa: PLC0415
    from phema_dist.storage.store import open_store  # noqa: PLC0415
    from phema_dist.synthesis.recipe import plan  # noqa: PLC0415

    every = DEFAULT_UPDATE_EVERY[arguments.library] if arguments.update_every is None else arguments.update_every
    folder = Folder(arguments.folder, arguments.library, arguments.sigma_rels, every, arguments.update_after_step)
    store = open_store(arguments.out, arguments.storage_options)
    with telling(f"copying {arguments.folder}") as say:
        for copied in copy_folder(folder, store):
            state = in_units(copied.num_bytes) if copied.num_bytes else "there already"
            say(f"step {copied.step} -> t={copied.t}: {state}")
    run = open_run(store)
    run.require_newest()
    print(report.imported(run))
    for recipe in plan(run, _SHOWN):
        print(report.prospect(recipe))
