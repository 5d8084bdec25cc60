"""The command line, `phema …`: words in, words out. All work is done elsewhere."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version

from phema_dist.cli import averages, conversions, imports, pictures, plans, runs, sweeps
from phema_dist.errors import PhemaError

_COMMANDS = (plans, runs, averages, imports, conversions, sweeps, pictures)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 after a failure, told in a line, or damage; usage errors exit with 2."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="phema: %(levelname)s: %(message)s")
    try:
        code: int | None = arguments.command(arguments)
    except (PhemaError, OSError, ImportError) as error:
        print(f"phema: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phema", description="Look after the snapshots of a training run, and make averages of any length of them."
    )
    parser.add_argument("--version", action="version", version=f"phema-dist {version('phema-dist')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add(commands)
    return parser
