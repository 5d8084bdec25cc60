"""The command line, `phema …`: words in, words out. All work is done elsewhere."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from phema_dist import __version__
from phema_dist.errors import PhemaError, ProfileError, SettingsError

if TYPE_CHECKING:
    from phema_dist.cli.arguments import Commands

_THREADS = "OPENBLAS_NUM_THREADS"
_OVERVIEW = """Look after the snapshots of a training run, and make averages of any length.

before training
  plan         what to track, how often to store it, and what that costs
  convert      an averaging length in the numbers of other libraries
  import       turn a folder of pytorch-posthoc-ema or ema-pytorch into a run
while it trains, and after
  ls           the snapshots of a run, and why some are incomplete
  plot         how exact averages are, what they are made of, how a run fared
  verify       read everything, and name what is damaged
  pin          keep a snapshot for ever
  gc           remove what is dead
after training
  synthesize   make averages of any length, as checkpoint files
  sweep        find the best length by a metric of your own
  consolidate  join what synthesize --sharded wrote
"""
_AFTERWARDS = """phema COMMAND --help has an example of each.
exit codes: 0 done; 1 failed, or found damage; 2 arguments that cannot work
"""
_FLAGS = {
    "checkpoint_dir": "RUN",
    "max_checkpoints must": "--snapshots must",
    "keep must": "--keep must",
    "sigma_rels must": "--sigma-rels must",
    "update_after_step": "--update-after-step",
    "checkpoint_dtype": "--dtype",
    "sigma_rel_range": "--sigma-rel",
    "storage_bytes": "--storage",
    "memory_bytes": "--memory",
    "storage_options": "--storage-options",
    "update_every": "--update-every",
    "checkpoint_every": "--checkpoint-every",
    "seconds_per_step": "--seconds-per-step",
}
_SIGPIPE = 141  # as shells say it


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 after a failure, told in a line, or damage; 2 if arguments cannot work, as argparse exits; 130 after
        Ctrl-C; 141 if nobody reads on.
    """
    try:
        arguments = _parser().parse_args(argv)
        logging.basicConfig(format="phema: %(levelname)s: %(message)s")
        code: int | None = arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads what is printed has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so at its end
        return _SIGPIPE
    except (PhemaError, OSError, ImportError) as error:
        print(f"phema: {_in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, ProfileError | SettingsError) else 1
    except KeyboardInterrupt:
        return 130
    return code or 0


def _in_flags(text: str) -> str:
    """An error of the library, whose arguments have other names here; part of a path is none."""
    return re.sub(rf"(?<![\w/.-])({'|'.join(_FLAGS)})(?![\w/.-])", lambda found: _FLAGS[found[0]], text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phema", usage="phema [-h] [--version] COMMAND ...", description=_OVERVIEW, epilog=_AFTERWARDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"phema-dist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="phema", help=argparse.SUPPRESS)
    for add in _commands():
        add(commands)
    return parser


def _commands() -> Iterator[Callable[[Commands], None]]:
    """What adds them; to import it takes a while, as it loads numpy."""
    free = _THREADS not in os.environ
    if free:  # our matrices are small and many: threads that wait for each other take several times as long
        os.environ[_THREADS] = "1"
    try:
        from phema_dist.cli import averages, conversions, imports, pictures, plans, runs, sweeps  # noqa: PLC0415
    finally:
        if free:  # it was read, and is not for what a sweep starts
            del os.environ[_THREADS]
    return (module.add for module in (plans, runs, averages, imports, conversions, sweeps, pictures))
