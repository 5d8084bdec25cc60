"""The command that answers before training: `phema plan`."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from phema_dist import host, planning
from phema_dist.cli.arguments import json_object, size, telling
from phema_dist.prediction import in_percent, in_units
from phema_dist.walk import GOOD_NOISE

if TYPE_CHECKING:
    from phema_dist.cli.arguments import Commands
    from phema_dist.prediction import Plan

_log = logging.getLogger("phema_dist")
_DEFAULT_RANGE = (0.05, 0.28)
_MOST_RANKS_PER_NODE = 8
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_DTYPES = {"fp16": ", checkpoint_dtype=torch.float16", "bf16": ", checkpoint_dtype=torch.bfloat16"}


def add(commands: Commands) -> None:
    """Add this command."""
    planning = commands.add_parser(
        "plan",
        description="Say, before a run begins, what to track, how often to store it and as what, and how exact "
        "averages of any length in a range will then be. Errors are those of averaging profiles, relative.",
        epilog="example: phema plan --steps 500000 --parameters 1.3B --ranks 64 --storage 2TB --sigma-rel 0.05:0.20",
    )  # fmt: skip
    length = planning.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=_count, metavar="N", help="calls of update_ in the run")
    length.add_argument("--samples", type=_count, metavar="N", help="length of the run, if t counts samples")
    planning.add_argument("--batch-size", type=_count, metavar="N", help="samples a step, with --samples")
    parameters = planning.add_mutually_exclusive_group(required=True)
    parameters.add_argument("--parameters", type=_parameters, metavar="N", help="of the model, as in 1.3B or 350M")
    parameters.add_argument(
        "--size-from", metavar="FILE|DIR|RUN",
        help="count them in a .safetensors file, a Hugging Face folder, one of torch.distributed.checkpoint (its "
        ".metadata is a pickle, which can run code: only one that you trust), or a run",
    )  # fmt: skip
    planning.add_argument("--ranks", type=_count, default=1, metavar="N", help="that share the work (default: 1)")
    planning.add_argument(
        "--sigma-rel", type=_range, default=_DEFAULT_RANGE, metavar="LOW:HIGH", dest="sigma_rel_range",
        help="shortest and longest average wanted (default: 0.05:0.28)",
    )  # fmt: skip
    planning.add_argument("--storage", type=size, metavar="SIZE", help="that all snapshots together may take")
    planning.add_argument("--snapshots", type=_count, metavar="N", help="to keep (default: as many as are good)")
    planning.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="of snapshots (default: fp32, if it fits)")
    planning.add_argument("--checkpoint-every", type=_count, metavar="N", help="calls from one snapshot to the next")
    planning.add_argument("--update-every", type=_count, metavar="N", help="calls from one update to the next")
    planning.add_argument("--seconds-per-step", type=float, metavar="S", help="to tell what bandwidth is needed")
    planning.add_argument(
        "--ranks-per-node", type=_count, metavar="N", help="that share a node's memory (default: --ranks, at most 8)"
    )
    planning.add_argument(
        "--node-memory", type=size, metavar="SIZE", help="of a node (default: what this machine gives to a process)"
    )
    planning.add_argument("--plot", type=Path, metavar="FILE", help="draw the error over sigma_rel, as SVG, PNG or PDF")
    planning.add_argument("--json", action="store_true", help="print JSON, for programs")
    planning.add_argument("--storage-options", type=json_object, metavar="JSON", help="for the store of --size-from")
    planning.set_defaults(command=_plan, usage_error=planning.error)


def _count(text: str) -> int:
    """Read a number such as 350M, 1.3B, 5e5 or 20_000."""
    match = re.fullmatch(r"([\d_]+(?:\.\d+)?(?:e\d+)?) ?([kmbgt]?)", text.lower())
    try:
        number = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:  # as in _
        number = 0.0
    if not 0 < number < math.inf or not round(number):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, such as 20000, 350M or 1.3B; got {text}")
    return round(number)


def _parameters(text: str) -> int:
    try:
        return _count(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; for a file use --size-from") from error


def _range(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        return float(low), float(high if colon else low)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be LOW:HIGH, as in 0.05:0.20; got {text}") from error


def _plan(arguments: argparse.Namespace) -> None:
    if bool(arguments.samples) != bool(arguments.batch_size):
        arguments.usage_error("--samples needs --batch-size, and --batch-size --samples")
    if arguments.plot:
        from phema_dist.plot.style import check_suffix  # noqa: PLC0415

        check_suffix(arguments.plot)
    parameters = arguments.parameters
    if parameters is None:
        from phema_dist.sizing import count_parameters  # noqa: PLC0415  --help need not wait for torch

        parameters = count_parameters(arguments.size_from, arguments.storage_options)

    with telling("planning", quiet=arguments.json):
        plan = planning.plan(
            arguments.samples or arguments.steps,
            parameters,
            t_per_call=arguments.batch_size or 1,
            ranks=arguments.ranks,
            sigma_rel_range=arguments.sigma_rel_range,
            storage_bytes=arguments.storage,
            max_checkpoints=arguments.snapshots,
            checkpoint_dtype=arguments.dtype,
            update_every=arguments.update_every,
            checkpoint_every=arguments.checkpoint_every,
            seconds_per_step=arguments.seconds_per_step,
        )
        others = planning.alternatives(plan)
    local_ranks = arguments.ranks_per_node or min(plan.ranks, _MOST_RANKS_PER_NODE)
    limit = (arguments.node_memory, "--node-memory") if arguments.node_memory else host.memory_limit()
    problem = host.shortage(plan.host_bytes_per_rank, local_ranks, limit)
    warnings = [*planning.warnings(plan), *([problem] if problem else [])]
    if arguments.json:
        facts = {"warnings": warnings, "alternatives": {what: other.facts() for what, other in others.items()}}
        print(json.dumps({**plan.facts(), **facts}, indent=2))
    else:
        print("\n".join([*_lines(plan), "", *_table(plan, others, arguments.storage), "", *_code(plan)]))
    for warning in warnings:
        _log.warning("%s", warning)
    if arguments.plot:
        from phema_dist.plot import reconstruction_error_figure, save_figure  # noqa: PLC0415

        save_figure(reconstruction_error_figure(plan.ts, plan.sigma_rels, plan.sigma_rel_range), arguments.plot)


def _lines(plan: Plan) -> list[str]:
    """The plan, a line for each thing that people ask."""
    low, high = plan.sigma_rel_range
    kept = "all kept" if plan.num_taken <= plan.max_checkpoints else f"of {plan.num_taken} taken"
    snapshots = f"{len(plan.ts)} of them at the end ({kept}), {plan.checkpoint_dtype}"
    per = "" if plan.t_per_call == 1 else f" (t grows by {plan.t_per_call} a call)"
    update = f"{in_units(plan.update_bytes_per_rank)} for each rank and update"
    weighed = "" if plan.checkpoint_dtype == "fp32" else ", less where a synthesis knows how far they move"
    facts = {
        "track sigma_rels": ", ".join(f"{s:g}" for s in plan.sigma_rels),
        "a snapshot every": f"{_calls(plan.checkpoint_every)}, {snapshots}",
        "an update every": f"{_calls(plan.update_every)} or 0.01% of t, {plan.num_updates} in all{per}",
        f"error for {low:g} to {high:g}": f"worst {in_percent(plan.worst_error)}, mean {in_percent(plan.mean_error)}",
        "if stopped earlier": f"worst {in_percent(plan.stop_error)}, from half of the run on, at a snapshot or between",
        "rounding": f"changes parameters by {in_percent(plan.rounding_noise)}{weighed}",
        "storage": f"{in_units(plan.bytes_in_all)} in all, {in_units(plan.bytes_per_rank)} by each rank",
        "host memory": f"{in_units(plan.host_bytes_per_rank)} for each rank",
        "host bandwidth": f"{update}{_rate(plan.host_bandwidth)}",
        "upload": f"{in_units(plan.upload_bytes_per_rank)} for each rank and snapshot{_rate(plan.upload_bandwidth)}",
    }
    return [f"{name + ':':<24}{text}" for name, text in facts.items()]


def _table(plan: Plan, others: dict[str, Plan], storage_bytes: int | None) -> list[str]:
    heads = ("", "sigma_rels", "kept", "dtype", "worst", "if stopped", "rounding", "storage", "host memory", "")
    rows = [heads]
    for what, p in {"this plan": plan, **others}.items():
        tracked = ", ".join(f"{s:g}" for s in p.sigma_rels)
        errors = (in_percent(p.worst_error), in_percent(p.stop_error), in_percent(p.rounding_noise))
        sizes = (in_units(p.bytes_in_all), in_units(p.host_bytes_per_rank))
        drawbacks = {
            "above --storage": storage_bytes is not None and p.bytes_in_all > storage_bytes,
            f"error above {planning.GOOD_ERROR:.0%}": p.stop_error > planning.GOOD_ERROR,
            f"rounding above {GOOD_NOISE:.1%}": p.rounding_noise > GOOD_NOISE,
        }
        note = ", ".join(text for text, is_so in drawbacks.items() if is_so)
        rows.append((what, tracked, str(len(p.ts)), p.checkpoint_dtype, *errors, *sizes, note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _code(plan: Plan) -> list[str]:
    """Two lines of Python that do what is planned."""
    t = "" if plan.t_per_call == 1 else ", t=samples_seen"
    unit = "" if plan.t_per_call == 1 else ', t_unit="samples"'
    numbers = ("max_checkpoints", "update_every", "checkpoint_every")
    settings = ", ".join(f"{name}={getattr(plan, name)}" for name in ("sigma_rels", *numbers))
    return [
        f"ema = PostHocEMA.from_model(model, url, {settings}{_DTYPES.get(plan.checkpoint_dtype, '')}{unit})",
        f"ema.update_(model{t})  # after each step",
    ]


def _calls(number: int) -> str:
    return "1 call" if number == 1 else f"{number} calls"


def _rate(bytes_per_second: float | None) -> str:
    return "" if bytes_per_second is None else f", {in_units(bytes_per_second)}/s"
