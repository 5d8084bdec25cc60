"""What a user's command says of a checkpoint: it is run without a shell, and the last number that it prints counts."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from phema_dist.errors import SettingsError
from phema_dist.storage.document import one_line

CHECKPOINT, SIGMA_REL = "{checkpoint}", "{sigma_rel}"
# A number is no part of a word: of "top5 12s v1.2.3 2026-11-22 0.85%" it is 0.85 alone. 1,234.5 is one of them.
# Nothing that was matched is given back, or a long text would take for ever.
_NUMBER = re.compile(
    r"(?<![\w.+-])[-+]?(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3}(?!\w))++|[0-9]++)(?:\.(?:[0-9]++|(?!\w)))?+|\.[0-9]++)"
    r"(?:e[-+]?[0-9]++)?+(?!\w|\.\d|-\d)"
    r"|(?<!\w)[-+]?(?a:nan|inf(?:inity)?)(?!\w)",
    re.IGNORECASE,
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SHOWN = 300  # characters of a failed command's output


def split_command(text: str) -> list[str]:
    """The words of a command, as a shell would split them.

    Raises:
        SettingsError: it is no command, does not say where the checkpoint goes, or there is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"the command must be one that a shell would take: {error}; got {text}.") from error
    if not any(CHECKPOINT in word for word in words):
        raise SettingsError(
            f"the command must say where the checkpoint goes, as {CHECKPOINT}; got {text or 'nothing'}."
        )
    if shutil.which(words[0]) is None:
        raise SettingsError(f"the command must begin with a program that is there; {words[0]} is none.")
    return words


def measure(words: list[str], checkpoint: Path, sigma_rel: float) -> tuple[float | None, str]:
    """Run a command on a checkpoint; its stderr is passed through.

    Returns:
        What it measured, or None and why there is nothing.
    """
    names = {CHECKPOINT: str(checkpoint), SIGMA_REL: repr(sigma_rel)}
    filled = [re.sub(r"\{checkpoint\}|\{sigma_rel\}", lambda match: names[match[0]], word) for word in words]
    done = subprocess.run(  # noqa: S603  the user's own command
        filled, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
    )
    text = _COLOUR.sub("", done.stdout.decode(errors="replace"))
    printed = f"it printed: {one_line(text[-_SHOWN:])}" if text.strip() else "it printed nothing"
    if done.returncode:
        return None, f"the command failed with exit code {done.returncode}; {printed}"
    value = last_number(text)
    return (None, f"the command must print a number; {printed}") if value is None else (value, "")


def last_number(text: str) -> float | None:
    """The last number in a text, as in `loss: 1.2e-3` or `0.85%`; None if there is none."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(found[-1].replace(",", "")) if found else None
