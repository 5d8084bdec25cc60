"""What a user may choose, checked before anything is read or written."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from phema_dist.errors import SettingsError
from phema_dist.prediction import Plan
from phema_dist.profile import sigma_rel_to_gamma
from phema_dist.schedule import check_retention

DEFAULT_SIGMA_RELS = (0.05, 0.28)
_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLANNED_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """The arguments of PostHocEMA's constructors, checked."""

    max_checkpoints: int = 20
    sigma_rels: tuple[float, ...] | None = None
    update_every: int = 10
    checkpoint_every: int = 1000
    checkpoint_dtype: torch.dtype | None = None
    only_save_diff: bool = False
    update_after_step: int = 0
    t_unit: str = "steps"
    on_error: str = "warn"  # or "raise"
    on_busy: str = "wait"  # or "skip"
    drain_on_sigterm: bool = False
    prefix: str = ""  # this rank's own
    retention: str = "best"  # or "last"

    def __post_init__(self) -> None:
        least = {"max_checkpoints": 1, "update_every": 1, "checkpoint_every": 1, "update_after_step": 0}
        for name, smallest in least.items():
            if not isinstance(value := getattr(self, name), int) or value < smallest:
                raise SettingsError(f"{name} must be an integer of at least {smallest}; got {value!r}.")
        for name, known in (("on_error", ("warn", "raise")), ("on_busy", ("wait", "skip"))):
            if (choice := getattr(self, name)) not in known:
                raise SettingsError(f"{name} must be one of {known}; got {choice!r}.")
        check_retention(self.retention)
        if not isinstance(self.drain_on_sigterm, bool):
            raise SettingsError(f"drain_on_sigterm must be True or False; got {self.drain_on_sigterm!r}.")
        if self.sigma_rels is not None:
            if not self.sigma_rels or len(set(self.sigma_rels)) != len(self.sigma_rels):
                raise SettingsError(f"sigma_rels must be one or more different numbers; got {self.sigma_rels}.")
            for sigma_rel in self.sigma_rels:
                sigma_rel_to_gamma(sigma_rel)  # raises ProfileError
        if self.checkpoint_dtype not in {None, *_STORED_DTYPES}:
            names = ", ".join(map(str, _STORED_DTYPES))
            raise SettingsError(f"checkpoint_dtype must be None or one of {names}; got {self.checkpoint_dtype}.")


def planned(settings: Settings, plan: Plan | None) -> Settings:
    """The settings with what a plan says; what is still the default counts as not chosen.

    Raises:
        SettingsError: it is no plan, or something was chosen that is not the plan's; names it.
    """
    if plan is None:
        return settings
    if not isinstance(plan, Plan):
        raise SettingsError(f"plan must be what phema_dist.plan returns; got {type(plan).__name__}: pass it unchanged.")
    wanted: dict[str, Any] = {
        "max_checkpoints": plan.max_checkpoints,
        "sigma_rels": plan.sigma_rels,
        "update_every": plan.update_every,
        "checkpoint_every": plan.checkpoint_every,
        "checkpoint_dtype": _PLANNED_DTYPES[plan.checkpoint_dtype],
    }
    defaults = {field.name: field.default for field in fields(Settings)}
    for name, value in wanted.items():
        given = getattr(settings, name)
        same = sorted(given) == sorted(plan.sigma_rels) if name == "sigma_rels" and given else given == value
        same = same or (name == "checkpoint_dtype" and {given, value} == {None, torch.float32})
        if not same and given != defaults[name]:
            raise SettingsError(f"{name} must be the plan's, {value}, or be left out; got {given}.")
    return replace(settings, **wanted)


def integer(t: int) -> int:
    """A t as an int; numpy's and torch's integers too. Raises SettingsError."""
    try:
        return operator.index(t)
    except TypeError as error:
        raise SettingsError(f"t must be an integer, in steps, samples or whatever grows; got {t!r}.") from error


def floats(sigma_rels: Sequence[float] | None) -> tuple[float, ...] | None:
    """Some sigma_rels as a tuple. Raises SettingsError."""
    try:
        return None if sigma_rels is None else tuple(map(float, sigma_rels))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"sigma_rels must be a sequence of numbers; got {sigma_rels!r}.") from error


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a synthesis may add in. Raises SettingsError."""
    if dtype not in {torch.float32, torch.float64}:
        raise SettingsError(f"calculation_dtype must be float32 or float64; got {dtype}.")
    return dtype


def check_resume(resume: bool | int) -> bool | int:
    """Raise SettingsError unless it is True, False, or a t."""
    if isinstance(resume, bool):
        return resume
    if integer(resume) < 0:
        raise SettingsError(f"resume must be True, False, or the t where the model is; got {resume!r}.")
    return integer(resume)
