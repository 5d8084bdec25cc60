"""The small JSON documents of a run: facts as frozen dataclasses, read strictly.

    run.json                                  RunInfo: what all snapshots of the run have in common
    attempts/0.json                           Attempt: one start of a job on the run
    snapshots/000000001000-a0/rank-…json      Manifest: one rank's part of a snapshot; written last, it makes it exist
    snapshots/000000001000-a0/index.json      Index: all of these in one, later, so that a big run opens quickly

Each document begins with a checksum of its own bytes, as `{"xxh3":"<16 hex digits>",` in front of its first field: the
xxh3-64 of the document as it would be without. One without it was written before there were any, and is read too.

Where the tensors lie in a shard file stands in that file's own safetensors header, and nowhere else; the manifest
holds the header's checksum. Equal headers, and all snapshots of one attempt have equal ones, are read once.

A bucket may hold what somebody else put there. So nothing that is read is believed: not its size, not its types, not
that its names fit into a message.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Annotated, TypeVar

import xxhash

from phema_dist.errors import RunError
from phema_dist.storage.document import EXACT, LONGEST_NAME, MisfitError, Rule, decoder, parse_json, shown

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
_MOST_RANKS = 2**20
_MOST_DIMS = 64
_PER_FILE, _PER_TENSOR, _PER_DIM = 1024, 256, 64  # bytes of a header, more than there can be
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+]{0,31}")
_SEAL, _SEAL_END = b'{"xxh3":"', b'",'  # around the checksum of a document


def _one_of(*names: str) -> Rule:
    return Rule(f"be one of {', '.join(names)}", names.__contains__)


_Square = Annotated[float, Rule("not be negative", lambda x: x >= 0)]
_Positive = Annotated[int, Rule("be at least 1", bool)]
_Ranks = Annotated[int, Rule(f"be 1 to {_MOST_RANKS}", lambda n: 1 <= n <= _MOST_RANKS)]
# Two of them are what a reader holds beside its sums. Of a power of two, elements never lie across an end.
_BlockBytes = Annotated[
    int, Rule("be a power of two from 16 to 2**26", lambda n: 2**4 <= n <= 2**26 and not n & (n - 1))
]
_Shape = Annotated[
    tuple[int, ...],
    Rule(
        f"have at most {_MOST_DIMS} dimensions and 2**53 elements",
        lambda shape: len(shape) <= _MOST_DIMS and math.prod(max(n, 1) for n in shape) <= EXACT,
    ),
]
_SigmaRels = Annotated[tuple[float, ...], Rule("not be empty", bool)]
# Names end in messages and logs, so they have no line ends, no control characters and no halves of characters.
_Name = Annotated[
    str,
    Rule(
        f"be at most {LONGEST_NAME} printable characters",
        lambda name: len(name) <= LONGEST_NAME and name.isprintable(),
    ),
]
_Kind = Annotated[str, _one_of(PARAMETER, BUFFER)]
_Dtype = Annotated[str, _one_of(*DTYPES)]
_StoredDtype = Annotated[str, _one_of(*STORED_DTYPES)]


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of the run: shape, dtype in the model (a name of safetensors), PARAMETER or BUFFER."""

    shape: _Shape
    dtype: _Dtype
    kind: _Kind


@dataclass(frozen=True)
class Imported:
    """That another library made the averages, with the beta of one unit of t at each update: `legacy` knows them."""

    library: _Name
    update_every: _Positive


@dataclass(frozen=True)
class RunInfo:
    """What is fixed for a whole run. `origin` is the t at which averaging began; profiles count from there.

    In an `imported` run sigma_rels are what was asked for, and not what the averages are.
    """

    format: _Positive
    library: _Name
    sigma_rels: _SigmaRels
    t_unit: _Name
    origin: int
    only_save_diff: bool
    tensors: dict[_Name, TensorFacts]
    aliases: dict[_Name, _Name]  # further name of a tied tensor -> the name it is stored under
    imported: Imported | None = None  # not in what was written before there was any


@dataclass(frozen=True)
class Attempt:
    """One start of a job: it continues `parent` from `t`, or begins the run (parent None, t = 0)."""

    number: int
    parent: int | None
    t: int
    world_size: _Ranks
    token: _Name  # random; manifests repeat it, so files of two jobs never count as one snapshot


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file: a rank's part of one profile. Checksums are xxh3-64 in hex.

    `checksums` holds that of the header (the first `header_bytes` of the file), then those of the data in blocks of
    the manifest's `block_bytes`.
    """

    name: _Name  # relative to the snapshot
    sigma_rel: float
    header_bytes: int
    data_bytes: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What a rank saw when it took a snapshot: of its own averages, and of its job since it began.

    `squares` sums the squares of the float32 averages of the first tracked profile that this rank stores, `numel` of
    them; `moved` those of their differences to the averages of the last one (0 if only one is tracked): how far
    parameters travel, which is what tells how much an error of a profile changes them. In 16-bit snapshots, tensors
    that are float32 there all the same are left out. `moving_squares` and `moving_moved` sum the mean squares of
    tensors and of their differences, each times what it has of `moved`: so a tensor counts by how much it moves.
    """

    unix_time: float  # when the snapshot was taken
    numel: int
    squares: _Square
    moved: _Square
    lag: int  # the rest as in PostHocEMA.status
    stall_seconds: float
    updates_skipped: int
    updates_refused: int
    snapshots_skipped: int
    snapshots_failed: int
    moving_squares: _Square = 0.0  # 0 in what was written before there were any
    moving_moved: _Square = 0.0


@dataclass(frozen=True)
class Manifest:
    """One rank's part of a snapshot. `refused` says why this rank has nothing to give, instead of files.

    `updates` are the knots of the update history, counted from the origin, in rank 0's manifest only; `calls` counts
    calls of update_.
    """

    format: _Positive
    t: int
    attempt: int
    token: _Name
    rank: int
    world_size: _Ranks
    calls: int
    updates: tuple[tuple[int, int], ...]
    dtype: _StoredDtype  # of float32 averages as they are stored here
    block_bytes: _BlockBytes
    files: tuple[ShardFile, ...]
    refused: str | None = None
    measured: Measured | None = None  # not in what was written before there was any


@dataclass(frozen=True)
class Index:
    """The manifests of all ranks of a complete snapshot, by rank: a copy, for manifests are what makes it exist."""

    format: _Positive
    manifests: tuple[Manifest, ...]


def attempt_key(number: int) -> str:
    """Where an attempt is recorded."""
    return f"attempts/{number}.json"


def pin_key(t: int) -> str:
    """What holds the snapshots at t; it is empty."""
    return f"pins/{t:012d}"


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


def largest_header(run: RunInfo) -> int:
    """How many bytes a header can have whose tensors are all of the run: nobody makes room for more."""
    total = _PER_FILE
    for fqn, facts in run.tensors.items():
        # A name stands there twice, once as JSON in JSON, where a character may take 14.
        plain = fqn.isascii() and not {'"', "\\"} & set(fqn)
        total += 2 * len(fqn) * (1 if plain else 14) + _PER_TENSOR + _PER_DIM * len(facts.shape)
    return total


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
        value = parse_json(text)
    except ValueError as error:
        raise RunError(f"{where} must be JSON; it is damaged: {error}") from error
    if type(value) is dict and type(found := value.get("format")) is int and found > FORMAT:
        raise RunError(
            f"{where} has format {shown(found, quoted=False)}; this phema-dist reads formats up to {FORMAT}. "
            f"Upgrade phema-dist: {_upgrade(value.get('library'))}."
        )
    if type(value) is dict and "xxh3" in value:
        del value["xxh3"]
        seal, _, rest = text.partition(_SEAL_END)
        if seal != _SEAL + _digest(b"{" + rest):
            raise RunError(f"{where} is not the document that was written (its checksum differs).")
    try:
        return decoder(kind)(value)  # type: ignore[arg-type, no-any-return]
    except MisfitError as error:
        problem = f"{error.field.lstrip('.') or 'it'} {error}"
        raise RunError(f"{where} is not a {kind.__name__} of format {FORMAT}: {problem}") from error


def _upgrade(library: object) -> str:
    """What to install to read what a newer library wrote, which may have said which one it was."""
    known = isinstance(library, str) and _VERSION.fullmatch(library)
    return f"pip install 'phema-dist>={library}'" if known else "pip install --upgrade phema-dist"


def _digest(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()
