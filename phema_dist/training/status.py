"""How the background path of one rank fares: counts that its threads keep, and the words for them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phema_dist.prediction import in_units
from phema_dist.storage.manifest import Measured
from phema_dist.storage.snapshot import DTYPES
from phema_dist.training.staging import NUM_SLOTS

if TYPE_CHECKING:
    from phema_dist.training.staging import Segment

Status = dict[str, int | float | str | None]


@dataclass
class Counts:
    """What became of the updates and snapshots of this rank, since PostHocEMA was made.

    Each field is changed by one thread and may be read by any.
    """

    updates: int = 0
    updates_skipped: int = 0  # storage never causes it: the averages were busy
    updates_refused: int = 0
    no_steps: int = 0  # rounds of `attach`, of those that t counts, that are known to be no steps
    stall_seconds: float = 0.0
    written: int = 0
    skipped: int = 0
    failed: int = 0
    num_bytes: int = 0
    last_written: int | None = None
    last_complete: int | None = None
    last_error: str | None = None


def describe(counts: Counts, t: int = 0, lag: int = 0, stopped: str | None = None) -> Status:
    """The counts in the words of `PostHocEMA.status`; `stopped` says why a thread did, if one did.

    Flat: numbers, None for what has not been yet, one text. TensorBoard and MLflow take numbers only:
    `{name: value for name, value in status.items() if isinstance(value, int | float)}`.
    """
    return {
        "t": t - counts.no_steps,
        "updates": counts.updates,
        "updates_skipped": counts.updates_skipped,
        "updates_refused": counts.updates_refused,
        "lag": lag,
        "stall_seconds": counts.stall_seconds,
        "snapshots_written": counts.written,
        "snapshots_skipped": counts.skipped,
        "snapshots_failed": counts.failed,
        "bytes": counts.num_bytes,
        "last_written_snapshot": counts.last_written,
        "last_complete_snapshot": counts.last_complete,
        "last_error": stopped or counts.last_error,
    }


def outcome(counts: Counts) -> str:
    """What became of a rank's updates and snapshots, when it has ended well."""
    text = f"closed; updates: {counts.updates}, snapshots: {counts.written}, {in_units(counts.num_bytes)} of this rank"
    odd = {
        "updates skipped": counts.updates_skipped,
        "updates refused": counts.updates_refused,
        "snapshots skipped": counts.skipped,
        "snapshots failed": counts.failed,
    }
    return "".join([text, *(f", {name}: {number}" for name, number in odd.items() if number)])


def footprint(segments: Sequence[Segment], num_profiles: int, dtype: str) -> str:
    """What a rank averages, and the host memory that takes for averages, staging and one snapshot stored as `dtype`."""
    stored = DTYPES[dtype].itemsize
    staged = sum(NUM_SLOTS * segment.numel * segment.dtype.itemsize for segment in segments)
    averaged = [segment for segment in segments if segment.averaged]
    averages = sum(segment.numel * (segment.average_dtype.itemsize + stored) for segment in averaged)
    numel = sum(segment.numel for segment in averaged)
    return f"{numel} elements in {in_units(staged + num_profiles * averages)} of host memory"


def measured(counts: Counts, lag: int, numel: int, squares: float, moved: float, *moving: float) -> Measured | None:
    """What a manifest says now, with what `SnapshotBuffers.measure` found; None if that is beyond any document."""
    if not math.isfinite(math.fsum((squares, moved, *moving))):
        return None
    return Measured(
        time.time(), numel, squares, moved, lag, counts.stall_seconds, counts.updates_skipped, counts.updates_refused,
        counts.skipped, counts.failed, *moving,
    )  # fmt: skip
