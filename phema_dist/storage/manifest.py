"""The small JSON documents of a run: facts as frozen dataclasses, read strictly.

    run.json                                  RunInfo: what all snapshots of the run have in common
    attempts/0.json                           Attempt: one start of a job on the run
    snapshots/000000001000-a0/rank-…json      Manifest: one rank's part of a snapshot; written last, it makes it exist
    snapshots/000000001000-a0/index.json      Index: all of these in one, later, so that a big run opens quickly

Where the tensors lie in a shard file stands in that file's own safetensors header, and nowhere else; the manifest
holds the header's checksum. Equal headers, and all snapshots of one attempt have equal ones, are read once.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache, partial
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from phema_dist.errors import RunError

FORMAT = 1
RUN_KEY = "run.json"
INDEX_NAME = "index.json"  # inside the snapshot
PARAMETER, BUFFER = "parameter", "buffer"  # kinds of tensors: averaged, or copied
BLOCK_BYTES = 4 << 20  # of a checksum: small enough for a ranged read, large enough that manifests stay small

T = TypeVar("T")
_EXACT = 2**53  # integers below are floats too


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of the run: shape, dtype in the model (a name of safetensors), PARAMETER or BUFFER."""

    shape: tuple[int, ...]
    dtype: str
    kind: str


@dataclass(frozen=True)
class RunInfo:
    """What is fixed for a whole run. `origin` is the t at which averaging began; profiles count from there."""

    format: int
    library: str
    sigma_rels: tuple[float, ...]
    t_unit: str
    origin: int
    only_save_diff: bool
    tensors: dict[str, TensorFacts]
    aliases: dict[str, str]  # further name of a tied tensor -> the name it is stored under


@dataclass(frozen=True)
class Attempt:
    """One start of a job: it continues `parent` from `t`, or begins the run (parent None, t = 0)."""

    number: int
    parent: int | None
    t: int
    world_size: int
    token: str  # random; manifests repeat it, so files of two jobs never count as one snapshot


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file: a rank's part of one profile. Checksums are xxh3-64 in hex.

    `checksums` holds that of the header (the first `header_bytes` of the file), then those of the data in blocks of
    the manifest's `block_bytes`.
    """

    name: str  # relative to the snapshot
    sigma_rel: float
    header_bytes: int
    data_bytes: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """One rank's part of a snapshot. `refused` says why this rank has nothing to give, instead of files.

    `updates` are the knots of the update history, counted from the origin, in rank 0's manifest only; `calls` counts
    calls of update_.
    """

    format: int
    t: int
    attempt: int
    token: str
    rank: int
    world_size: int
    calls: int
    updates: tuple[tuple[int, int], ...]
    dtype: str  # of float32 averages as they are stored here
    block_bytes: int
    files: tuple[ShardFile, ...]
    refused: str | None = None


@dataclass(frozen=True)
class Index:
    """The manifests of all ranks of a complete snapshot, by rank: a copy, for manifests are what makes it exist."""

    format: int
    manifests: tuple[Manifest, ...]


def attempt_key(number: int) -> str:
    """Where an attempt is recorded."""
    return f"attempts/{number}.json"


def snapshot_folder(t: int, attempt: int) -> str:
    """Where a snapshot lies."""
    return f"snapshots/{t:012d}-a{attempt}"


def manifest_name(rank: int, world_size: int) -> str:
    """The file of a rank's manifest inside the snapshot; it tells how many there must be."""
    return f"rank-{rank:05d}-of-{world_size:05d}.json"


def shard_name(sigma_rel: float, rank: int, number: int = 0) -> str:
    """A file of a rank's part of one profile, inside the snapshot.

    There are several, by `number`, if the part has several boxes of one tensor: a file holds each tensor once.
    """
    return f"sigma_rel-{sigma_rel!r}/rank-{rank:05d}{f'.{number}' if number else ''}.safetensors"


def to_json(facts: object) -> bytes:
    """Encode a document of this module."""
    return json.dumps(asdict(facts), separators=(",", ":"), allow_nan=False).encode()  # type: ignore[call-overload]


def from_json(kind: type[T], text: bytes, where: str) -> T:
    """Decode a document strictly: every field, of its type, and nothing else.

    Raises:
        RunError: it is not such a document, or one of a newer format; names `where` and the field.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} must be JSON; it is damaged: {error}") from error
    if isinstance(value, dict) and isinstance(found := value.get("format"), int) and found > FORMAT:
        raise RunError(f"{where} has format {found}; this phema-dist reads formats up to {FORMAT}. Upgrade phema-dist.")
    try:
        return _decoder(kind)(value)  # type: ignore[arg-type, no-any-return]
    except _MisfitError as error:
        problem = f"{error.field.lstrip('.') or 'it'} {error}"
        raise RunError(f"{where} is not a {kind.__name__} of format {FORMAT}: {problem}") from error


class _MisfitError(Exception):
    """A value that is not what it must be. Decoders on the way out put in front of `field` where it stands."""

    field = ""

    def inside(self, place: str) -> None:
        self.field = f"{place}{self.field}"


# A big run has 65 536 manifests: types are looked at once, and what is left is a tree of plain functions.
@cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    """Return the function that turns parsed JSON into a `kind`, or raises _MisfitError."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in {Union, types.UnionType}:
        return partial(_optional, _decoder(args[0]))
    if origin is tuple and args[-1] is ...:
        return partial(_list, kind, _decoder(args[0]))
    if origin is tuple:
        return partial(_row, kind, tuple(map(_decoder, args)))
    if origin is dict:
        return partial(_object, _decoder(args[1]))
    if is_dataclass(kind):
        return partial(_facts, kind, {name: _decoder(hint) for name, hint in get_type_hints(kind).items()})
    return {float: _float, int: _count}.get(kind) or partial(_plain, kind)


def _optional(decode: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else decode(value)


def _list(kind: Any, decode: Callable[[Any], Any], value: Any) -> Any:
    if type(value) is not list:
        raise _MisfitError(f"must be a list like {kind}")
    return _each((decode,) * len(value), value)


def _row(kind: Any, decoders: tuple[Callable[[Any], Any], ...], value: Any) -> Any:
    if type(value) is not list or len(value) != len(decoders):
        raise _MisfitError(f"must be a list like {kind}")
    return _each(decoders, value)


def _each(decoders: tuple[Callable[[Any], Any], ...], value: list[Any]) -> tuple[Any, ...]:
    decoded: list[Any] = []
    try:
        for decode, item in zip(decoders, value, strict=True):
            decoded.append(decode(item))
    except _MisfitError as error:
        error.inside(f"[{len(decoded)}]")
        raise
    return tuple(decoded)


def _object(decode: Callable[[Any], Any], value: Any) -> Any:
    if type(value) is not dict:
        raise _MisfitError("must be an object")
    decoded, key = {}, ""
    try:
        for key, item in value.items():
            decoded[key] = decode(item)
    except _MisfitError as error:
        error.inside(f"[{key}]")
        raise
    return decoded


def _facts(kind: Any, decoders: dict[str, Callable[[Any], Any]], value: Any) -> Any:
    if type(value) is not dict or value.keys() != decoders.keys():
        odd = sorted(decoders.keys() ^ value.keys()) if type(value) is dict else "no object"
        raise _MisfitError(f"must have exactly the fields of {kind.__name__}; differs in {odd}")
    decoded, name = {}, ""
    try:
        for name, decode in decoders.items():
            decoded[name] = decode(value[name])
    except _MisfitError as error:
        error.inside(f".{name}")
        raise
    return kind(**decoded)


def _float(value: Any) -> Any:
    return float(value) if type(value) is int and abs(value) < _EXACT else _plain(float, value)


def _count(value: Any) -> Any:
    if type(value) is int and value >= 0:
        return value
    raise _MisfitError(f"must not be negative, found {_plain(int, value)}")


def _plain(kind: Any, value: Any) -> Any:
    if type(value) is not kind:
        raise _MisfitError(f"must be {kind.__name__}, found {str(value)[:40]!r}")
    return value
