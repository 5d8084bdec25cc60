"""The small JSON documents of a run: facts as frozen dataclasses, read strictly.

    run.json                                  RunInfo: what all snapshots of the run have in common
    attempts/0.json                           Attempt: one start of a job on the run
    snapshots/000000001000-a0/rank-…json      Manifest: one rank's part of a snapshot; written last, it makes it exist
    snapshots/000000001000-a0/index.json      Index: all of these in one, later, so that a big run opens quickly

Each document begins with a checksum of its own bytes, as `{"xxh3":"<16 hex digits>",` in front of its first field: the
xxh3-64 of the document as it would be without. One without it was written before there were any, and is read too.

Where the tensors lie in a shard file stands in that file's own safetensors header, and nowhere else; the manifest
holds the header's checksum. Equal headers, and all snapshots of one attempt have equal ones, are read once.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import xxhash

from phema_dist.errors import RunError

FORMAT = 1
RUN_KEY = "run.json"
INDEX_NAME = "index.json"  # inside the snapshot
PARAMETER, BUFFER = "parameter", "buffer"  # kinds of tensors: averaged, or copied
# Dtypes by the names of safetensors, and those of them that averages are made of and stored in. storage.snapshot knows
# what they are in torch; here they are names, because a table of contents is read without torch.
DTYPES = (
    "F64", "F32", "F16", "BF16", "C64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL",
    "F8_E4M3", "F8_E5M2",
)  # fmt: skip
AVERAGED_DTYPES = ("F64", "F32", "F16", "BF16", "C64")
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
BLOCK_BYTES = 4 << 20  # of a checksum: small enough for a ranged read, large enough that manifests stay small

T = TypeVar("T")
_EXACT = 2**53  # integers below are floats too
_SEAL, _SEAL_END = b'{"xxh3":"', b'",'  # around the checksum of a document


class _Rule(NamedTuple):
    """What a value of a field must be beyond its type."""

    words: str
    holds: Callable[[Any], bool]


def _one_of(*names: str) -> _Rule:
    return _Rule(f"be one of {', '.join(names)}", names.__contains__)


_Positive = Annotated[int, _Rule("be at least 1", bool)]
_SigmaRels = Annotated[tuple[float, ...], _Rule("not be empty", bool)]
_Kind = Annotated[str, _one_of(PARAMETER, BUFFER)]
_Dtype = Annotated[str, _one_of(*DTYPES)]
_StoredDtype = Annotated[str, _one_of(*STORED_DTYPES)]


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of the run: shape, dtype in the model (a name of safetensors), PARAMETER or BUFFER."""

    shape: tuple[int, ...]
    dtype: _Dtype
    kind: _Kind


@dataclass(frozen=True)
class RunInfo:
    """What is fixed for a whole run. `origin` is the t at which averaging began; profiles count from there."""

    format: int
    library: str
    sigma_rels: _SigmaRels
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
    world_size: _Positive
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
    world_size: _Positive
    calls: int
    updates: tuple[tuple[int, int], ...]
    dtype: _StoredDtype  # of float32 averages as they are stored here
    block_bytes: _Positive
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
    """Encode a document of this module, with its checksum."""
    text = json.dumps(asdict(facts), separators=(",", ":"), allow_nan=False).encode()  # type: ignore[call-overload]
    return _SEAL + _digest(text) + _SEAL_END + text[1:]


def from_json(kind: type[T], text: bytes, where: str) -> T:
    """Decode a document strictly: every field, of its type, and nothing else.

    Raises:
        RunError: it is no such document, or not as it was written, or of a newer format; names `where` and the field.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} must be JSON; it is damaged: {error}") from error
    if isinstance(value, dict) and isinstance(found := value.get("format"), int) and found > FORMAT:
        raise RunError(f"{where} has format {found}; this phema-dist reads formats up to {FORMAT}. Upgrade phema-dist.")
    if isinstance(value, dict) and "xxh3" in value:
        del value["xxh3"]
        seal, _, rest = text.partition(_SEAL_END)
        if seal != _SEAL + _digest(b"{" + rest):
            raise RunError(f"{where} is not the document that was written (its checksum differs).")
    try:
        return _decoder(kind)(value)  # type: ignore[arg-type, no-any-return]
    except _MisfitError as error:
        problem = f"{error.field.lstrip('.') or 'it'} {error}"
        raise RunError(f"{where} is not a {kind.__name__} of format {FORMAT}: {problem}") from error


def _digest(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()


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
    if origin is Annotated:
        return partial(_ruled, _decoder(args[0]), args[1])
    if origin in {Union, types.UnionType}:
        return partial(_optional, _decoder(args[0]))
    if origin is tuple:
        is_list = args[-1] is ...
        return partial(_list, kind, _decoder(args[0])) if is_list else partial(_row, kind, tuple(map(_decoder, args)))
    if origin is dict:
        return partial(_object, _decoder(args[1]))
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return partial(_facts, kind, {name: _decoder(hint) for name, hint in hints.items()})
    return {float: _float, int: _count}.get(kind) or partial(_plain, kind)


def _ruled(decode: Callable[[Any], Any], rule: _Rule, value: Any) -> Any:
    decoded = decode(value)
    if not rule.holds(decoded):
        raise _MisfitError(f"must {rule.words}, found {str(value)[:40]!r}")
    return decoded


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
