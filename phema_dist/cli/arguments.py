"""What the commands share: how words are read, a run is opened, ranks are joined and progress is shown."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from phema_dist.errors import PhemaError

if TYPE_CHECKING:
    from tqdm import tqdm

    from phema_dist.ranks import Ranks
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.consolidate import Progress

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001  what a command is added to
T = TypeVar("T")
_SECONDS_TO_TELL = 0.5


def add_run(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the run that a command is about."""
    parser.add_argument(
        "run", metavar="RUN", nargs=None if required else "?",
        help="where the run lives: a folder, s3://bucket/run, any fsspec URL",
    )  # fmt: skip
    parser.add_argument(
        "--storage-options", type=json_object, metavar="JSON",
        help='for the store, as in \'{"endpoint_url": "https://…"}\'; keys are better left to the environment',
    )  # fmt: skip


def number_at(make: Callable[[float, int | None], T]) -> Callable[[str], T]:
    """How to read NUMBER[@T]."""

    def read(text: str) -> T:
        number, at, t = text.partition("@")
        try:
            value, end = float(number), int(t) if at else None
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be a number, or NUMBER@T with a whole T; got {text}") from error
        try:
            return make(value, end)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def number(text: str) -> float:
    """Read a number as it is to be shown."""
    value = float(text)
    return int(value) if value.is_integer() else value  # as it is shown in names


def size(text: str) -> int:
    """Read a number of bytes, with or without a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt]i?)?b)?", text.lower())
    num_bytes = 0.0
    if match:
        unit = match[2] or ""
        num_bytes = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** " kmgt".index(unit[:1] or " ")
    if not 1 <= num_bytes < math.inf:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB, 5GiB or a number of bytes; got {text}")
    return int(num_bytes)


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def opened(arguments: argparse.Namespace) -> Store:
    """Open the store of the run that a command is about."""
    from phema_dist.storage.store import open_store  # noqa: PLC0415

    return open_store(arguments.run, arguments.storage_options)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started. Only rank 0 speaks: an error that stops one rank stops all, and it tells it."""
    from phema_dist.ranks import launched  # noqa: PLC0415  --help need not wait for torch

    logger = logging.getLogger("phema_dist")
    level = logger.level
    with launched() as ranks:
        try:
            if ranks.rank:
                logger.setLevel(logging.CRITICAL)
            yield ranks
        except PhemaError as error:
            if ranks.rank:
                time.sleep(_SECONDS_TO_TELL)  # torchrun ends the others as soon as one fails
                raise SystemExit(1) from error
            raise
        finally:
            logger.setLevel(level)


@contextmanager
def progress_bar(ranks: Ranks | None = None, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar of the bytes read, on rank 0's terminal; reading threads move it."""
    with _bar("reading", quiet=quiet or bool(ranks and ranks.rank), unit="B", unit_scale=True) as bar:

        def advance(num_bytes: int, total: int) -> None:
            with bar.get_lock():  # type: ignore[no-untyped-call]
                bar.total = total
                bar.update(num_bytes)

        yield advance


@contextmanager
def telling(what: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Say on a terminal what is being done, until it is, where no bytes can be counted. Yields a print for it."""
    with _bar(f"phema: {what}", quiet=quiet, bar_format="{desc} …") as bar:

        def say(text: str) -> None:
            bar.write(text)
            sys.stdout.flush()

        yield say


@contextmanager
def _bar(what: str, *, quiet: bool, **form: Any) -> Iterator[tqdm[NoReturn]]:
    """On stderr if that is a terminal, and wiped away at the end; what is logged meanwhile stands above it."""
    from tqdm import tqdm  # noqa: PLC0415
    from tqdm.contrib.logging import logging_redirect_tqdm  # noqa: PLC0415

    with tqdm(desc=what, leave=False, disable=quiet or None, **form) as bar, logging_redirect_tqdm():
        yield bar
