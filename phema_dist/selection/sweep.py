"""A sweep: averages of many lengths are made, each is measured, and the best one is kept.

A command measures checkpoint files, as many at a time as the disk may hold; a callable measures tensors in memory.
What was measured stands in sweep.json at once, so that the same call after a kill goes on where it was.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phema_dist.errors import RunError, SettingsError
from phema_dist.ranks import ALONE
from phema_dist.selection.folder import (
    BEST,
    FILE,
    PICTURE,
    RESULTS,
    TABLE,
    announce,
    check_best,
    clear,
    draw,
    is_average,
    place_of,
    tidy,
)
from phema_dist.selection.grid import checked_grid, next_sigma_rel, parse_grid
from phema_dist.selection.metric import measure, split_command
from phema_dist.selection.results import (
    Point,
    Results,
    Subject,
    finite,
    load_results,
    save_results,
    table,
)
from phema_dist.storage.manifest import FORMAT
from phema_dist.storage.remote import without_credentials
from phema_dist.storage.run import open_run
from phema_dist.storage.store import open_store
from phema_dist.synthesis.checkpoint import Form, divide, items_of
from phema_dist.synthesis.consolidate import Progress, synthesize, write_checkpoints
from phema_dist.synthesis.files import locked, write_file
from phema_dist.synthesis.recipe import plan
from phema_dist.synthesis.request import Request
from phema_dist.synthesis.stream import MEMORY_BYTES
from phema_dist.target import Power, as_python

if TYPE_CHECKING:
    from phema_dist.storage.run import Run
    from phema_dist.storage.store import Store

_log = logging.getLogger("phema_dist")
Evaluate = Callable[[dict[str, torch.Tensor]], float | Mapping[str, float]]
Reading = Callable[[], AbstractContextManager[Progress]]
_IN_MEMORY_BYTES = 4 << 30
_WHOLE = 1 << 62  # the command is given one file, however large
_FACTS_BYTES = 4096  # what a checkpoint says of itself beside its recipe, at most


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. `checkpoint` is the best average as a file, if there is a folder for it."""

    results: Results
    sigma_rels: tuple[float, ...]  # that this call asked for, in that order: the grid, then those around its best
    checkpoint: Path | None

    @property
    def points(self) -> tuple[Point, ...]:
        """All that was measured, by sigma_rel; what earlier calls for the same folder measured, too."""
        return self.results.points

    @property
    def best(self) -> Point | None:
        """The best of them; None if nothing has a metric."""
        return self.results.best

    @property
    def failed(self) -> tuple[Point, ...]:
        """Those whose command failed."""
        return tuple(point for point in self.points if point.problem)

    @property
    def table(self) -> str:
        """All points, in Markdown."""
        return table(self.results)


@dataclass(frozen=True)
class _Job:
    """What was asked for; `words` is the command, `folder` the place of files, if there is one."""

    checkpoint_dir: str | os.PathLike[str]
    storage_options: Mapping[str, Any] | None
    store: Store
    t: int
    form: Form
    memory_bytes: int
    evaluate: Evaluate | None
    words: tuple[str, ...]
    folder: Path | None
    at_once: int
    keep_all: bool
    tell: Callable[[Point], object]
    reading: Reading

    def path(self, sigma_rel: float) -> Path:
        """Where its checkpoint goes."""
        assert self.folder is not None  # noqa: S101
        return place_of(self.folder, sigma_rel)


def sweep(
    checkpoint_dir: str | os.PathLike[str],
    sigma_rels: Sequence[float] | str,
    evaluate: Evaluate | str,
    *,
    out: str | os.PathLike[str] | None = None,
    t: int | None = None,
    maximize: bool = False,
    refine: int = 4,
    storage_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    budget_bytes: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    keep_all: bool = False,
    force: bool = False,
    tell: Callable[[Point], object] = lambda _: None,
    reading: Reading = lambda: nullcontext(lambda _, __: None),
) -> Sweep:
    """Make averages of many lengths of one run, measure each, and keep the best one.

    Those of the grid are made in one pass over the stored bytes, or in as few as the budget allows; then single ones
    around the best, by golden-section search, until it has neighbours nearer than 5% on both sides.

    Args:
        checkpoint_dir: where the run lives: a folder or any fsspec URL.
        sigma_rels: lengths to try, or "LOW:HIGH:N" for N of them that grow by a constant factor.
        evaluate: called with a state dict of full CPU tensors, as `synthesize` makes it; returns a number, or several
            by name, of which the first one decides. Or a command, started for each checkpoint without a shell:
            {checkpoint} and {sigma_rel} in it are replaced, and the last number that it prints is the metric.
        out: a folder for the results (sweep.json, sweep.md, sweep.svg) and best.safetensors; a command needs it. What
            was measured there before, of the same run, t, command (or name of the callable) and dtype, is not
            measured again.
        t: the end of the averages, as the run counts it; None: the newest complete snapshot, and when the sweep goes
            on, what it was when it began.
        maximize: whether a high metric is good. One that is not finite never wins.
        refine: how many lengths to try beyond the grid, at most.
        storage_options: for the store, as in `PostHocEMA.from_model`.
        dtype: of the parameters in files.
        budget_bytes: what averages may take while they wait: in `out`, the best one included (None: half of what is
            free on its disk), or in memory, for a callable (None: 4 GiB; one at least).
        memory_bytes: how much memory to use beside that.
        keep_all: whether all checkpoints stay in `out`, of any size together, and not only the best one.
        force: whether to begin anew where there is a sweep already.
        tell: called with each point when it is measured.
        reading: opens a context for each pass, whose value is told the bytes read since the last call, and how many
            there are; called from any thread.

    Returns:
        All points and the best one. A command that fails, or prints no number, is a point with a `problem`, and is
        tried again by the next call; what a callable raises is raised.

    Raises:
        SettingsError: `out` holds the sweep of something else, or files that are not of a sweep; a command that cannot
            be; a budget that does not hold two checkpoints.
        ProfileError, RunError, StorageError: as `synthesize`.
    """
    grid = parse_grid(sigma_rels) if isinstance(sigma_rels, str) else checked_grid([float(s) for s in sigma_rels])
    words = split_command(evaluate) if isinstance(evaluate, str) else []
    if "://" in str(out):
        shown = without_credentials(str(out))
        raise SettingsError(f"the folder of a sweep must be a local one, to be uploaded from there; got {shown}.")
    folder = None if out is None else Path(out)
    if words and folder is None:
        raise SettingsError("a command must have a folder for its checkpoints; give `out`.")
    if refine < 0:
        raise SettingsError(f"refine must be at least 0; got {refine}.")
    store, form = open_store(checkpoint_dir, storage_options), Form(dtype, max_file_bytes=_WHOLE)
    with _each_warning_once(), locked(folder) if folder else nullcontext():
        run = open_run(store)
        found = _found(folder / RESULTS, force=force) if folder else None
        old = None if force else found
        subject = _subject(run, t, old, evaluate, form)
        at_once = _num_at_once(run, form, grid, subject.t, folder if words else None, budget_bytes)
        results = Results(FORMAT, run.store.url, subject, maximize)
        if folder and old and (old.points or old.subject == subject):
            old.require(subject, run.store.url, folder)
            results = replace(old, maximize=maximize)
            check_best(folder, results)
        elif folder:
            results = replace(results, old_best=clear(folder, found, force=force))
            save_results(results, folder / RESULTS)
        job = _Job(
            checkpoint_dir, storage_options, store, subject.t, form, memory_bytes,
            None if isinstance(evaluate, str) else evaluate, tuple(words), folder,
            len(grid) if keep_all and words else at_once, keep_all, tell, reading,
        )  # fmt: skip
        return _finish(job, *_search(job, results, grid, refine))


def _found(path: Path, *, force: bool) -> Results | None:
    """What an earlier call has measured; one that begins anew need not understand it."""
    try:
        return load_results(path)
    except RunError:
        if force:
            return None
        raise


def _subject(run: Run, t: int | None, old: Results | None, evaluate: Evaluate | str, form: Form) -> Subject:
    """What is to be measured. A sweep that goes on ends where it began to, whatever was stored since."""
    if t is None and old and old.points:
        end, newest = old.subject.t, run.newest(old.subject.t)  # there is none if this is another run
    else:
        newest = run.require_newest(t)
        end = newest.t if t is None else as_python(t)
    token = newest.manifests[0].token if newest else ""
    return Subject(token, end, _named(evaluate), str(form.dtype).removeprefix("torch."))


def _num_at_once(
    run: Run, form: Form, grid: Sequence[float], t: int, folder: Path | None, budget_bytes: int | None
) -> int:
    """How many averages fit the budget, on the disk of a folder or in memory."""
    form = form if folder else replace(form, dtype=torch.float32)
    (file,) = divide(items_of(run.info, form), form, FILE, 1)[0]
    if folder is None:
        return max((budget_bytes or _IN_MEMORY_BYTES) // max(file.data_bytes, 1), 1)
    header_bytes = max(len(file.header(recipe.describe())) for recipe in plan(run, grid, t))
    num_bytes = file.data_bytes + header_bytes + _FACTS_BYTES
    budget_bytes = shutil.disk_usage(folder).free // 2 if budget_bytes is None else budget_bytes
    if budget_bytes < 2 * num_bytes:
        raise SettingsError(
            f"the disk budget must hold two checkpoints, the best one so far and one to evaluate, of {num_bytes:,} "
            f"bytes each; got {budget_bytes:,}. Allow more (--disk), or choose a smaller --dtype."
        )
    return budget_bytes // num_bytes - 1


def _search(job: _Job, results: Results, grid: Sequence[float], refine: int) -> tuple[Results, list[float]]:
    """Measure the grid, then points around its best: the same ones whether or not they were measured before."""
    sigma_rels = list(grid)
    results = _measure_missing(job, results, sigma_rels)
    for _ in range(refine):
        found = next_sigma_rel({sigma_rel: results.loss(sigma_rel) for sigma_rel in sigma_rels})
        if found is None or found in sigma_rels:
            break
        sigma_rels.append(found)
        results = _measure_missing(job, results, [found])
    return results, sigma_rels


def _measure_missing(job: _Job, results: Results, sigma_rels: Sequence[float]) -> Results:
    """Make and measure what is not there yet, a batch at a time; each result is stored before its checkpoint goes."""
    missing = [sigma_rel for sigma_rel in sigma_rels if not results.measured(sigma_rel)]
    for start in range(0, len(missing), job.at_once):
        batch = missing[start : start + job.at_once]
        if job.folder:
            tidy(job.folder, results, batch)
            results = announce(job.folder, results, batch if job.words else (), keep=job.keep_all)
        found = _measured_files(job, batch) if job.words else _measured_tensors(job, batch)
        for i, point in enumerate(found, start=1):
            results = results.with_point(point)
            if job.folder:
                save_results(results, job.folder / RESULTS)
                tidy(job.folder, results, batch[i:])
            job.tell(point)
    return results


def _measured_files(job: _Job, batch: Sequence[float]) -> Iterator[Point]:
    recipes = _write(job, batch)
    for sigma_rel, certificate in zip(batch, recipes, strict=True):
        value, problem = measure(list(job.words), job.path(sigma_rel), sigma_rel)
        metrics = {} if value is None else finite({"metric": value})
        errors = certificate.profile_error, certificate.rounding_noise
        yield Point(sigma_rel, metrics, *errors, problem, kept=job.keep_all)


def _measured_tensors(job: _Job, batch: Sequence[float]) -> Iterator[Point]:
    assert job.evaluate is not None  # noqa: S101
    with job.reading() as progress:
        averages = synthesize(
            job.checkpoint_dir, batch,
            t=job.t, storage_options=job.storage_options, memory_bytes=job.memory_bytes, progress=progress,
        )  # fmt: skip
    for sigma_rel in batch:
        average = averages.pop(0)  # so that its memory is free when the next one is measured
        found = job.evaluate(average.state_dict)
        metrics = {name: float(x) for name, x in (found if isinstance(found, Mapping) else {"metric": found}).items()}
        if not metrics:
            raise SettingsError("evaluate must return a number, or a mapping of at least one; got an empty one.")
        yield Point(sigma_rel, finite(metrics), average.certificate.profile_error, average.certificate.rounding_noise)


def _write(job: _Job, batch: Sequence[float]) -> list[Any]:
    """Make checkpoints in one pass; those that a killed call has left are kept. Returns their certificates."""
    request = Request(tuple(map(Power, batch)), job.t, memory_bytes=job.memory_bytes)
    paths = [job.path(sigma_rel) for sigma_rel in batch]

    def write(*, overwrite: bool) -> list[Any]:
        with job.reading() as progress:
            written = write_checkpoints(
                job.store, ALONE, request, paths, job.form, overwrite=overwrite, progress=progress
            )
        return [checkpoint.recipe.certificate for checkpoint in written]

    try:
        return write(overwrite=False)
    except SettingsError:
        # One that was left was made of snapshots that the run has deleted since. It is our own, and nobody measured it.
        return write(overwrite=True)


def _finish(job: _Job, results: Results, sigma_rels: Sequence[float]) -> Sweep:
    """Make sure that the best average is there as a file, and tell of all in words and a picture."""
    best, checkpoint = results.best, None
    if job.folder:
        if best:
            checkpoint = job.folder / BEST
            if not is_average(checkpoint, best.sigma_rel, results.subject):
                tidy(job.folder, results, [best.sigma_rel])
                results = announce(job.folder, results, [best.sigma_rel], keep=False)
                _write(job, [best.sigma_rel])
        tidy(job.folder, results, [])
        if results.making:
            results = announce(job.folder, results, (), keep=False)
        write_file(job.folder / TABLE, f"{table(results)}\n".encode(), replace=True)
        if best:
            draw(results, job.folder / PICTURE)
    return Sweep(results, tuple(sigma_rels), checkpoint)


def _named(evaluate: Evaluate | str) -> str:
    if isinstance(evaluate, str):
        return evaluate
    named: Any = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
    return f"{named.__module__}.{named.__qualname__}"


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """The passes of a sweep plan the same run again and again, and would say the same of it."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in told
        told.add(text)
        return new

    _log.addFilter(is_new)
    try:
        yield
    finally:
        _log.removeFilter(is_new)
