"""What a plan leads to: the errors, bytes and bandwidths of a run that follows it. Pure; nothing here needs torch.

Predicted for a run that makes every update and every snapshot that is due, and ends with `close`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np

from phema_dist import profile, schedule
from phema_dist.profile import Array, PowerProfile

HALF_ULP = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # as in storage.snapshot, which needs torch
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}

_TARGETS_IN_GAP = 24  # between neighbouring tracked sigma_rels: errors are 0 at these, with narrow bumps beside them
_NUM_STOPS = 32  # snapshots in the second half of the run, where what is kept changes in an irregular way
_STAGED_BYTES = 4  # of an element of the model in host memory, at most
_AVERAGED_BYTES = 4
_STEP = 1000  # from one unit of bytes to the next
_LEAST_PERCENT = 1e-5  # as a share


@dataclass(frozen=True)
class Plan:
    """What to pass to `PostHocEMA.from_model(model, url, plan=plan)`, and what to expect of it.

    `steps` is the length of the run in units of t, `t_per_call` what t grows by from one call of `update_` to the next:
    1, or the batch size if t counts samples. `update_every` and `checkpoint_every` are in calls. `checkpoint_dtype` is
    fp32, fp16 or bf16. `ts` are the times of the snapshots that are there at the end.

    Errors are those of averaging profiles, relative, against averages that are tracked directly with the same updates:
    over `sigma_rel_range` at the end, and the worst of `stop_error` if the run is stopped anywhere in its second half,
    at a snapshot or between two, where `close` takes another.
    `rounding_noise` is the expected relative change of a parameter by the rounding of what is stored, at its worst.
    """

    steps: int
    t_per_call: int
    num_parameters: int
    ranks: int
    sigma_rel_range: tuple[float, float]
    sigma_rels: tuple[float, ...]
    update_every: int
    checkpoint_every: int
    max_checkpoints: int
    checkpoint_dtype: str
    ts: tuple[int, ...]
    num_updates: int
    worst_error: float
    mean_error: float
    stop_error: float
    rounding_noise: float
    seconds_per_step: float | None = None  # between calls of update_

    @property
    def num_taken(self) -> int:
        """Snapshots taken in all; more than are kept if `max_checkpoints` is below that."""
        calls = self.steps // self.t_per_call
        return calls // self.checkpoint_every + (self.ts[-1] % (self.checkpoint_every * self.t_per_call) != 0)

    @property
    def parameters_per_rank(self) -> int:
        """That a rank owns, on average; the largest share is at most about 1.05 of it."""
        return math.ceil(self.num_parameters / self.ranks)

    @property
    def snapshot_bytes(self) -> int:
        """Of one snapshot, by all ranks."""
        return snapshot_bytes(self.num_parameters, len(self.sigma_rels), self.checkpoint_dtype)

    @property
    def bytes_in_all(self) -> int:
        """On storage, at most: what is kept, and one more while it replaces another."""
        replaced = self.num_taken > self.max_checkpoints
        return self.snapshot_bytes * (len(self.ts) + replaced)

    @property
    def bytes_per_rank(self) -> int:
        """On storage, by one rank, at most."""
        return math.ceil(self.bytes_in_all / self.ranks)

    @property
    def host_bytes_per_rank(self) -> int:
        """Host memory: the averages and one snapshot of each profile, and two copies of what the rank owns.

        For a model in float32; without what the process needs anyway, and less for a model in 16 bits. Beside an
        accelerator PyTorch may round the copies, which are pinned, up to a power of two.
        """
        stored = ITEMSIZE[self.checkpoint_dtype]
        return self.parameters_per_rank * (len(self.sigma_rels) * (_AVERAGED_BYTES + stored) + 2 * _STAGED_BYTES)

    @property
    def update_bytes_per_rank(self) -> int:
        """That an update moves in host memory: 4 read of the parameters, 8 read and written of each average."""
        return self.parameters_per_rank * (_STAGED_BYTES + 2 * _AVERAGED_BYTES * len(self.sigma_rels))

    @property
    def host_bandwidth(self) -> float | None:
        """Bytes/s of host memory, by one rank, while updates are as frequent as they get; None: no time is given."""
        return self.seconds_per_step and self.update_bytes_per_rank / (self.seconds_per_step * self.update_every)

    @property
    def upload_bytes_per_rank(self) -> int:
        """That a rank puts for one snapshot."""
        return math.ceil(self.snapshot_bytes / self.ranks)

    @property
    def upload_bandwidth(self) -> float | None:
        """Bytes/s to storage, by one rank, to be done before the next snapshot is due; None: no time is given."""
        return self.seconds_per_step and self.upload_bytes_per_rank / (self.seconds_per_step * self.checkpoint_every)

    def facts(self) -> dict[str, object]:
        """All of it by name, what is predicted and what follows from it, for JSON."""
        derived = [name for name, value in vars(Plan).items() if isinstance(value, property)]
        return {name: getattr(self, name) for name in [*(field.name for field in fields(self)), *derived]}


def predict(settings: Plan) -> Plan:
    """The same plan, with the errors and the times that follow from its settings."""
    times = update_times(settings)
    spacing = settings.checkpoint_every * settings.t_per_call
    taken = sorted({*range(spacing, settings.steps + 1, spacing), int(times[-1])})
    kept = list(_kept(taken, settings.sigma_rels, settings.max_checkpoints))
    targets = _targets(settings)
    stops = _stops(settings, kept, times)
    stop = max(stops, key=lambda ts: schedule.reconstruction_errors(ts, settings.sigma_rels, targets).max())
    errors, noise = _errors(settings, kept[-1], times)
    return replace(
        settings,
        ts=kept[-1],
        num_updates=len(times),
        worst_error=float(errors.max()),
        mean_error=_mean(errors, np.log(targets)),
        stop_error=float(max(errors.max(), _errors(settings, stop, times)[0].max())),
        rounding_noise=noise,
    )


def _errors(settings: Plan, ts: Sequence[int], times: Array) -> tuple[Array, float]:
    """Errors over the range at the last of the snapshots `ts`, against recorded updates, and the rounding noise."""
    stored = [PowerProfile(sigma_rel, t) for sigma_rel in settings.sigma_rels for t in ts]
    targets = [PowerProfile(float(s), ts[-1]) for s in _targets(settings)]
    x, _ = profile.fit(stored, targets)
    errors = profile.recorded_errors(stored, x, targets, times)
    rounding = HALF_ULP[settings.checkpoint_dtype] / math.sqrt(3)  # it lies evenly between 0 and half a unit
    return errors, float(np.linalg.norm(x, axis=0).max()) * rounding


def _targets(settings: Plan) -> Array:
    """The range wanted, increasing: from each tracked sigma_rel or end to the next, finest beside these."""
    low, high = settings.sigma_rel_range
    knots = [low, *sorted(s for s in settings.sigma_rels if low < s < high), high]
    shares = (1 - np.cos(np.linspace(0, math.pi, _TARGETS_IN_GAP + 1, endpoint=False))) / 2
    return np.concatenate([*(a * (b / a) ** shares for a, b in pairwise(knots)), [high]])


def _mean(errors: Array, places: Array) -> float:
    """The mean of errors over places that need not be evenly spaced."""
    return float(np.average((errors[1:] + errors[:-1]) / 2, weights=np.diff(places)))


def _stops(settings: Plan, kept: Sequence[tuple[int, ...]], times: Array) -> Iterator[tuple[int, ...]]:
    """What is there if the run is stopped in its second half: at a snapshot, right after it and halfway to the next."""
    half = settings.steps / 2
    first = max(sum(ts[-1] < half for ts in kept) - 1, 0)  # the last one in the first half, for the stops after it
    if len(kept) > settings.max_checkpoints:
        chosen = sorted({int(i) for i in np.linspace(first, len(kept) - 1, _NUM_STOPS)})
    else:
        chosen = list(range(first, min(first + 2, len(kept))))  # snapshots that are all kept only grow in number
    for i in chosen:
        if kept[i][-1] >= half:
            yield kept[i]
        between = times[(times > kept[i][-1]) & (times >= half)]
        if i + 1 < len(kept):
            between = between[between < kept[i + 1][-1]]
        for t in {int(t) for t in between[[0, len(between) // 2]]} if len(between) else ():
            yield schedule.snapshots_to_keep((*kept[i], t), settings.sigma_rels, settings.max_checkpoints)


def _kept(taken: Sequence[int], sigma_rels: Sequence[float], most: int) -> Iterator[tuple[int, ...]]:
    """What retention keeps after each snapshot."""
    kept: tuple[int, ...] = ()
    for t in taken:
        kept = schedule.snapshots_to_keep((*kept, t), sigma_rels, most)
        yield kept


def update_times(settings: Plan) -> Array:
    """When averages are updated, float64: at calls that are due if t has grown enough since, and at snapshots."""
    calls, last, times = settings.steps // settings.t_per_call, 0, []
    call, unit = 0, settings.t_per_call
    while call < calls:
        grown = int(last / (1 - schedule.MIN_RELATIVE_DT) / unit)  # about the first call with the least dt
        due = -(-max(grown, call + 1) // settings.update_every) * settings.update_every
        while not schedule.update_is_due(due * unit, last):
            due += settings.update_every
        snapshot = (call // settings.checkpoint_every + 1) * settings.checkpoint_every
        call = min(due, snapshot)
        if call <= calls:
            last = call * unit
            times.append(last)
    return np.array(times or [calls * unit], dtype=np.float64)


def snapshot_bytes(num_parameters: int, num_profiles: int, dtype: str) -> int:
    """Of one snapshot, by all ranks, but for headers, manifests and buffers."""
    return num_parameters * num_profiles * ITEMSIZE[dtype]


def in_percent(share: float) -> str:
    """As in 4.8%, to two digits; 150% above 1, and <0.001% for what is too small to matter."""
    if share < _LEAST_PERCENT:
        return f"<{100 * _LEAST_PERCENT:g}%"
    return f"{100 * share:.2g}%" if share < 0.99 else f"{share:.0%}"  # noqa: PLR2004  two digits would be 1e+02


def in_units(num_bytes: float) -> str:
    """As in 2.5 GB, of 1000^3."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if float(f"{num_bytes:.3g}") < _STEP:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= _STEP
    return f"{num_bytes:.3g} PB"
