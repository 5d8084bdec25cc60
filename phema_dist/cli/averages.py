"""Commands that make checkpoints of averages: `phema synthesize`, `consolidate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phema_dist.cli.arguments import add_run, joined_ranks, json_object, number, number_at, opened, progress_bar, size
from phema_dist.errors import SettingsError
from phema_dist.prediction import in_percent
from phema_dist.target import ConstantBeta, Explicit, Power, Target, UniformTail

if TYPE_CHECKING:
    from phema_dist.cli.arguments import Commands

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FILE_NAME = "model.safetensors"
_SUFFIXES = {".safetensors", ".pt"}


def add(commands: Commands) -> None:
    """Add these commands."""
    making = commands.add_parser(
        "synthesize",
        description="Make averages, in one pass over the snapshots, each as one checkpoint. Started by torchrun "
        "(torchrun --nproc-per-node 4 -m phema_dist synthesize ...), all ranks work on it together.",
        epilog="example: phema synthesize runs/digits --sigma-rel 0.10 --sigma-rel 0.15 --out averages/",
    )  # fmt: skip
    add_run(making)
    wanted = making.add_argument_group("averages", "at least one; @T ends it at T instead of --t, as in 0.15@20000")
    wanted.add_argument(
        "--sigma-rel", type=_sigma_rel, action="append", metavar="S[@T]", dest="targets", default=[],
        help="length of the average as a share of training, in (0, 0.28867]; repeat for several",
    )  # fmt: skip
    wanted.add_argument(
        "--beta",
        type=_beta,
        action="append",
        metavar="B[@T]",
        dest="targets",
        help="an EMA of constant beta, unbiased; repeat",
    )
    wanted.add_argument(
        "--beta-every",
        type=number,
        default=1,
        metavar="N",
        help="... updated each N of t (default: 1)",
    )
    wanted.add_argument(
        "--tail", type=_tail, action="append", metavar="FRACTION[@T]", dest="targets",
        help="the plain mean over the last part of training, as in 0.2; repeat",
    )  # fmt: skip
    wanted.add_argument(
        "--coefficients", type=_coefficients, action="append", metavar="JSON", dest="targets",
        help="""a sum of snapshots by their t, as in '{"1000": 0.5, "2000": 0.5}', of the shortest tracked average""",
    )  # fmt: skip
    making.add_argument(
        "--out", required=True, metavar="FILE|DIR",
        help=f"a .safetensors or .pt file for one average; a folder gets {_FILE_NAME}, or sigma_rel-S/{_FILE_NAME} and "
        "so on for several",
    )  # fmt: skip
    making.add_argument("--t", type=int, help="end of the averages (default: the newest complete snapshot)")
    making.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters (default: fp32)")
    _add_form(making)
    making.add_argument(
        "--sharded", action="store_true", help="one file for each rank; join them with phema consolidate, or load the "
        "folder with HuggingFaceStorageReader of torch.distributed.checkpoint",
    )  # fmt: skip
    making.add_argument("--keys", action="append", default=[], metavar="GLOB", help="only these tensors; repeat")
    making.add_argument("--strip-prefix", default="", metavar="P", help="to take off every name")
    making.add_argument("--prefix", default="", metavar="P", help="to put before every name, after that")
    making.add_argument(
        "--memory", type=size, default=size("256MiB"), metavar="SIZE", help="to use at most (default: 256MiB)"
    )
    making.add_argument("--strict", action="store_true", help="refuse a run with snapshots that cannot be used")
    making.set_defaults(command=_synthesize, usage_error=making.error)

    joining = commands.add_parser(
        "consolidate",
        description="Join the files that synthesize --sharded wrote for each rank.",
        epilog="example: phema consolidate sharded/ --out joined.safetensors",
    )  # fmt: skip
    joining.add_argument("folder", type=Path, metavar="DIR", help="that holds rank-*.safetensors")
    joining.add_argument(
        "--out", required=True, metavar="FILE|DIR", help=f"a .safetensors or .pt file; a folder gets {_FILE_NAME}"
    )
    _add_form(joining)
    joining.set_defaults(command=_consolidate)


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=["safetensors", "pt"], help="default: as --out ends, else safetensors")
    parser.add_argument(
        "--max-file-size", type=size, default=size("5GB"), metavar="SIZE",
        help="numbered files and an index instead of a larger one (default: 5GB; of .pt always one)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace what exists; all files are made again")


_sigma_rel = number_at(Power)
_beta = number_at(lambda beta, t: ConstantBeta(beta, t=t))
_tail = number_at(UniformTail)


def _coefficients(text: str) -> Target:
    try:
        return Explicit.of({int(t): float(factor) for t, factor in json_object(text).items()})
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f'must be like {{"1000": 0.5, "2000": 0.5}}: {error}') from error


def _synthesize(arguments: argparse.Namespace) -> None:
    if not arguments.targets:
        arguments.usage_error("what to make must be said: --sigma-rel, --beta, --tail or --coefficients")
    targets = [
        replace(target, every=arguments.beta_every) if isinstance(target, ConstantBeta) else target
        for target in dict.fromkeys(arguments.targets)
    ]
    pickled = _is_pickled(arguments)
    outputs = _outputs(arguments, [target.name for target in targets], pickled)

    import torch  # noqa: PLC0415  --help need not wait for torch

    from phema_dist.synthesis.checkpoint import Form  # noqa: PLC0415
    from phema_dist.synthesis.consolidate import write_checkpoints  # noqa: PLC0415
    from phema_dist.synthesis.request import Request  # noqa: PLC0415

    form = Form(
        getattr(torch, DTYPES[arguments.dtype]),
        arguments.max_file_size,
        arguments.strip_prefix,
        arguments.prefix,
        tuple(arguments.keys),
        arguments.sharded,
        pickled,
    )
    request = Request(tuple(targets), arguments.t, memory_bytes=arguments.memory, strict=arguments.strict)
    store = opened(arguments)
    with joined_ranks() as ranks, progress_bar(ranks) as progress:
        written = write_checkpoints(store, ranks, request, outputs, form, overwrite=arguments.force, progress=progress)
    for checkpoint in written if ranks.rank == 0 else ():
        facts = checkpoint.recipe.describe()
        print(_summary(checkpoint.path, facts, checkpoint.num_files, checkpoint.num_kept))


def _consolidate(arguments: argparse.Namespace) -> None:
    pickled = _is_pickled(arguments)
    (output,) = _outputs(arguments, [""], pickled)

    from phema_dist.synthesis.checkpoint import Form  # noqa: PLC0415
    from phema_dist.synthesis.join import join_shards  # noqa: PLC0415

    form = Form(max_file_bytes=arguments.max_file_size, pickled=pickled)
    with joined_ranks() as ranks, progress_bar(ranks) as progress:
        missing, facts = join_shards(
            ranks, arguments.folder, output, form, overwrite=arguments.force, progress=progress
        )
    if ranks.rank == 0:
        print(_summary(missing.shown, facts, missing.num_files, missing.num_kept))


def _is_pickled(arguments: argparse.Namespace) -> bool:
    suffix = Path(arguments.out).suffix
    if not arguments.out:
        raise SettingsError("--out must name a file or a folder; got nothing.")
    if "://" in arguments.out:
        raise SettingsError(f"--out must be a local file or folder, to be uploaded from there; got {arguments.out}.")
    if suffix in {".pth", ".bin", ".ckpt"}:
        raise SettingsError(f"--out must be a folder or end in .safetensors or .pt; got {arguments.out}.")
    named = suffix.removeprefix(".") if suffix in _SUFFIXES and not Path(arguments.out).is_dir() else None
    if named and arguments.format not in {None, named}:
        raise SettingsError(f"--format {arguments.format} must fit the name of --out; got {arguments.out}.")
    return (arguments.format or named) == "pt"


def _outputs(arguments: argparse.Namespace, names: Sequence[str], pickled: bool) -> list[Path]:
    """Where each average goes: a file name means one file, a folder one file, or folder, for each."""
    path, sharded = Path(arguments.out), getattr(arguments, "sharded", False)
    if len(set(names)) < len(names):
        raise SettingsError(f"each average must have a name of its own; got {', '.join(names)}. Make them one by one.")
    if sharded and pickled:
        raise SettingsError("--sharded must have --format safetensors; phema consolidate --format pt joins it to .pt.")
    is_file = path.suffix in _SUFFIXES and not path.is_dir()
    if is_file and (sharded or len(names) > 1):
        what = "--sharded" if sharded else f"{len(names)} averages"
        raise SettingsError(f"--out must be a folder for {what}; got the file name {path}.")
    if is_file:
        return [path]
    folders = [path / name for name in names] if len(names) > 1 else [path]
    return folders if sharded else [folder / ("model.pt" if pickled else _FILE_NAME) for folder in folders]


def _summary(path: Path, facts: Mapping[str, Any], num_files: int, num_kept: int) -> str:
    certificate = facts["certificate"]
    files = f" in {num_files} files" if num_files > 1 else ""
    kept = f"; {num_kept} of them were there already" if num_kept else ""
    off, movement = (certificate.get(name) for name in ("parameter_error", "movement"))  # shards may be older
    expected = ""
    if off is not None and movement is not None:
        moves = f"averaging moves them by about {in_percent(movement)}"
        expected = f"; parameters are off by about {in_percent(off)}, and {moves}"
    return (
        f"{path}: {facts['target']} at t={facts['t']}{files}, from snapshots: {certificate['num_snapshots']}, "
        f"profile error {in_percent(certificate['profile_error'])}, "
        f"rounding noise {in_percent(certificate['rounding_noise'])}{expected}"
        f"{'; it was there already' if num_kept == num_files else kept}"
    )
