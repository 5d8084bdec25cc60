"""What commands say of a run: its snapshots, what is wrong with them, what was removed. Words only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phema_dist.storage.gc import Garbage
    from phema_dist.storage.run import Run, Snapshot
    from phema_dist.storage.store import Store
    from phema_dist.storage.verify import Verdict


def listing(run: Run) -> str:
    """The snapshots of a run, one in a line."""
    tracked = ", ".join(f"{s:g}" for s in run.info.sigma_rels)
    lines = [
        f"{run.store.url}: sigma_rels {tracked}, {len(run.info.tensors)} tensors, t in {run.info.t_unit}",
        f"{'t':>12}  {'attempt':>7}  {'ranks':>5}  {'bytes':>15}  state",
    ]
    for row in _rows(run):
        ranks = row["ranks"] or "?"
        lines.append(f"{row['t']:>12}  {row['attempt']:>7}  {ranks:>5}  {row['bytes']:>15,}  {row['state']}")
    return "\n".join(lines)


def listing_facts(run: Run) -> dict[str, Any]:
    """The same, for programs."""
    info = run.info
    facts = {"url": run.store.url, "sigma_rels": info.sigma_rels, "t_unit": info.t_unit, "origin": info.origin}
    return {**facts, "snapshots": _rows(run)}


def _rows(run: Run) -> list[dict[str, Any]]:
    snapshots = sorted([*run.snapshots, *run.abandoned], key=lambda s: (s.t, s.attempt))
    return [_row(run, snapshot) for snapshot in snapshots]


def _row(run: Run, snapshot: Snapshot) -> dict[str, Any]:
    attempts = {attempt.number: attempt for attempt in run.attempts}
    state = f"incomplete: {snapshot.problem}" if snapshot.problem else "complete"
    if snapshot in run.abandoned and run.attempts:
        newest = run.attempts[-1]
        state = f"hidden: the newest attempt, {newest.number}, went on from t={newest.t} of {newest.parent} ({state})"
    return {
        "t": snapshot.t,
        "attempt": snapshot.attempt,
        "complete": snapshot.problem is None and snapshot not in run.abandoned,
        "ranks": attempts[snapshot.attempt].world_size if snapshot.attempt in attempts else None,
        "bytes": snapshot.num_bytes,
        "state": state,
    }


def verdict(store: Store, found: Verdict) -> str:
    """What is wrong with a run, one thing in a line, and how it is on the whole."""
    lines = [f"note: {finding.text}" for finding in found.notes]
    lines += [f"damaged: {finding.text}" for finding in found.problems]
    state = f"{_number(len(found.problems), 'problem')}" if found.problems else "no damage"
    read = f"{_number(found.num_complete, 'complete snapshot')}, {found.num_bytes:,} bytes read"
    return "\n".join([*lines, f"{store.url}: {state}; {read}"])


def removal(garbage: Garbage) -> str:
    """What went, and why."""
    size = "" if garbage.num_bytes is None else f"{garbage.num_bytes:,} bytes"
    return f"{size:>21}  {garbage.key}: {garbage.why}"


def removals(store: Store, removed: Sequence[Garbage], *, dry_run: bool) -> str:
    """How much went."""
    num_bytes = sum(garbage.num_bytes or 0 for garbage in removed)
    done = "would be removed" if dry_run else "removed"
    return f"{store.url}: {_number(len(removed), 'thing')} {done}, {num_bytes:,} bytes"


def _number(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
