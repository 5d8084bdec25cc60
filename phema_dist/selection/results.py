"""What a sweep has measured: in memory, as sweep.json, and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from phema_dist.errors import SettingsError
from phema_dist.prediction import in_percent
from phema_dist.storage.manifest import from_json
from phema_dist.synthesis.files import write_file

_REST = ("t", "evaluate", "dtype")  # of a Subject


@dataclass(frozen=True)
class Point:
    """One average and what it is worth. The first metric decides; one that is not finite is None and never wins.

    `problem` says why there are no metrics; `kept` that its checkpoint stays where it is.
    """

    sigma_rel: float
    metrics: dict[str, float | None]
    profile_error: float
    rounding_noise: float
    problem: str = ""
    kept: bool = False

    @property
    def value(self) -> float:
        """The metric that decides; NaN if there is none."""
        first = next(iter(self.metrics.values()), None)
        return math.nan if first is None else first


@dataclass(frozen=True)
class Subject:
    """What must be the same for two measured values to be comparable."""

    run: str  # the token of the attempt that wrote its end: a run is the same wherever it lies
    t: int
    evaluate: str  # the command, or the name of the callable
    dtype: str  # of the checkpoints


@dataclass(frozen=True)
class Results:
    """All that was measured, by sigma_rel. `url` is where the run was.

    `making` are those whose checkpoints wait, `old_best` marks a best checkpoint of another sweep that may be replaced.
    """

    format: int
    url: str
    subject: Subject
    maximize: bool
    points: tuple[Point, ...] = field(default=())
    making: tuple[float, ...] = ()
    old_best: str = ""

    def point(self, sigma_rel: float) -> Point | None:
        """What was found for a sigma_rel, if it was tried."""
        return next((point for point in self.points if point.sigma_rel == sigma_rel), None)

    def measured(self, sigma_rel: float) -> bool:
        """Whether there is nothing to do for it; what failed is tried again."""
        point = self.point(sigma_rel)
        return point is not None and not point.problem

    def loss(self, sigma_rel: float) -> float:
        """What is to be low: inf where there is nothing."""
        point = self.point(sigma_rel)
        if point is None or math.isnan(point.value):
            return math.inf
        return -point.value if self.maximize else point.value

    @property
    def best(self) -> Point | None:
        """The point with the best metric; of equal ones the shortest average."""
        found = min(self.points, key=lambda point: self.loss(point.sigma_rel), default=None)
        return found if found and self.loss(found.sigma_rel) < math.inf else None

    def with_point(self, point: Point) -> Results:
        """The same with one more, in its place."""
        others = [old for old in self.points if old.sigma_rel != point.sigma_rel]
        return replace(self, points=tuple(sorted([*others, point], key=lambda p: p.sigma_rel)))

    def require(self, subject: Subject, url: str, folder: Path) -> None:
        """Raise SettingsError, naming what differs, unless these are results of that subject."""
        urls = (self.url, url) if self.url != url else ("what was there before", "made anew")
        pairs = [("run", urls), *((name, (getattr(self.subject, name), getattr(subject, name))) for name in _REST)]
        same = {"run": self.subject.run == subject.run} | {name: old == new for name, (old, new) in pairs[1:]}
        different = [f"{name} ({old}, now {new})" for name, (old, new) in pairs if not same[name]]
        if different:
            raise SettingsError(
                f"{folder} holds a sweep of another {', '.join(different)}. Choose another --out, or begin anew there "
                "with --force."
            )


def load_results(path: Path) -> Results | None:
    """Read sweep.json; None if it is not there. Raises RunError if it is something else."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    return from_json(Results, text, str(path))


def save_results(results: Results, path: Path) -> None:
    """Write sweep.json: the whole old one or the whole new one is there, whatever happens."""
    write_file(path, json.dumps(asdict(results), indent=2, allow_nan=False).encode() + b"\n", replace=True)


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """As JSON has them."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def table(results: Results) -> str:
    """All points as Markdown, the best one marked."""
    names = list(dict.fromkeys(name for point in results.points for name in point.metrics))
    head = ["sigma_rel", *names, "profile error", "note"]
    lines = [head, ["---"] * len(head)]
    for point in results.points:
        values = [_number(point, name) for name in names]
        note = "**best**" if point is results.best else point.problem.replace("|", "\\|")
        lines.append([f"{point.sigma_rel:g}", *values, in_percent(point.profile_error), note])
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _number(point: Point, name: str) -> str:
    if name not in point.metrics:
        return ""
    value = point.metrics[name]
    return "not finite" if value is None else f"{value:.4g}"
