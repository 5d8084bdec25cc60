"""The folder of a sweep: results, the best checkpoint, and others while they wait for their evaluation.

Nothing that a sweep has not made is deleted or replaced in it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from phema_dist.errors import SettingsError
from phema_dist.selection.results import Results, Subject, replace_file
from phema_dist.storage.store import sync_folder
from phema_dist.synthesis.files import read_header, remove
from phema_dist.target import Power

_log = logging.getLogger("phema_dist")
FILE, BEST = "model.safetensors", "best.safetensors"
RESULTS, TABLE, PICTURE = "sweep.json", "sweep.md", "sweep.svg"


def place_of(folder: Path, sigma_rel: float) -> Path:
    """Where a checkpoint lies before it is known whether it is the best."""
    return folder / Power(sigma_rel).name / FILE


def clear(folder: Path, *, force: bool) -> None:
    """Make sure that nothing is there but what an earlier sweep has left, and remove that if it may be."""
    checkpoints = sorted(folder.glob("sigma_rel-*"))
    if checkpoints and not (folder / RESULTS).exists():
        raise SettingsError(
            f"{folder} must hold nothing but a sweep, which deletes checkpoints; {checkpoints[0].name} is of none. "
            "Choose another --out."
        )
    old = [path for name in (BEST, TABLE, PICTURE) if (path := folder / name).exists()]
    if old and not force:
        raise SettingsError(
            f"{old[0]} exists, and is not of this sweep. Choose another --out, or replace it with --force."
        )
    # The best one stays until there is a better one of the new sweep.
    remove([path for path in old if path.name != BEST])
    for path in checkpoints:
        _drop(path / FILE)


def tidy(folder: Path, results: Results, waiting: Sequence[float]) -> None:
    """Move the best checkpoint to its place, and delete those that nobody waits for."""
    points = {place_of(folder, point.sigma_rel): point for point in results.points}
    wanted = {place_of(folder, sigma_rel) for sigma_rel in waiting}
    for path in {made / FILE for made in folder.glob("sigma_rel-*")} - wanted:
        point = points.get(path)
        if not path.exists():
            continue
        if point and point is results.best:
            _place(path, folder / BEST, move=not point.kept)
        if not (point and point.kept):
            _drop(path)


def _place(path: Path, best: Path, *, move: bool) -> None:
    """Make a checkpoint the best one: at every moment there is a whole one."""
    if move:
        path.replace(best)
    elif not (best.exists() and best.samefile(path)):
        hidden = best.with_name(f".{best.name}.{secrets.token_hex(8)}.tmp")
        try:
            os.link(path, hidden)
        except OSError:  # not every disk has links
            shutil.copyfile(path, hidden)
        hidden.replace(best)
    sync_folder(os.fspath(best.parent))


def _drop(path: Path) -> None:
    remove([path])
    with suppress(OSError):  # something else is in it, or it is gone
        path.parent.rmdir()


def is_average(path: Path, sigma_rel: float, subject: Subject) -> bool:
    """Whether a file holds that average of the swept run."""
    try:
        facts = json.loads(read_header(path)[0]["__metadata__"]["phema_dist"])
        found = facts["target"], facts["t"], facts["form"]["dtype"], subject.run in facts["attempts"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return found == (Power(sigma_rel).name, subject.t, subject.dtype, True)


def draw(results: Results, path: Path) -> None:
    """Write a picture of all points; without matplotlib there is none, and that is said."""
    try:
        from phema_dist.plot import figure_to_svg, sweep_figure  # noqa: PLC0415  matplotlib is optional

        figure = sweep_figure([(point.sigma_rel, point.metrics) for point in results.points], maximize=results.maximize)
    except ImportError as error:
        _log.warning("%s is not drawn: %s", path, error)
        return
    replace_file(path, figure_to_svg(figure))
