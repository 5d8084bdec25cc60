"""What commands say of a run: its snapshots, what is wrong with them, what was removed. Words only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from phema_dist.legacy import OneStepProfile, spread
from phema_dist.prediction import in_percent, in_units

if TYPE_CHECKING:
    from phema_dist.storage.gc import Garbage
    from phema_dist.storage.manifest import Attempt
    from phema_dist.storage.run import Run, Snapshot
    from phema_dist.storage.store import Store
    from phema_dist.storage.verify import Verdict
    from phema_dist.synthesis.recipe import Recipe


_MOST_NAMED = 8


def listing(run: Run) -> str:
    """The snapshots of a run, one in a line."""
    tracked = ", ".join(f"{s:g}" for s in run.info.sigma_rels)
    lines = [
        f"{run.store.url}: sigma_rels {tracked}, {len(run.info.tensors)} tensors, t in {run.info.t_unit}",
        *([imported(run)] if run.info.imported else []),
        f"{'t':>12}  {'attempt':>7}  {'ranks':>5}  {'size':>8}  state",
    ]
    for row in _rows(run):
        ranks = row["ranks"] or "?"
        state = row["state"] + ", pinned" * row["pinned"]
        lines.append(f"{row['t']:>12}  {row['attempt']:>7}  {ranks:>5}  {in_units(row['bytes']):>8}  {state}")
    if gone := sorted(run.pins - {s.t for s in (*run.snapshots, *run.abandoned)}):
        shown = ", ".join(map(str, gone[:_MOST_NAMED])) + ", …" * (len(gone) > _MOST_NAMED)
        lines.append(f"pinned, but not there: t={shown}")
    return "\n".join(lines)


def imported(run: Run) -> str:
    """What the averages of an imported run really are."""
    origin = run.info.imported
    if origin is None or not run.complete:
        return "imported, and nothing is complete yet"
    newest = run.complete[-1]
    times = run.update_times
    really = []
    for sigma_rel in run.info.sigma_rels:
        masses = OneStepProfile(sigma_rel, newest.t - run.info.origin).masses(times)
        really.append(f"{sigma_rel:g} is {spread(masses, times):.3f} with {masses[0]:.1%} of the first parameters")
    return f"imported from {origin.library}, update_every {origin.update_every}: at t={newest.t} {'; '.join(really)}"


def prospect(recipe: Recipe) -> str:
    """How good an average would be, before it is made."""
    certificate = recipe.certificate
    state = "good" if certificate.good else "NOT good"
    return (
        f"{recipe.target} at t={recipe.t}: profile error {in_percent(certificate.recorded_error)}, "
        f"rounding noise {in_percent(certificate.rounding_noise)}: {state}"
    )


def listing_facts(run: Run) -> dict[str, Any]:
    """The same, for programs."""
    info = run.info
    facts = {"url": run.store.url, "sigma_rels": info.sigma_rels, "t_unit": info.t_unit, "origin": info.origin}
    facts["imported"] = asdict(info.imported) if info.imported else None
    return {**facts, "snapshots": _rows(run), "pins": sorted(run.pins)}


def _rows(run: Run) -> list[dict[str, Any]]:
    snapshots = sorted([*run.snapshots, *run.abandoned], key=lambda s: (s.t, s.attempt))
    return [_row(run, snapshot) for snapshot in snapshots]


def _row(run: Run, snapshot: Snapshot) -> dict[str, Any]:
    attempts = {attempt.number: attempt for attempt in run.attempts}
    state = f"incomplete: {snapshot.problem}" if snapshot.problem else "complete"
    if snapshot in run.abandoned and run.attempts:
        newest = run.attempts[-1]
        state = f"hidden: the newest attempt, {newest.number}, {_origin(newest)} ({state})"
    return {
        "t": snapshot.t,
        "attempt": snapshot.attempt,
        "complete": snapshot.problem is None and snapshot not in run.abandoned,
        "ranks": attempts[snapshot.attempt].world_size if snapshot.attempt in attempts else None,
        "bytes": snapshot.num_bytes,
        "pinned": snapshot.t in run.pins,
        "state": state,
    }


def _origin(attempt: Attempt) -> str:
    return "began afresh" if attempt.parent is None else f"went on from t={attempt.t} of {attempt.parent}"


def verdict(store: Store, found: Verdict) -> str:
    """What is wrong with a run, one thing in a line, and how it is on the whole."""
    lines = [f"note: {finding.text}" for finding in found.notes]
    lines += [f"damaged: {finding.text}" for finding in found.problems]
    state = f"{_number(len(found.problems), 'problem')}" if found.problems else "no damage"
    read = f"{_number(found.num_complete, 'complete snapshot')}, {in_units(found.num_bytes)} read"
    return "\n".join([*lines, f"{store.url}: {state}; {read}"])


def removal(garbage: Garbage) -> str:
    """What went, and why."""
    size = "" if garbage.num_bytes is None else in_units(garbage.num_bytes)
    return f"{size:>8}  {garbage.key}: {garbage.why}"


def removals(store: Store, removed: Sequence[Garbage], *, dry_run: bool) -> str:
    """How much went."""
    if not removed:
        return f"{store.url}: nothing to remove"
    num_bytes = sum(garbage.num_bytes or 0 for garbage in removed)
    done = "would be removed" if dry_run else "removed"
    return f"{store.url}: {_number(len(removed), 'thing')} {done}, {in_units(num_bytes)}"


def _number(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
