"""The command line, `phema …`: words in, words out. All work is done elsewhere."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phema_dist.errors import PhemaError
from phema_dist.target import ConstantBeta, Explicit, Power, Target, UniformTail

if TYPE_CHECKING:
    from phema_dist.ranks import Ranks
    from phema_dist.storage.store import Store
    from phema_dist.synthesis.consolidate import Progress

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FILE_NAME = "model.safetensors"
_SUFFIXES = {".safetensors", ".pt"}
_SECONDS_TO_TELL = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 after a failure, told in a line, or damage; usage errors exit with 2."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="phema: %(levelname)s: %(message)s")
    try:
        code: int | None = arguments.command(arguments)
    except (PhemaError, OSError, ImportError) as error:
        print(f"phema: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phema", description="Look after the snapshots of a training run, and make averages of any length of them."
    )
    parser.add_argument("--version", action="version", version=f"phema-dist {version('phema-dist')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "ls", help="list the snapshots of a run", epilog="example: phema ls s3://bucket/run",
        description="List the snapshots of a run: t, whether complete and if not why, size.",
    )  # fmt: skip
    _add_run(listing)
    listing.add_argument("--json", action="store_true", help="print JSON, for programs")
    listing.set_defaults(command=_ls)

    checking = commands.add_parser(
        "verify", help="read everything, and name what is wrong", epilog="example: phema verify s3://bucket/run",
        description="Read every byte of a run and compare it with what was written. Damage is named, and makes the "
        "exit code 1; what is incomplete is noted. A job may write meanwhile.",
    )  # fmt: skip
    _add_run(checking)
    checking.add_argument("--json", action="store_true", help="print JSON, for programs")
    checking.set_defaults(command=_verify)

    removing = commands.add_parser(
        "gc", help="remove what is dead", epilog="example: phema gc s3://bucket/run --dry-run",
        description="Remove what nobody will finish (parts of snapshots, puts that were cut off), and snapshots that "
        "were given up and that the run has gone beyond. Never pins, the newest complete snapshot, what a job writes.",
    )  # fmt: skip
    _add_run(removing)
    removing.add_argument("--abandoned", action="store_true", help="all snapshots that were given up (hidden in ls)")
    removing.add_argument(
        "--keep", type=int, metavar="N", help="of complete snapshots the N that serve all lengths best"
    )
    removing.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    removing.set_defaults(command=_gc)

    making = commands.add_parser(
        "synthesize", help="make averages of any length as checkpoint files",
        description="Make averages, in one pass over the snapshots, each as one checkpoint. Started by torchrun "
        "(torchrun --nproc-per-node 4 -m phema_dist synthesize ...), all ranks work on it together.",
        epilog="example: phema synthesize runs/digits --sigma-rel 0.10 --sigma-rel 0.15 --out averages/",
    )  # fmt: skip
    _add_run(making)
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
        type=_number,
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
    making.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the parameters (default: fp32)")
    _add_form(making)
    making.add_argument(
        "--sharded", action="store_true", help="one file for each rank; join them with phema consolidate, or load the "
        "folder with HuggingFaceStorageReader of torch.distributed.checkpoint",
    )  # fmt: skip
    making.add_argument("--keys", action="append", default=[], metavar="GLOB", help="only these tensors; repeat")
    making.add_argument("--strip-prefix", default="", metavar="P", help="to take off every name")
    making.add_argument("--prefix", default="", metavar="P", help="to put before every name, after that")
    making.add_argument(
        "--memory", type=_size, default=_size("256MiB"), metavar="SIZE", help="to use at most (default: 256MiB)"
    )
    making.add_argument("--strict", action="store_true", help="refuse a run with snapshots that cannot be used")
    making.set_defaults(command=_synthesize, usage_error=making.error)

    joining = commands.add_parser(
        "consolidate", help="join what synthesize --sharded wrote",
        description="Join the files that synthesize --sharded wrote for each rank.",
        epilog="example: phema consolidate sharded/ --out joined.safetensors",
    )  # fmt: skip
    joining.add_argument("folder", type=Path, metavar="DIR", help="that holds rank-*.safetensors")
    joining.add_argument(
        "--out", required=True, metavar="FILE|DIR", help=f"a .safetensors or .pt file; a folder gets {_FILE_NAME}"
    )
    _add_form(joining)
    joining.set_defaults(command=_consolidate)
    return parser


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=["safetensors", "pt"], help="default: as --out ends, else safetensors")
    parser.add_argument(
        "--max-file-size", type=_size, default=_size("5GB"), metavar="SIZE",
        help="numbered files and an index instead of a larger one (default: 5GB; of .pt always one)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace what exists; all files are made again")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="where the run lives: a folder, s3://bucket/run, any fsspec URL")
    parser.add_argument(
        "--storage-options", type=_json_object, metavar="JSON",
        help='for the store, as in \'{"endpoint_url": "https://…"}\'; keys are better left to the environment',
    )  # fmt: skip


def _checked(make: Callable[[float, int | None], Target]) -> Callable[[str], Target]:
    """How to read NUMBER[@T]."""

    def read(text: str) -> Target:
        number, at, t = text.partition("@")
        try:
            value, end = float(number), int(t) if at else None
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be a number, or NUMBER@T with a whole T; got {text}") from error
        try:
            return make(value, end)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


_sigma_rel = _checked(Power)
_beta = _checked(lambda beta, t: ConstantBeta(beta, t=t))
_tail = _checked(UniformTail)


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value  # as it is shown in names


def _coefficients(text: str) -> Target:
    try:
        return Explicit.of({int(t): float(factor) for t, factor in _json_object(text).items()})
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f'must be like {{"1000": 0.5, "2000": 0.5}}: {error}') from error


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt]i?)?b)?", text.lower())
    num_bytes = 0
    if match:
        unit = match[2] or ""
        num_bytes = int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** " kmgt".index(unit[:1] or " "))
    if not num_bytes:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB, 5GiB or a number of bytes; got {text}")
    return num_bytes


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _ls(arguments: argparse.Namespace) -> None:
    from phema_dist import report  # noqa: PLC0415  --help need not wait for torch
    from phema_dist.storage.run import open_run  # noqa: PLC0415

    run = open_run(_open(arguments))
    print(json.dumps(report.listing_facts(run), indent=2) if arguments.json else report.listing(run))


def _verify(arguments: argparse.Namespace) -> int:
    from phema_dist import report  # noqa: PLC0415
    from phema_dist.storage.verify import verify  # noqa: PLC0415

    store = _open(arguments)
    with _progress_bar() as progress:
        verdict = verify(store, progress)
    print(
        json.dumps({"url": store.url, **asdict(verdict)}, indent=2)
        if arguments.json
        else report.verdict(store, verdict)
    )
    return 1 if verdict.problems else 0


def _gc(arguments: argparse.Namespace) -> None:
    from phema_dist import report  # noqa: PLC0415
    from phema_dist.storage.gc import collect_garbage  # noqa: PLC0415

    store, removed = _open(arguments), []
    for garbage in collect_garbage(
        store, keep=arguments.keep, abandoned=arguments.abandoned, dry_run=arguments.dry_run
    ):
        removed.append(garbage)
        print(report.removal(garbage), flush=True)
    print(report.removals(store, removed, dry_run=arguments.dry_run))


def _open(arguments: argparse.Namespace) -> Store:
    from phema_dist.storage.store import open_store  # noqa: PLC0415

    return open_store(arguments.run, arguments.storage_options)


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
        getattr(torch, _DTYPES[arguments.dtype]),
        arguments.max_file_size,
        arguments.strip_prefix,
        arguments.prefix,
        tuple(arguments.keys),
        arguments.sharded,
        pickled,
    )
    request = Request(tuple(targets), arguments.t, memory_bytes=arguments.memory, strict=arguments.strict)
    store = _open(arguments)
    with _ranks() as ranks, _progress_bar(ranks) as progress:
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
    with _ranks() as ranks, _progress_bar(ranks) as progress:
        missing, facts = join_shards(
            ranks, arguments.folder, output, form, overwrite=arguments.force, progress=progress
        )
    if ranks.rank == 0:
        print(_summary(missing.shown, facts, missing.num_files, missing.num_kept))


def _is_pickled(arguments: argparse.Namespace) -> bool:
    suffix = Path(arguments.out).suffix
    if not arguments.out:
        raise PhemaError("--out must name a file or a folder; got nothing.")
    if "://" in arguments.out:
        raise PhemaError(f"--out must be a local file or folder, to be uploaded from there; got {arguments.out}.")
    if suffix in {".pth", ".bin", ".ckpt"}:
        raise PhemaError(f"--out must be a folder or end in .safetensors or .pt; got {arguments.out}.")
    named = suffix.removeprefix(".") if suffix in _SUFFIXES and not Path(arguments.out).is_dir() else None
    if named and arguments.format not in {None, named}:
        raise PhemaError(f"--format {arguments.format} must fit the name of --out; got {arguments.out}.")
    return (arguments.format or named) == "pt"


def _outputs(arguments: argparse.Namespace, names: Sequence[str], pickled: bool) -> list[Path]:
    """Where each average goes: a file name means one file, a folder one file, or folder, for each."""
    path, sharded = Path(arguments.out), getattr(arguments, "sharded", False)
    if len(set(names)) < len(names):
        raise PhemaError(f"each average must have a name of its own; got {', '.join(names)}. Make them one by one.")
    if sharded and pickled:
        raise PhemaError("--sharded must have --format safetensors; phema consolidate --format pt joins them to a .pt.")
    is_file = path.suffix in _SUFFIXES and not path.is_dir()
    if is_file and (sharded or len(names) > 1):
        what = "--sharded" if sharded else f"{len(names)} averages"
        raise PhemaError(f"--out must be a folder for {what}; got the file name {path}.")
    if is_file:
        return [path]
    folders = [path / name for name in names] if len(names) > 1 else [path]
    return folders if sharded else [folder / ("model.pt" if pickled else _FILE_NAME) for folder in folders]


@contextmanager
def _ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started. Only rank 0 speaks: an error that stops one rank stops all, and it tells it."""
    from phema_dist.ranks import launched  # noqa: PLC0415  --help need not wait for torch

    logger = logging.getLogger("phema_dist")
    level = logger.level
    with launched() as ranks:
        try:
            if ranks.rank:
                logger.setLevel(logging.CRITICAL)
            yield ranks
        except PhemaError as error:
            if ranks.rank:
                time.sleep(_SECONDS_TO_TELL)  # torchrun ends the others as soon as one fails
                raise SystemExit(1) from error
            raise
        finally:
            logger.setLevel(level)


@contextmanager
def _progress_bar(ranks: Ranks | None = None) -> Iterator[Progress]:
    """A bar of the bytes read, on rank 0's terminal; reading threads move it."""
    from tqdm import tqdm  # noqa: PLC0415

    disable = True if ranks and ranks.rank else None
    with tqdm(desc="reading", unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=disable) as bar:

        def advance(num_bytes: int, total: int) -> None:
            with bar.get_lock():  # type: ignore[no-untyped-call]
                bar.total = total
                bar.update(num_bytes)

        yield advance


def _summary(path: Path, facts: Mapping[str, Any], num_files: int, num_kept: int) -> str:
    certificate = facts["certificate"]
    files = f" in {num_files} files" if num_files > 1 else ""
    kept = f"; {num_kept} of them were there already" if num_kept else ""
    return (
        f"{path}: {facts['target']} at t={facts['t']}{files}, from snapshots: {certificate['num_snapshots']}, "
        f"profile error {certificate['profile_error']:.2%}, rounding noise {certificate['rounding_noise']:.2%}"
        f"{'; it was there already' if num_kept == num_files else kept}"
    )
