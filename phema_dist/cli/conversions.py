"""A command that translates averaging lengths: `phema convert`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from phema_dist.cli.arguments import number
from phema_dist.errors import SettingsError
from phema_dist.profile import MAX_SIGMA_REL, beta_to_sigma_rel, gamma_to_sigma_rel
from phema_dist.translation import Translation, check_t, half_life_to_beta, half_life_to_sigma_rel, translate

if TYPE_CHECKING:
    from phema_dist.cli.arguments import Commands


def add(commands: Commands) -> None:
    """Add this command."""
    converting = commands.add_parser(
        "convert",
        description="Say an averaging length in the numbers of other libraries and papers. What is constant (a beta, a "
        "half-life in steps) is translated by its mean age at --t.",
        epilog="example: phema convert --sigma-rel 0.10 --t 200000",
    )  # fmt: skip
    given = converting.add_mutually_exclusive_group(required=True)
    given.add_argument("--sigma-rel", type=float, metavar="S", help="width of the profile by t; in EDM2 the EMA length")
    given.add_argument("--gamma", type=float, metavar="G", help="exponent of the profile")
    given.add_argument(
        "--half-life", type=float, metavar="F", help="that is always a share of t: torchtitan's half_life_fraction, "
        "EDM's ema_rampup_ratio",
    )  # fmt: skip
    given.add_argument("--beta", type=float, metavar="B", help="a constant one, per step; torchtitan's decay")
    given.add_argument("--half-life-steps", type=float, metavar="H", help="a constant one, in steps")
    given.add_argument("--half-life-kimg", type=float, metavar="H", help="a constant one, in 1000 images, as in EDM")
    converting.add_argument("--t", type=number, help="length of the training in steps; constant ones need it")
    converting.add_argument("--batch", type=int, metavar="N", help="images in a step, to say half-lives in images too")
    converting.add_argument("--json", action="store_true", help="print JSON, for programs")
    converting.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.batch is not None and arguments.batch < 1:
        raise SettingsError(f"--batch must be at least 1; got {arguments.batch}.")
    said = translate(_sigma_rel(arguments), arguments.t)
    if arguments.json:
        kimg = {} if arguments.batch is None else {"half_life_kimg": _kimg(said, arguments.batch)}
        print(json.dumps(asdict(said) | kimg, indent=2))
        return
    rows = [
        ("sigma_rel", f"{said.sigma_rel:.6g}", "width by t; EDM2's EMA length, its std"),
        ("gamma", f"{said.gamma:.6g}", "exponent of the profile"),
        ("half-life / t", f"{said.half_life_fraction:.6g}", "torchtitan's half_life_fraction, EDM's ema_rampup_ratio"),
        ("mean age / t", f"{said.mean_age_fraction:.6g}", "1 / (gamma + 2)"),
    ]
    if said.t is not None:
        rows += [
            ("half-life", f"{said.half_life:,.6g}", f"steps, at t={said.t:g}"),
            ("mean age", f"{said.mean_age:,.6g}", f"steps, at t={said.t:g}"),
        ]
    if said.t is not None and said.beta is None:
        rows.append(("constant beta", "none", "each has a mean age of at least half a step"))
    elif said.beta is not None:
        rows += [
            ("constant beta", f"{said.beta:.10g}", f"of the same mean age at t={said.t:g}; torchtitan's decay"),
            ("its half-life", f"{said.beta_half_life:,.6g}", "steps"),
        ]
        if arguments.batch is not None:
            rows.append(
                ("its half-life", f"{_kimg(said, arguments.batch):,.6g}", "1000 images; EDM's half-life in kimg")
            )
    width = max(len(value) for _, value, _ in rows)
    for name, value, words in rows:
        print(f"{name:<14} {value:>{width}}  {words}")


def _kimg(said: Translation, batch: int) -> float | None:
    return None if said.beta_half_life is None else said.beta_half_life * batch / 1000


def _sigma_rel(arguments: argparse.Namespace) -> float:
    """What was given, as a sigma_rel."""
    if arguments.sigma_rel is not None:
        if arguments.sigma_rel > MAX_SIGMA_REL + 1e-4:
            raise SettingsError(
                "sigma_rel must lie in (0, 0.28867], as no power profile is wider than the plain mean; got "
                f"{arguments.sigma_rel}."
            )
        return float(arguments.sigma_rel)
    if arguments.gamma is not None:
        return gamma_to_sigma_rel(arguments.gamma)
    if arguments.half_life is not None:
        return half_life_to_sigma_rel(arguments.half_life)
    if arguments.t is None:
        raise SettingsError("--t must say how long the training is, to translate a constant beta or half-life.")
    check_t(arguments.t)
    if arguments.beta is not None:
        return beta_to_sigma_rel(arguments.beta, arguments.t)
    if arguments.half_life_kimg is not None and arguments.batch is None:
        raise SettingsError("--batch must say how many images a step has, to translate a half-life in images.")
    kimg = arguments.half_life_kimg
    return beta_to_sigma_rel(
        half_life_to_beta(arguments.half_life_steps if kimg is None else kimg * 1000 / arguments.batch), arguments.t
    )
