"""Commands that look after a run: `phema ls`, `verify`, `gc`, `pin`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from phema_dist.cli.arguments import add_run, opened, progress_bar, telling

if TYPE_CHECKING:
    from phema_dist.cli.arguments import Commands


def add(commands: Commands) -> None:
    """Add these commands."""
    listing = commands.add_parser(
        "ls", epilog="example: phema ls s3://bucket/run",
        description="List the snapshots of a run: t, whether complete and if not why, whether pinned, size.",
    )  # fmt: skip
    add_run(listing)
    listing.add_argument("--json", action="store_true", help="print JSON, for programs")
    listing.set_defaults(command=_ls)

    checking = commands.add_parser(
        "verify", epilog="example: phema verify s3://bucket/run",
        description="Read every byte of a run and compare it with what was written. Damage is named, and makes the "
        "exit code 1; what is incomplete is noted. A job may write meanwhile.",
    )  # fmt: skip
    add_run(checking)
    checking.add_argument("--json", action="store_true", help="print JSON, for programs")
    checking.set_defaults(command=_verify)

    removing = commands.add_parser(
        "gc", epilog="example: phema gc s3://bucket/run --dry-run",
        description="Remove what nobody will finish (parts of snapshots, puts that were cut off), and snapshots that "
        "a resume from an earlier t gave up and that the run has gone beyond. Never pins, the newest complete "
        "snapshot, what a job writes.",
    )  # fmt: skip
    add_run(removing)
    removing.add_argument("--abandoned", action="store_true", help="all snapshots that were given up (hidden in ls)")
    removing.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="of complete snapshots the N that serve all lengths best, pinned ones included",
    )
    removing.add_argument("--retention", choices=("best", "last"), help="with --keep: last keeps the newest N instead")
    removing.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    removing.set_defaults(command=_gc, usage_error=removing.error)

    pinning = commands.add_parser(
        "pin", epilog="example: phema pin s3://bucket/run --t 20",
        description="Pin the snapshot at a t: neither a job nor `phema gc` deletes it, whatever they keep otherwise.",
    )  # fmt: skip
    add_run(pinning)
    pinning.add_argument("--t", type=int, required=True, metavar="T", help="of a complete snapshot, as ls shows it")
    pinning.add_argument("--remove", action="store_true", help="take the pin back: retention may delete it then")
    pinning.set_defaults(command=_pin)


def _ls(arguments: argparse.Namespace) -> None:
    from phema_dist import report  # noqa: PLC0415  --help need not wait for torch
    from phema_dist.storage.run import open_run  # noqa: PLC0415

    store = opened(arguments)
    with telling(f"reading the table of contents of {store.url}", quiet=arguments.json):
        run = open_run(store)
    print(json.dumps(report.listing_facts(run), indent=2) if arguments.json else report.listing(run))


def _verify(arguments: argparse.Namespace) -> int:
    from phema_dist import report  # noqa: PLC0415
    from phema_dist.storage.verify import verify  # noqa: PLC0415

    store = opened(arguments)
    with progress_bar(quiet=arguments.json) as progress:
        verdict = verify(store, progress)
    print(
        json.dumps({"url": store.url, **asdict(verdict)}, indent=2)
        if arguments.json
        else report.verdict(store, verdict)
    )
    return 1 if verdict.problems else 0


def _gc(arguments: argparse.Namespace) -> None:
    from phema_dist import report  # noqa: PLC0415
    from phema_dist.storage.gc import collect_garbage  # noqa: PLC0415

    if arguments.retention and not arguments.keep:
        arguments.usage_error("--retention says which snapshots --keep N keeps: give that, too")
    store, removed = opened(arguments), []
    found = collect_garbage(
        store,
        keep=arguments.keep,
        retention=arguments.retention or "best",
        abandoned=arguments.abandoned,
        dry_run=arguments.dry_run,
    )
    with telling(f"looking through {store.url}") as say:
        for garbage in found:
            removed.append(garbage)
            say(report.removal(garbage))
    print(report.removals(store, removed, dry_run=arguments.dry_run))


def _pin(arguments: argparse.Namespace) -> None:
    from phema_dist.storage import pins  # noqa: PLC0415

    store = opened(arguments)
    with telling(f"reading the table of contents of {store.url}"):
        (pins.unpin if arguments.remove else pins.pin)(store, arguments.t)
    print(f"{store.url}: t={arguments.t} is {'not pinned any more' if arguments.remove else 'pinned'}")
