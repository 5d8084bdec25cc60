"""Post-hoc EMA for DDP and FSDP: average while you train, choose the averaging length afterwards.

While training, on every rank, and at any time later, on any machine:

    ema = PostHocEMA.from_model(model, "s3://bucket/run")      # on every rank, after wrapping the model
    ema.update_(model)                                         # after each optimizer step
    ema.close()

    with PostHocEMA.from_path("s3://bucket/run").state_dict(sigma_rel=0.15) as state: ...

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phema_dist.ema import PostHocEMA
    from phema_dist.errors import (
        BackgroundError,
        DamagedError,
        LayoutError,
        PhemaError,
        ProfileError,
        RunError,
        SettingsError,
        SnapshotError,
        StorageError,
    )
    from phema_dist.planning import plan
    from phema_dist.prediction import Plan
    from phema_dist.profile import beta_to_sigma_rel, gamma_to_sigma_rel, sigma_rel_to_beta, sigma_rel_to_gamma
    from phema_dist.selection.sweep import Sweep, sweep
    from phema_dist.synthesis.consolidate import Synthesis, synthesize, synthesize_files
    from phema_dist.synthesis.reader import SynthesisReader
    from phema_dist.target import ConstantBeta, Explicit, Power, UniformTail
    from phema_dist.translation import Translation, half_life_to_sigma_rel, sigma_rel_to_half_life, translate

__version__ = "0.1.0"

_HOMES = {
    "BackgroundError": "errors",
    "ConstantBeta": "target",
    "DamagedError": "errors",
    "Explicit": "target",
    "LayoutError": "errors",
    "PhemaError": "errors",
    "Plan": "prediction",
    "PostHocEMA": "ema",
    "Power": "target",
    "ProfileError": "errors",
    "RunError": "errors",
    "SettingsError": "errors",
    "SnapshotError": "errors",
    "StorageError": "errors",
    "Sweep": "selection.sweep",
    "Synthesis": "synthesis.consolidate",
    "SynthesisReader": "synthesis.reader",
    "Translation": "translation",
    "UniformTail": "target",
    "beta_to_sigma_rel": "profile",
    "gamma_to_sigma_rel": "profile",
    "half_life_to_sigma_rel": "translation",
    "plan": "planning",
    "sigma_rel_to_beta": "profile",
    "sigma_rel_to_gamma": "profile",
    "sigma_rel_to_half_life": "translation",
    "sweep": "selection.sweep",
    "synthesize": "synthesis.consolidate",
    "synthesize_files": "synthesis.consolidate",
    "translate": "translation",
}

__all__ = [
    "BackgroundError", "ConstantBeta", "DamagedError", "Explicit", "LayoutError", "PhemaError", "Plan", "PostHocEMA",
    "Power", "ProfileError", "RunError", "SettingsError", "SnapshotError", "StorageError", "Sweep", "Synthesis",
    "SynthesisReader", "Translation", "UniformTail", "beta_to_sigma_rel", "gamma_to_sigma_rel",
    "half_life_to_sigma_rel", "plan", "sigma_rel_to_beta", "sigma_rel_to_gamma", "sigma_rel_to_half_life", "sweep",
    "synthesize", "synthesize_files", "translate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import phema_dist` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(_HOMES)
