"""The small JSON documents of a run: facts as frozen dataclasses, read strictly.

    run.json                                  RunInfo: what all snapshots of the run have in common
    attempts/0.json                           Attempt: one start of a job on the run
    snapshots/000000001000-a0/rank-…json      Manifest: one rank's part of a snapshot; written last, it makes it exist

Where the tensors lie in a shard file stands in that file's own safetensors header, and nowhere else; the manifest
holds the header's checksum. Equal headers, and all snapshots of one attempt have equal ones, are read once.
"""

from __future__ import annotations

import json
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from phema_dist.errors import RunError

FORMAT = 1
RUN_KEY = "run.json"
PARAMETER, BUFFER = "parameter", "buffer"  # kinds of tensors: averaged, or copied
BLOCK_BYTES = 4 << 20  # of a checksum: small enough for a ranged read, large enough that manifests stay small

T = TypeVar("T")


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
        return _decode(kind, value, "")  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise RunError(f"{where} is not a {kind.__name__} of format {FORMAT}: {error}") from error


def _decode(kind: Any, value: Any, field: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in {Union, types.UnionType}:
        return None if value is None else _decode(args[0], value, field)
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not ... and len(value) != len(args)):
            raise TypeError(f"{field} must be a list like {kind}")
        kinds = args if args[-1] is not ... else args[:1] * len(value)
        return tuple(_decode(k, v, f"{field}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{field} must be an object")
        return {key: _decode(args[1], v, f"{field}[{key}]") for key, v in value.items()}
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, field)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{field} must be {kind.__name__}, found {str(value)[:40]!r}")
    if kind is int and value < 0:
        raise ValueError(f"{field} must not be negative, found {value}")
    return value


def _decode_dataclass(kind: Any, value: Any, field: str) -> Any:
    names = {f.name for f in fields(kind)}
    if not isinstance(value, dict) or value.keys() != names:
        odd = sorted(names ^ value.keys()) if isinstance(value, dict) else "no object"
        raise TypeError(f"{field or 'it'} must have exactly the fields of {kind.__name__}; differs in {odd}")
    hints = get_type_hints(kind)
    return kind(**{name: _decode(hints[name], value[name], f"{field}.{name}".lstrip(".")) for name in names})
