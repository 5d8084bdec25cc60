"""The command line, `phema …`: words in, words out. All work is done elsewhere."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phema_dist.errors import PhemaError
from phema_dist.profile import sigma_rel_to_gamma

if TYPE_CHECKING:
    from phema_dist.storage.run import Run, Snapshot
    from phema_dist.synthesis.consolidate import Progress
    from phema_dist.synthesis.recipe import Recipe

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FILE_NAME = "model.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 after a failure that is told in one line; usage errors exit with 2."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="phema: %(levelname)s: %(message)s")
    try:
        arguments.command(arguments)
    except (PhemaError, OSError, ImportError) as error:
        print(f"phema: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phema", description="Look at the snapshots of a training run, and make averages of any length from them."
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

    making = commands.add_parser(
        "synthesize", help="make averages of any length as safetensors files",
        description="Make averages of one or more lengths, in one pass over the snapshots, each as one checkpoint.",
        epilog="example: phema synthesize runs/digits --sigma-rel 0.10 --sigma-rel 0.15 --out averages/",
    )  # fmt: skip
    _add_run(making)
    making.add_argument(
        "--sigma-rel", type=_sigma_rel, action="append", required=True, metavar="S", dest="sigma_rels",
        help="length of the average as a share of training, in (0, 0.28867]; repeat for several",
    )  # fmt: skip
    making.add_argument(
        "--out", required=True, metavar="FILE.safetensors|DIR",
        help=f"a file for one length; a folder gets {_FILE_NAME}, or sigma_rel-S/{_FILE_NAME} for several lengths",
    )  # fmt: skip
    making.add_argument("--t", type=int, help="end of the average (default: the newest complete snapshot)")
    making.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the parameters (default: fp32)")
    making.add_argument("--force", action="store_true", help="replace files that exist")
    making.set_defaults(command=_synthesize)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="where the run lives: a folder, s3://bucket/run, any fsspec URL")
    parser.add_argument(
        "--storage-options", type=_json_object, metavar="JSON",
        help='for the store, as in \'{"endpoint_url": "https://…"}\'; keys are better left to the environment',
    )  # fmt: skip


def _sigma_rel(text: str) -> float:
    try:
        value = float(text)
        sigma_rel_to_gamma(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _ls(arguments: argparse.Namespace) -> None:
    from phema_dist.storage.run import open_run  # noqa: PLC0415  --help need not wait for torch
    from phema_dist.storage.store import open_store  # noqa: PLC0415

    run = open_run(open_store(arguments.run, arguments.storage_options))
    snapshots = sorted([*run.snapshots, *run.abandoned], key=lambda s: (s.t, s.attempt))
    rows = [_snapshot_facts(run, snapshot) for snapshot in snapshots]
    if arguments.json:
        info = {"url": run.store.url, "sigma_rels": run.info.sigma_rels, "t_unit": run.info.t_unit}
        print(json.dumps({**info, "origin": run.info.origin, "snapshots": rows}, indent=2))
        return
    tracked = ", ".join(f"{s:g}" for s in run.info.sigma_rels)
    print(f"{run.store.url}: sigma_rels {tracked}, {len(run.info.tensors)} tensors, t in {run.info.t_unit}")
    print(f"{'t':>12}  {'attempt':>7}  {'ranks':>5}  {'bytes':>15}  state")
    for row in rows:
        ranks = row["ranks"] or "?"
        print(f"{row['t']:>12}  {row['attempt']:>7}  {ranks:>5}  {row['bytes']:>15,}  {row['state']}")


def _snapshot_facts(run: Run, snapshot: Snapshot) -> dict[str, Any]:
    attempts = {attempt.number: attempt for attempt in run.attempts}
    state = f"incomplete: {snapshot.problem}" if snapshot.problem else "complete"
    if snapshot in run.abandoned:
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


def _synthesize(arguments: argparse.Namespace) -> None:
    import torch  # noqa: PLC0415  --help need not wait for torch

    from phema_dist.synthesis.consolidate import synthesize_files  # noqa: PLC0415

    outputs = _outputs(arguments.out, arguments.sigma_rels)
    with _progress_bar() as progress:
        recipes = synthesize_files(
            arguments.run,
            outputs,
            t=arguments.t,
            storage_options=arguments.storage_options,
            dtype=getattr(torch, _DTYPES[arguments.dtype]),
            overwrite=arguments.force,
            progress=progress,
        )
    for recipe, path in zip(recipes, outputs.values(), strict=True):
        print(_summary(recipe, path))


def _outputs(out: str, sigma_rels: Sequence[float]) -> dict[float, Path]:
    """Where each average goes: a file name means one file, a folder one file per length."""
    if "://" in out:
        raise PhemaError(f"--out must be a local file or folder, to be uploaded from there; got {out}.")
    path, lengths = Path(out), list(dict.fromkeys(sigma_rels))
    if path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        raise PhemaError(f"--out must be a folder or end in .safetensors; got {out}.")
    if path.suffix == ".safetensors" and not path.is_dir():
        if len(lengths) > 1:
            raise PhemaError(f"--out must be a folder for {len(lengths)} lengths; got the file name {out}.")
        return {lengths[0]: path}
    if len(lengths) == 1:
        return {lengths[0]: path / _FILE_NAME}
    return {sigma_rel: path / f"sigma_rel-{sigma_rel!r}" / _FILE_NAME for sigma_rel in lengths}


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar of the bytes read, on a terminal; reading threads move it."""
    from tqdm import tqdm  # noqa: PLC0415

    with tqdm(desc="reading", unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:

        def advance(num_bytes: int, total: int) -> None:
            with bar.get_lock():  # type: ignore[no-untyped-call]
                bar.total = total
                bar.update(num_bytes)

        yield advance


def _summary(recipe: Recipe, path: Path) -> str:
    certificate = recipe.certificate
    return (
        f"{path}: {recipe.target.name} at t={recipe.t}, from snapshots: {certificate.num_snapshots}, "
        f"profile error {certificate.profile_error:.2%}, rounding noise {certificate.rounding_noise:.2%}"
    )
