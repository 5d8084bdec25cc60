"""JSON that nobody vouches for, decoded strictly into frozen dataclasses; generic, it knows no document of a run.

Whatever is wrong is told in a few words that fit into a line, without the value if that is long.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

EXACT = 2**53  # integers below are floats too, and sums and products of a few of them fit into 64 bits
LONGEST_NAME = 1000
# Lists and objects of a few characters take thirty times as much memory as text, and seconds; real ones have many more.
_FEW_PARTS, _PART_CHARACTERS = 100_000, 16
_SHOWN = 40  # characters of a value, in a message
_MOST_NAMED = 5


class Rule(NamedTuple):
    """What a value of a field must be beyond its type."""

    words: str
    holds: Callable[[Any], bool]


def parse_json(text: bytes | str) -> Any:
    """Parse JSON as the standard has it: in UTF-8, without NaN, and no name twice in an object.

    Raises:
        ValueError: it is none; says why in a few words.
    """
    text = text.decode() if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > _FEW_PARTS + len(text) // _PART_CHARACTERS:
        raise ValueError("it consists of far more lists and objects than any of ours")
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def one_line(text: str) -> str:
    """Text of unknown origin for a message: a line of moderate length."""
    text = " ".join(text[:LONGEST_NAME].split())
    return text if text.isprintable() else ascii(text)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has {shown(name)} twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_object_of, parse_constant=_no_constant)


class MisfitError(Exception):
    """A value that is not what it must be. Decoders on the way out put in front of `field` where it stands."""

    field = ""

    def inside(self, place: str) -> None:
        """Say what the value was a part of."""
        self.field = f"{place}{self.field}"


# A big run has 65 536 manifests: types are looked at once, and what is left is a tree of plain functions.
@cache
def decoder(kind: Any) -> Callable[[Any], Any]:
    """Return the function that turns parsed JSON into a `kind`, or raises MisfitError."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return partial(_ruled, decoder(args[0]), args[1])
    if origin in {Union, types.UnionType}:
        return partial(_optional, decoder(args[0]))
    if origin is tuple:
        is_list = args[-1] is ...
        return partial(_list, kind, decoder(args[0])) if is_list else partial(_row, kind, tuple(map(decoder, args)))
    if origin is dict:
        return partial(_object, decoder(args[0]), decoder(args[1]))
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        later = {field.name for field in fields(kind) if field.default is not MISSING}
        return partial(_facts, kind, {name: decoder(hint) for name, hint in hints.items()}, later)
    return {float: _float, int: _count}.get(kind) or partial(_plain, kind)


def _ruled(decode: Callable[[Any], Any], rule: Rule, value: Any) -> Any:
    decoded = decode(value)
    if not rule.holds(decoded):
        raise MisfitError(f"must {rule.words}, found {shown(value)}")
    return decoded


def _optional(decode: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else decode(value)


def _list(kind: Any, decode: Callable[[Any], Any], value: Any) -> Any:
    if type(value) is not list:
        raise MisfitError(f"must be a list like {kind}")
    return _each((decode,) * len(value), value)


def _row(kind: Any, decoders: tuple[Callable[[Any], Any], ...], value: Any) -> Any:
    if type(value) is not list or len(value) != len(decoders):
        raise MisfitError(f"must be a list like {kind}")
    return _each(decoders, value)


def _each(decoders: tuple[Callable[[Any], Any], ...], value: list[Any]) -> tuple[Any, ...]:
    decoded: list[Any] = []
    try:
        for decode, item in zip(decoders, value, strict=True):
            decoded.append(decode(item))
    except MisfitError as error:
        error.inside(f"[{len(decoded)}]")
        raise
    return tuple(decoded)


def _object(decode_key: Callable[[Any], Any], decode: Callable[[Any], Any], value: Any) -> Any:
    if type(value) is not dict:
        raise MisfitError("must be an object")
    decoded, key = {}, ""
    for key in value:
        try:
            decode_key(key)
        except MisfitError as error:
            raise MisfitError(f"must have other names: one {error}") from error
    try:
        for key, item in value.items():
            decoded[key] = decode(item)
    except MisfitError as error:
        error.inside(f"[{key}]")
        raise
    return decoded


def _facts(kind: Any, decoders: dict[str, Callable[[Any], Any]], later: AbstractSet[str], value: Any) -> Any:
    """Decode a dataclass; fields of `later`, which have a default, may be absent: older writers did not know them."""
    if type(value) is not dict or (value.keys() != decoders.keys() and (value.keys() ^ decoders.keys()) - later):
        odd = sorted((decoders.keys() ^ value.keys()) - later) if type(value) is dict else []
        names = f"[{', '.join(map(shown, odd[:_MOST_NAMED]))}]" if odd else "no object"
        raise MisfitError(f"must have exactly the fields of {kind.__name__}; differs in {names}")
    decoded, name = {}, ""
    try:
        for name, decode in decoders.items():
            if name in value:
                decoded[name] = decode(value[name])
    except MisfitError as error:
        error.inside(f".{name}")
        raise
    return kind(**decoded)


def _float(value: Any) -> Any:
    number = float(value) if type(value) is int and abs(value) < EXACT else _plain(float, value)
    if not math.isfinite(number):
        raise MisfitError(f"must be finite, found {number}")
    return number


def _count(value: Any) -> Any:
    if type(value) is int and 0 <= value < EXACT:
        return value
    must = "be below 2**53" if _plain(int, value) > 0 else "not be negative"
    raise MisfitError(f"must {must}, found {shown(value, quoted=False)}")


def _plain(kind: Any, value: Any) -> Any:
    if type(value) is not kind:
        raise MisfitError(f"must be {kind.__name__}, found {shown(value)}")
    return value


def counts(name: str, values: object) -> tuple[int, ...]:
    """Whole numbers as they stand in a header, where true is no 1 and 2.0 is no 2. Raises ValueError."""
    if type(values) is not list or not all(type(value) is int and 0 <= value < EXACT for value in values):
        raise ValueError(f"{shown(name)} has numbers that are none, negative or too large")
    return tuple(values)


def shown(value: Any, *, quoted: bool = True) -> str:
    """A value for a message: short, on one line, and whatever it is."""
    if isinstance(value, list | tuple | dict):
        return "an object" if isinstance(value, dict) else "a list"
    text = str(value)[:_SHOWN]
    return ascii(text) if quoted else text
