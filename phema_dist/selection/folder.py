"""The folder of a sweep: results, the best checkpoint, and others while they wait for their evaluation.

Nothing that a sweep has not made is deleted or replaced in it, and no link is followed.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from phema_dist.errors import SettingsError
from phema_dist.selection.results import Results, Subject, save_results
from phema_dist.storage.store import make_folder, sync_folder
from phema_dist.synthesis.files import read_header, remove, write_file
from phema_dist.target import Power

_log = logging.getLogger("phema_dist")
FILE, BEST, HIDDEN = "model.safetensors", "best.safetensors", ".sweep"
RESULTS, TABLE, PICTURE = "sweep.json", "sweep.md", "sweep.svg"


def place_of(folder: Path, sigma_rel: float) -> Path:
    """Where a checkpoint lies before it is known whether it is the best: where nobody else writes."""
    return folder / HIDDEN / Power(sigma_rel).name / FILE


def kept_place_of(folder: Path, sigma_rel: float) -> Path:
    """Where a checkpoint lies that is to stay."""
    return folder / Power(sigma_rel).name / FILE


def clear(folder: Path, old: Results | None, *, force: bool) -> str:
    """Make sure that the results of nothing else are there, and remove what a sweep tells that it made.

    Returns:
        The mark of the best checkpoint, which stays until there is a better one of the new sweep.
    """
    found = [path for name in (BEST, TABLE, PICTURE) if os.path.lexists(path := folder / name)]
    if found and not force:
        raise SettingsError(
            f"{found[0]} exists, and is not of this sweep. Choose another --out, or replace it with --force."
        )
    remove([path for path in found if path.name != BEST])
    if old:
        for sigma_rel in old.making:
            _drop(require_own(folder, sigma_rel))
        for point in old.points:
            path = kept_place_of(folder, point.sigma_rel)
            if point.kept and is_average(path, point.sigma_rel, old.subject):
                _drop(path)
    return _mark(folder / BEST)


def check_best(folder: Path, results: Results) -> None:
    """Raise SettingsError if the best checkpoint is none that this sweep has made, or was allowed to replace."""
    best = folder / BEST
    if not os.path.lexists(best) or _mark(best) == results.old_best:
        return
    if not any(is_average(best, point.sigma_rel, results.subject) for point in results.points):
        raise SettingsError(
            f"{best} must be a checkpoint that this sweep has made; it is another. Move it away, and run this again."
        )


def announce(folder: Path, results: Results, batch: Sequence[float], *, keep: bool) -> Results:
    """Write down what is about to be made, so that it may be deleted; what is there already must be our own."""
    for sigma_rel in batch:
        path, kept = require_own(folder, sigma_rel), kept_place_of(folder, sigma_rel)
        if os.path.lexists(path) and sigma_rel not in results.making:
            raise _foreign(path)
        point = results.point(sigma_rel)
        ours = point and point.kept and is_average(kept, sigma_rel, results.subject)
        if keep and os.path.lexists(kept) and not ours:
            raise _foreign(kept)
    results = replace(results, making=tuple(batch))
    save_results(results, folder / RESULTS)
    return results


def tidy(folder: Path, results: Results, waiting: Sequence[float]) -> None:
    """Move checkpoints that this sweep has made to their places, and delete those that nobody waits for."""
    for sigma_rel in results.making:
        path, point = require_own(folder, sigma_rel), results.point(sigma_rel)
        if sigma_rel in waiting:
            continue
        if path.exists() and point:
            if point is results.best:
                check_best(folder, results)
                _place(path, folder / BEST, move=not point.kept)
            if point.kept:
                _keep(path, kept_place_of(folder, sigma_rel), sigma_rel, results)
        _drop(path)


def require_own(folder: Path, sigma_rel: float) -> Path:
    """Where a checkpoint waits. Raises SettingsError if that leads to somewhere else."""
    path = place_of(folder, sigma_rel)
    for place in (path.parents[1], path.parent, path):
        if place.is_symlink() or (place.exists() and place.is_dir() == (place is path)):
            raise _foreign(place)
    return path


def _foreign(path: Path) -> SettingsError:
    return SettingsError(
        f"{path} must be free for a checkpoint; what is there was not made by this sweep. Move it away, or choose "
        "another --out."
    )


def _mark(path: Path) -> str:
    """Tells a file from those that take its place."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return ""
    return f"{found.st_size} bytes of {found.st_mtime_ns}"


def _keep(path: Path, kept: Path, sigma_rel: float, results: Results) -> None:
    if kept.parent.is_symlink() or (os.path.lexists(kept) and not is_average(kept, sigma_rel, results.subject)):
        raise _foreign(kept)
    make_folder(os.fspath(kept.parent.absolute()))
    path.replace(kept)
    sync_folder(os.fspath(kept.parent))


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
    if path.parent.is_dir():
        remove([path])
    with suppress(OSError):  # something else is in it, or it is gone
        path.parent.rmdir()
        if path.parents[1].name == HIDDEN:
            path.parents[1].rmdir()


def is_average(path: Path, sigma_rel: float, subject: Subject) -> bool:
    """Whether a file, and no link to one, holds that average of the swept run."""
    if path.is_symlink() or path.parent.is_symlink():
        return False
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
        picture = figure_to_svg(figure)
    except Exception as error:  # noqa: BLE001  no picture is worth a sweep, and matplotlib raises anything
        _log.warning("%s is not drawn: %s", path, error)
        return
    write_file(path, picture, replace=True)
