"""What a bucket may hold that others can write to: refused fast, in bounded memory, in one line, and nothing is run.

A snapshot that is not right is left out; only run.json and the records of attempts can make a run unreadable.
"""

import copy
import json
import logging
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from conftest import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import ADMIN, READER, S3Server
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from phema_dist import PostHocEMA, SynthesisReader
from phema_dist.cli import main
from phema_dist.errors import LayoutError, PhemaError, RunError, SnapshotError
from phema_dist.ranks import ALONE
from phema_dist.shard import Box
from phema_dist.storage import completeness
from phema_dist.storage import run as runs
from phema_dist.storage.manifest import (
    BLOCK_BYTES,
    Index,
    Manifest,
    RunInfo,
    ShardFile,
    TensorFacts,
    attempt_key,
    from_json,
    largest_header,
    manifest_name,
    to_json,
)
from phema_dist.storage.run import create_run, delete_snapshot, load_snapshots, newest_attempt, open_run
from phema_dist.storage.snapshot import Image, encode_header, parse_header
from phema_dist.storage.store import open_store
from phema_dist.storage.verify import verify
from phema_dist.synthesis.consolidate import empty_state, fill_states
from phema_dist.synthesis.join import open_shards
from phema_dist.synthesis.recipe import stored_recipe
from phema_dist.synthesis.request import Request, fulfil
from phema_dist.target import Power

RUN = Path(__file__).parent / "fixtures/format-1/run"  # 2 ranks, 2 attempts, snapshots at t = 2, 4, 6
FOLDERS = ["snapshots/000000000002-a0", "snapshots/000000000004-a0", "snapshots/000000000006-a1"]
MIDDLE = FOLDERS[1]
MANIFEST = f"{MIDDLE}/{manifest_name(1, 2)}"
INDEX = f"{MIDDLE}/index.json"
SHARD = f"{MIDDLE}/sigma_rel-0.05/rank-00001.safetensors"
SECONDS = 20  # much more than anything here takes: a bound against hangs
Files = dict[str, bytes]


@dataclass
class Memory:
    """A store that others have written to."""

    files: Mapping[str, bytes]
    sizes: Mapping[str, int] | None = None  # that the listing tells, if they are others
    url: str = "bucket"
    read_concurrency: int = 1

    def describe(self, key: str = "") -> str:
        return f"{self.url}/{key}"

    def list(self, prefix: str = "") -> dict[str, int]:
        found = {key: len(data) for key, data in self.files.items()} | dict(self.sizes or {})
        return {key: size for key, size in sorted(found.items()) if key.startswith(f"{prefix}/" if prefix else "")}

    def get(self, key: str) -> bytes:
        return self.files[key]

    def get_many(self, keys: Any, *, absent_ok: bool = False) -> Files:
        return {key: self.files[key] for key in keys if key in self.files or not absent_ok}

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        assert start >= 0
        data = self.files[key][start : start + len(buffer)]
        assert len(data) == len(buffer)
        buffer[:] = data


@cache
def original() -> Files:
    return {str(path.relative_to(RUN)): path.read_bytes() for path in sorted(RUN.rglob("*")) if path.is_file()}


def document(files: Mapping[str, bytes], key: str) -> Any:
    """What a document says, without its checksum."""
    value = json.loads(files[key])
    value.pop("xxh3", None)
    return value


def sealed(value: object) -> bytes:
    """As whoever forges a document would write it: the checksum is right."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return b'{"xxh3":"' + xxhash.xxh3_64_hexdigest(text).encode() + b'",' + text[1:] if text[:2] == b'{"' else text


def with_value(key: str, path: Sequence[str | int], value: object) -> Files:
    """The run with one value of a document changed, and no index that could stand in for a manifest."""
    whole = document(original(), key)
    inside = whole
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = value
    return without_index({**original(), key: sealed(whole)}, key)


def without_index(files: Files, key: str) -> Files:
    return {k: data for k, data in files.items() if k != INDEX or key == INDEX}


def with_header(change: Callable[[dict[str, Any]], object] | bytes, length: int | None = None) -> Files:
    """The run with another header of one shard, and a manifest that vouches for it."""
    files = original()
    old = files[SHARD]
    (size,) = struct.unpack_from("<Q", old)
    if isinstance(change, bytes):
        text = change
    else:
        table = json.loads(old[8 : 8 + size])
        replaced = change(table)
        text = json.dumps(replaced if isinstance(replaced, list | str | int) else table).encode()
    header = struct.pack("<Q", len(text) if length is None else length) + text
    manifest = document(files, MANIFEST)
    (file,) = (file for file in manifest["files"] if file["name"] == SHARD.removeprefix(f"{MIDDLE}/"))
    file["checksums"][0], file["header_bytes"] = xxhash.xxh3_64_hexdigest(header), len(header)
    return without_index({**files, SHARD: header + old[8 + size :], MANIFEST: sealed(manifest)}, SHARD)


def offsets_of(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """A change of what stands in DCP_SHARDING_INFO."""

    def apply(table: dict[str, Any]) -> None:
        info = json.loads(table["__metadata__"]["DCP_SHARDING_INFO"])
        change(info)
        table["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)

    return apply


Outcome = tuple[list[int], list[dict[str, Any]]]


def read_all(store: Any) -> Outcome:
    """What everything comes to: the complete snapshots, and some averages of them."""
    states: list[dict[str, torch.Tensor]] = []

    def make(info: RunInfo, recipes: Any) -> None:
        states[:] = [empty_state(info) for _ in recipes]
        Request(()).stream(store, info, recipes, fill_states(states))

    recipes = fulfil(store, ALONE, Request((Power(0.05), Power(0.15))), make)
    used = sorted({term.snapshot.t for recipe in recipes for term in recipe.terms})
    return used, [{name: values.tolist() for name, values in state.items()} for state in states]


def outcome(store: Any) -> Outcome | str:
    """The same, or the one line that an error is."""
    try:
        return read_all(store)
    except PhemaError as error:
        return one_line(str(error))


def one_line(text: str) -> str:
    assert text.isprintable(), text
    assert len(text) < 3000, text
    return text


@cache
def whole_run() -> Outcome:
    return read_all(Memory(original()))


@cache
def without(folder: str) -> Outcome:
    return read_all(Memory({key: data for key, data in original().items() if not key.startswith(f"{folder}/")}))


DEEP = b"[" * 100_000
NOT_DOCUMENTS = {
    "nothing": b"",
    "pickle": pickle.dumps({"format": 1}),
    "deep": DEEP,
    "deep inside": b'{"format":1,"token":' + DEEP + b"]" * 100_000 + b"}",
    "NaN": b'{"format":NaN}',
    "Infinity": b'{"format":1,"t":-Infinity}',
    "not UTF-8": b'{"format":1,"token":"\xff\xfe"}',
    "UTF-16": '{"format":1}'.encode("utf-16"),
    "a surrogate in UTF-8": b'{"format":1,"token":"\xed\xa0\x80"}',
    "twice": b'{"format":1,"format":1}',
    "twice, a long one": b'{"' + b"\\n" * 100_000 + b'":1,"' + b"\\n" * 100_000 + b'":1}',
    "digits": b'{"format":' + b"9" * 5000 + b"}",
    "a huge format": b'{"format":' + b"9" * 4000 + b"}",
    "many fields": b"{" + b",".join(b'"x%d\\n":1' % i for i in range(100_000)) + b"}",
    "a list": b"[1]",
    "a safetensors file": struct.pack("<Q", 2) + b"{}",
}
NUMBERS = [-1, 2**53, 2**63, 10**30, 1.5, True, None, "1", [], [[1]], {"a": 1}]


@pytest.mark.parametrize("text", NOT_DOCUMENTS.values(), ids=NOT_DOCUMENTS)
def test_what_is_no_document_is_refused_where_it_stands(text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    for key in ("run.json", attempt_key(0)):
        with pytest.raises(RunError, match=f"^bucket/{key}") as caught:
            open_run(Memory({**original(), key: text}))
        one_line(str(caught.value))
    manifest = Memory(without_index({**original(), MANIFEST: text}, MANIFEST))
    (problem,) = (s.problem for s in open_run(manifest).snapshots if s.problem)
    assert one_line(problem).startswith(f"bucket/{MANIFEST}")
    assert open_run(Memory({**original(), INDEX: text})).complete == open_run(Memory(original())).complete
    assert f"{MIDDLE}: its index is not used" in one_line(caplog.messages[-1])


def is_left_out(files: Files, reason: str = "") -> None:
    """Of a run with one snapshot that is wrong: the others are as they were, and the reason is one line."""
    begin = time.monotonic()
    run = open_run(Memory(files))
    found = [s.problem for s in run.snapshots if s.folder == MIDDLE]
    assert [s.folder for s in run.complete if s.folder != MIDDLE] == [FOLDERS[0], FOLDERS[2]]
    assert read_all(Memory(files)) == without(MIDDLE)
    with pytest.raises(PhemaError) as caught:  # one who was told that it is whole
        load_and_read(files)
    assert time.monotonic() - begin < SECONDS
    assert re.search(reason, one_line(str(found[0] or caught.value)))
    one_line(str(caught.value))


def load_and_read(files: Files) -> None:
    """Read one snapshot that somebody else has found complete, as ranks do."""
    store = Memory(files)
    info = open_run(store).info
    snapshot = load_snapshots(store, [MIDDLE])[MIDDLE]
    states = [empty_state(info)]
    recipes = [stored_recipe(snapshot, 0.05)]
    Request(()).stream(store, info, recipes, fill_states(states))


FILE = ("files", 0)
MANIFESTS = {
    **{f"{name}={number!r}": ((name,), number, name) for name in ("t", "attempt", "rank", "world_size", "block_bytes")
       for number in NUMBERS},
    **{f"{name}={number!r}": ((*FILE, name), number, name) for name in ("header_bytes", "data_bytes")
       for number in NUMBERS},
    "a huge header": ((*FILE, "header_bytes"), 2**40, "a header of 1099511627776 bytes, and 64 to [0-9]+ are possible"),
    "a tiny header": ((*FILE, "header_bytes"), 8, "a header of 8 bytes"),
    "huge data": ((*FILE, "data_bytes"), 2**50, "has 2 checksums instead of"),
    "tiny blocks": (("block_bytes",), 1, "block_bytes must be a power of two from 16 to"),
    "huge blocks": (("block_bytes",), 2**52, "block_bytes must be a power of two"),
    "odd blocks": (("block_bytes",), 3 << 20, "block_bytes must be a power of two"),
    "other blocks": (("block_bytes",), 2**21, "rank 1 has other blocks than rank 0"),
    "another world": (("world_size",), 3, "written by another job"),
    "traversal": ((*FILE, "name"), "../../attempts/0.json", r"rank 1 must have .*; found '../../attempts/0.json'"),
    "absolute": ((*FILE, "name"), "/etc/passwd", "rank 1 must have sigma_rel-0.05/rank-00001"),
    "another snapshot": ((*FILE, "name"), "../000000000002-a0/sigma_rel-0.05/rank-00001.safetensors", "must have"),
    "of another rank": ((*FILE, "name"), "sigma_rel-0.05/rank-00000.safetensors", "must have"),
    "lines in a name": ((*FILE, "name"), "a\nb\x1b[2J", r"name must be .* printable .*found 'a\\n"),
    "half a character": ((*FILE, "name"), "\ud800", "printable"),
    "a long name": ((*FILE, "name"), "x" * 10**6, "1000 printable characters"),
    "an odd sigma_rel": ((*FILE, "sigma_rel"), 0.1, "sigma_rel 0.1, which the run does not track"),
    "a huge sigma_rel": ((*FILE, "sigma_rel"), 1e308 * 10, "JSON"),
    "no checksums": ((*FILE, "checksums"), [], "0 checksums instead of"),
    "many checksums": ((*FILE, "checksums"), ["0"] * 100_000, "100000 checksums instead of 2"),
    "no files": (("files",), [], "every element of .* must be held"),
    "a file twice": (("files",), document(original(), MANIFEST)["files"][:1] * 2, r"must have .*rank-00001\.1\."),
    "ten thousand files": (("files",), document(original(), MANIFEST)["files"] * 5000, "must have"),
    "lines in a reason": (("refused",), "x\ny\x1b[2J\ud800" * 1000, "nothing to give"),
    "another token": (("token",), "x", "written by another job"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "reason"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_cannot_be_costs_its_snapshot(path: Sequence[str | int], value: object, reason: str) -> None:
    is_left_out(with_value(MANIFEST, path, value), reason)


@pytest.mark.parametrize(
    ("updates", "reason"),
    [
        ([], "ends at t=0 instead of 4"),
        ([[4, 10**12]], "cannot have 1000000000000 updates from t=0 to 4"),
        ([[4, 0]], "cannot have 0 updates"),
        ([[3, 1], [3, 1], [4, 1]], "cannot have 1 updates from t=3 to 3"),
        ([[3, 3]], "ends at t=3 instead of 4"),
        ([[2**52, 2**52]], f"ends at t={2**52} instead of 4"),
        ([[2**53, 1]], "must be below"),
    ],
)
def test_a_history_that_cannot_be_costs_its_snapshot(updates: object, reason: str) -> None:
    is_left_out(with_value(f"{MIDDLE}/{manifest_name(0, 2)}", ("updates",), updates), reason)


def change(name: str, **facts: object) -> Callable[[dict[str, Any]], object]:
    return lambda table: table[name].update(facts)


def first(table: dict[str, Any]) -> str:
    return next(name for name, facts in table.items() if name != "__metadata__" and facts["data_offsets"][1] > 4)


def entry(**facts: object) -> Callable[[dict[str, Any]], object]:
    return lambda table: table[first(table)].update(facts)


HEADERS: dict[str, Any] = {
    **{f"a shape with {number!r}": entry(shape=[number]) for number in NUMBERS},
    **{f"offsets with {number!r}": entry(data_offsets=[number, 4]) for number in NUMBERS},
    "a product that overflows": entry(shape=[2**32, 2**32, 2**32]),
    "many dimensions": entry(shape=[1] * 100_000),
    "data outside": entry(data_offsets=[0, 2**40]),
    "data backwards": entry(data_offsets=[8, 4]),
    "an unknown dtype": entry(dtype="F4"),
    "a dtype that is a list": entry(dtype=["F32"]),
    "another dtype": entry(dtype="I32"),
    "complex": entry(dtype="C64"),
    "a further fact": entry(pickle="gASVAAAA"),
    "no dtype": lambda table: table[first(table)].pop("dtype"),
    "an unknown tensor": lambda table: table.update(ghost=table.pop(first(table))),
    "one with lines in its name": lambda table: table.update({"a\nb\x1b": {}}),
    "one that is not there": lambda table: table.pop(first(table)),
    "no metadata": lambda table: table.pop("__metadata__"),
    "metadata that are a list": lambda table: table.update(__metadata__=[]),
    "a list": lambda table: [1],
    "a string": lambda table: "table",
    "a number": lambda table: 5,
    "no offsets": lambda table: table["__metadata__"].pop("DCP_SHARDING_INFO"),
    "offsets that are a list": lambda table: table["__metadata__"].update(DCP_SHARDING_INFO="[]"),
    "offsets that are no JSON": lambda table: table["__metadata__"].update(DCP_SHARDING_INFO="{"),
    "offsets that are none": lambda table: table["__metadata__"].update(DCP_SHARDING_INFO=None),
    "offsets of others": offsets_of(lambda info: info.update(ghost={"saved_offsets": [0]})),
    "no offset": offsets_of(lambda info: next(iter(info.values())).update(saved_offsets=[])),
    "offsets outside": offsets_of(lambda info: [one.update(saved_offsets=[2**52] * 2) for one in info.values()]),
    "offsets below": offsets_of(lambda info: [one.update(saved_offsets=[-1] * 2) for one in info.values()]),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_cannot_be_costs_its_snapshot(change: Callable[[dict[str, Any]], object]) -> None:
    is_left_out(with_header(change))


@pytest.mark.parametrize("text", NOT_DOCUMENTS.values(), ids=NOT_DOCUMENTS)
def test_what_is_no_header_costs_its_snapshot(text: bytes) -> None:
    is_left_out(with_header(text + b" " * 64))


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 1])
def test_a_header_of_another_length_than_it_says_costs_its_snapshot(length: int) -> None:
    is_left_out(with_header(lambda table: None, length), "length is another")


def test_tensors_that_overlap_or_are_there_twice_cost_their_snapshot() -> None:
    def overlap(table: dict[str, Any]) -> None:
        a, b = [name for name in table if name != "__metadata__"][:2]
        table[b] = {**table[b], "data_offsets": table[a]["data_offsets"]}

    is_left_out(with_header(overlap))
    header = original()[SHARD]
    (size,) = struct.unpack_from("<Q", header)
    text = header[8 : 8 + size].rstrip()
    name = first(json.loads(text))
    is_left_out(with_header(text[:-1] + b',"%s":%s}' % (name.encode(), b"{}")), "twice")


def test_elements_that_lie_across_the_ends_of_others_are_refused() -> None:
    """A view of bytes as floats begins at a multiple of a float."""
    facts = {"a": TensorFacts((3,), "U8", "buffer"), "b": TensorFacts((1,), "F32", "parameter")}
    info = RunInfo(1, "", (0.05,), "", 0, only_save_diff=False, tensors=facts, aliases={})
    header = encode_header({
        "__metadata__": {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [0]} for name in facts})},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [3, 7]},
    })  # fmt: skip
    file = ShardFile("x", 0.05, len(header), 7, (xxhash.xxh3_64_hexdigest(header),))
    with pytest.raises(SnapshotError, match="b begins at byte 3, which no element of 4 bytes does"):
        parse_header(header, file, info, "there")


def test_a_header_that_another_file_vouches_for_is_not_taken_for_it() -> None:
    """Equal headers are read once: a manifest that names the checksum of another one must not pass its data."""
    files = original()
    manifest = document(files, MANIFEST)
    small, _ = sorted(manifest["files"], key=lambda file: file["sigma_rel"])
    shorter = files[SHARD][:-16]
    small["data_bytes"] -= 16
    small["checksums"][1] = xxhash.xxh3_64_hexdigest(shorter[small["header_bytes"] :])
    files = {**files, SHARD: shorter, MANIFEST: sealed(manifest)}
    is_left_out(without_index(files, MANIFEST))


INFOS = {
    **{f"origin={number!r}": (("origin",), number) for number in NUMBERS},
    **{f"format={number!r}": (("format",), number) for number in [*NUMBERS, 0]},
    **{f"a shape of {number!r}": (("tensors", "scale", "shape"), [number]) for number in NUMBERS if number != 10},
    "a shape that overflows": (("tensors", "scale", "shape"), [2**32, 2**32]),
    "an empty one that overflows": (("tensors", "none", "shape"), [2**52, 2**52, 0]),
    "many dimensions": (("tensors", "scale", "shape"), [1] * 100),
    "a tensor of terabytes": (("tensors", "scale", "shape"), [2**45]),
    "lines in a name": (("tensors", "a\nb"), {"shape": [1], "dtype": "F32", "kind": "parameter"}),
    "terminal control in a name": (("tensors", "\x1b[2J"), {"shape": [1], "dtype": "F32", "kind": "parameter"}),
    "half a character in a name": (("tensors", "\ud800"), {"shape": [1], "dtype": "F32", "kind": "parameter"}),
    "a name of a megabyte": (("tensors", "x" * 10**6), {"shape": [1], "dtype": "F32", "kind": "parameter"}),
    "lines in an alias": (("aliases", "a\nb"), "scale"),
    "an alias that is a tensor": (("aliases", "gain"), "scale"),
    "an alias of itself": (("aliases", "ghost"), "ghost"),
    "lines in a unit": (("t_unit",), "a\nb"),
    "a sigma_rel that is none": (("sigma_rels",), [0.05, 0.4]),
    "a tiny sigma_rel": (("sigma_rels",), [1e-300]),
    "a sigma_rel twice": (("sigma_rels",), [0.05, 0.05]),
    "no number": (("sigma_rels",), [float("inf")]),
    "many sigma_rels": (("sigma_rels",), [0.05 + i / 10**7 for i in range(100_000)]),
}


@pytest.mark.parametrize(("path", "value"), INFOS.values(), ids=INFOS)
def test_a_run_that_cannot_be_is_refused_in_one_line(path: Sequence[str | int], value: object) -> None:
    begin = time.monotonic()
    said = outcome(Memory(with_value("run.json", path, value)))
    assert isinstance(said, str)
    assert "bucket" in said
    assert time.monotonic() - begin < SECONDS


def test_a_model_that_nobody_could_read_again_is_refused_before_training(tmp_path: Path) -> None:
    facts = TensorFacts((1,), "F32", "parameter")
    for name in ("a\nb", "\ud800", "x" * 1001):
        info = RunInfo(1, "0.1.0", (0.05,), "steps", 0, only_save_diff=False, tensors={name: facts}, aliases={})
        with pytest.raises(LayoutError, match=r"cannot be stored so that it is read again.*printable"):
            create_run(open_store(tmp_path), info)
    assert not list(tmp_path.iterdir())


def attempts(**facts: object) -> Files:
    value = {"number": 1, "parent": 0, "t": 4, "world_size": 2, "token": "x", **facts}
    return {**original(), attempt_key(1): sealed(value)}


@pytest.mark.parametrize("name", ["number", "parent", "t", "world_size"])
@pytest.mark.parametrize("number", [number for number in NUMBERS if number is not None], ids=repr)
def test_a_record_of_an_attempt_that_cannot_be_is_refused(name: str, number: object) -> None:
    with pytest.raises(RunError, match=r"^bucket/attempts/1\.json") as caught:
        open_run(Memory(attempts(**{name: number})))
    one_line(str(caught.value))


def test_a_world_size_costs_nothing_to_claim() -> None:
    begin = time.monotonic()
    (problem,) = (s.problem for s in open_run(Memory(attempts(world_size=2**20))).snapshots if s.problem)
    assert problem == "manifests of ranks 0, 1, 2, 3, 4, 5, 6, 7, … of 1048576 are missing"
    with pytest.raises(RunError, match="world_size must be 1 to 1048576, found '1000000000'"):
        open_run(Memory(attempts(world_size=10**9)))
    assert time.monotonic() - begin < SECONDS


def test_a_huge_record_of_an_attempt_is_not_read_by_a_job_that_looks_for_others() -> None:
    key = attempt_key(7)
    with pytest.raises(RunError, match=f"bucket/{key} must have at most [0-9]+ bytes"):
        newest_attempt(Memory(original(), {key: 2**40}))


def test_why_a_rank_has_nothing_to_give_is_one_line() -> None:
    files = with_value(MANIFEST, ["refused"], "a\nb\x1b[31m" * 1000)
    (note,) = verify(Memory(files)).notes
    assert "rank 1 had nothing to give" in one_line(note.text)


def test_parents_may_form_a_loop() -> None:
    files = attempts(parent=1)
    assert [s.t for s in open_run(Memory(files)).abandoned] == [2, 4]
    value = {"number": 0, "parent": 1, "t": 4, "world_size": 2, "token": "x"}
    assert open_run(Memory({**attempts(parent=0), attempt_key(0): sealed(value)})).attempts


ODD_KEYS = [
    f"snapshots/{10**30}-a0/rank-00000-of-00001.json",
    f"snapshots/{'9' * 5000}-a0/index.json",
    f"snapshots/000000000004-a{'9' * 5000}/index.json",
    "snapshots/4-a0/index.json",
    "snapshots/0000000000004-a0/index.json",
    "snapshots/٠٠٠٠٠٠٠٠٠٠٠٤-a0/index.json",
    "snapshots/000000000004-a00/index.json",
    f"attempts/{'9' * 5000}.json",
    "attempts/00.json",
    "attempts/٣.json",
    "attempts/../attempts/0.json",
    f"pins/{'9' * 5000}",
    "pins/٣",
    f"{MIDDLE}/../../run.json",
    f"{MIDDLE}//x",
    f"{MIDDLE}/.hidden/x.json",
    "a\nb",
    "",
]


def test_what_has_no_name_of_ours_is_not_of_the_run() -> None:
    files = original() | dict.fromkeys(ODD_KEYS, b"\x80\x04K\x01.")
    assert read_all(Memory(files)) == whole_run()
    run = open_run(Memory(files))
    assert (run.pins, run.next_attempt) == ({4}, 2)


def test_a_snapshot_is_deleted_whatever_lies_beside_it(tmp_path: Path) -> None:
    removed: list[str] = []
    store = open_store(tmp_path)

    class Deleting(Memory):
        def delete(self, keys: Any) -> None:
            asked = list(keys)
            store.delete(asked)  # it takes only what is a key
            removed.extend(asked)

    delete_snapshot(Deleting(original() | dict.fromkeys(ODD_KEYS, b"")), MIDDLE)  # type: ignore[arg-type]
    assert set(removed) == {key for key in original() if key.startswith(f"{MIDDLE}/")}


def test_millions_of_keys_are_bounded_by_their_listing() -> None:
    begin = time.monotonic()
    many = {f"attempts/{i}.json": 100 for i in range(2, 1_000_000)}
    with pytest.raises(RunError, match="must have at most 100000 attempts; it has 1000000"):
        open_run(Memory(original(), many))
    pins = {f"pins/{i}": 0 for i in range(300_000)}
    folders = {f"snapshots/{t:012d}-a0/x": 1 for t in range(10, 50_000)}
    run = open_run(Memory(original(), pins | folders))
    assert len(run.pins) == 300_000
    assert [s.t for s in run.complete] == [2, 4, 6]
    broken = {key: data for key, data in original().items() if "manifest" not in key and "of-0000" not in key}
    with pytest.raises(RunError, match="no complete snapshot") as caught:
        open_run(Memory(broken, {f"snapshots/{t:012d}-a1/x": 1 for t in range(10, 50_000)})).require_newest()
    one_line(str(caught.value))
    assert time.monotonic() - begin < 3 * SECONDS


@pytest.mark.parametrize("key", ["run.json", attempt_key(0), MANIFEST, INDEX])
def test_a_huge_object_is_not_read(key: str, caplog: pytest.LogCaptureFixture) -> None:
    class Watching(Memory):
        def get_many(self, keys: Any, *, absent_ok: bool = False) -> Files:
            asked = list(keys)
            assert key not in asked
            return super().get_many(asked, absent_ok=absent_ok)

    files = original() if key == INDEX else without_index(original(), key)
    store = Watching(files, {key: 2**40})
    if key in {"run.json", attempt_key(0)}:
        with pytest.raises(RunError, match=f"bucket/{key} must have at most [0-9]+ bytes .* it has {2**40}"):
            open_run(store)
        return
    run = open_run(store)
    assert [s.t for s in run.complete] == ([2, 4, 6] if key == INDEX else [2, 6])
    if key == INDEX:
        assert f"{MIDDLE}: its index is not used" in caplog.text
    (problem,) = verify(store).problems
    assert problem.key == key
    assert f"{key} must have at most" in problem.text


def test_documents_of_a_big_run_are_within_the_limits() -> None:
    """1024 ranks, 5000 tensors, a trillion parameters in float32: with much room left."""
    name = "model.decoder.layers.{}.block_sparse_moe.experts.gate_and_up_projection.weight"
    tensors = {name.format(i): TensorFacts((65536, 4096), "F32", "parameter") for i in range(5000)}
    info = RunInfo(1, "0.1.0", (0.05, 0.28), "steps", 0, only_save_diff=False, tensors=tensors, aliases={})
    assert len(to_json(info)) < runs._LARGEST_INFO / 20
    data_bytes = 4 * 10**12 // 1024
    checksums = ("0" * 16,) * (1 + -(-data_bytes // BLOCK_BYTES))
    files = tuple(
        ShardFile(f"sigma_rel-{s}/rank-00000.safetensors", s, 10**6, data_bytes, checksums) for s in (0.05, 1)
    )
    history = tuple((10**6 + i, 1) for i in range(4096))
    manifest = Manifest(1, 10**9, 0, "x" * 16, 1023, 1024, 10**6, history, "F32", BLOCK_BYTES, files)
    assert len(to_json(manifest)) < completeness.LARGEST_MANIFEST / 20
    assert len(to_json(Index(1, (manifest,)))) * 1024 < 2 * completeness.LARGEST_INDEX  # with 1024 histories, not one
    odd = {**tensors, 'ä"\\' * 100: TensorFacts((2**20, 1, 1, 1), "F32", "buffer")}
    boxes = [(fqn, torch.bfloat16, Box((0,) * len(facts.shape), (0, *facts.shape[1:]))) for fqn, facts in odd.items()]
    allowed = largest_header(RunInfo(**{**info.__dict__, "tensors": odd}))
    assert Image(boxes).header_bytes < allowed < 3 * Image(boxes).header_bytes


# Chance. What is changed without a right checksum is noticed, or makes no difference; what is forged with one is at
# worst another run.

DOCUMENTS = ["run.json", attempt_key(0), attempt_key(1), MANIFEST, f"{MIDDLE}/{manifest_name(0, 2)}", INDEX]
CHANCE = settings(max_examples=100, deadline=None, derandomize=True)
ODD_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([2**53, 2**63, 10**30, 10**400, -(10**30)]),
    st.floats(), st.text(max_size=5), st.sampled_from(["", "a\nb", "\ud800", "../x", "F32", "x" * 2000]),
    st.just([]), st.just({}), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Everything inside of a JSON value that can be changed: what holds it, and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def change_something(data: st.DataObject, value: Any) -> None:
    inside, key = data.draw(st.sampled_from(places(value)))
    how = data.draw(st.sampled_from(["set", "delete", "copy", "nudge", "rename"]))
    if how == "delete":
        del inside[key]
    elif how == "copy":
        inside[key] = copy.deepcopy(data.draw(st.sampled_from([other[k] for other, k in places(value)])))
    elif how == "nudge" and type(inside[key]) in {int, float}:
        inside[key] += data.draw(st.sampled_from([-1, 1, 7, 0.5]))
    elif how == "rename" and isinstance(inside, dict):
        inside[data.draw(st.text(max_size=4))] = inside.pop(key)
    elif how == "set":
        inside[key] = data.draw(ODD_VALUES)


def spliced(data: st.DataObject, text: bytes) -> bytes:
    start, stop = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
    how = data.draw(st.sampled_from(["cut", "replace", "double", "flip", "end"]))
    if how == "end":
        return text[:start]
    if how == "flip":
        return text[:start] + bytes([data.draw(st.integers(0, 255))]) + text[start + 1 :]
    if how == "double":
        return text[:stop] + text[start:]
    return text[:start] + (data.draw(st.binary(max_size=9)) if how == "replace" else b"") + text[stop:]


@CHANCE
@given(data=st.data())
def test_bytes_that_change_by_chance_are_noticed_or_make_no_difference(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*DOCUMENTS, SHARD]))
    files = without_index({**original(), key: spliced(data, original()[key])}, key)
    assert (
        files[key] == original()[key]
        or outcome(Memory(files)) in [whole_run(), without(MIDDLE)]
        or (key in {"run.json", attempt_key(0), attempt_key(1)} and isinstance(outcome(Memory(files)), str))
    )


@CHANCE
@given(data=st.data())
def test_a_forged_document_is_at_worst_another_run(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(DOCUMENTS))
    value = document(original(), key)
    for _ in range(data.draw(st.integers(1, 2))):
        change_something(data, value)
    try:
        text = sealed(value)
    except (ValueError, TypeError):  # a set of what JSON cannot say
        return
    files = without_index({**original(), key: text}, key)
    found = outcome(Memory(files))
    if key == INDEX:  # it is a copy: where it says something else, the manifests are believed
        assert found in [whole_run(), without(MIDDLE)] or calls_or_history(value)
    elif key in {MANIFEST, f"{MIDDLE}/{manifest_name(0, 2)}"}:
        assert found in [whole_run(), without(MIDDLE)]


def calls_or_history(index: Any) -> bool:
    """Whether an index is one, and another one: its facts are checked, and its opinions are not."""
    try:
        return from_json(Index, sealed(index), "").manifests != from_json(Index, original()[INDEX], "").manifests
    except RunError:
        return False


@CHANCE
@given(data=st.data())
def test_a_forged_header_costs_at_most_its_snapshot(data: st.DataObject) -> None:
    def change(table: dict[str, Any]) -> None:
        if data.draw(st.booleans()):
            change_something(data, table)
        else:
            offsets_of(partial(change_something, data))(table)

    try:
        files = with_header(change)
    except (ValueError, TypeError, KeyError):
        return
    found = outcome(Memory(files))
    assert found in [whole_run(), without(MIDDLE)] or found[0] == whole_run()[0]  # bytes that a box elsewhere explains


# The whole way, on a disk: the command line, the reader of DCP, the files of ranks.


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Mapping[str, bytes]], Path]:
    """Puts a run on the disk."""

    def put(files: Mapping[str, bytes]) -> Path:
        for key, data in files.items():
            path = tmp_path / "run" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "run"

    return put


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) in {1, 2}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("phema: ")
    return one_line(line)


@pytest.mark.parametrize(
    "files",
    [
        {**original(), "run.json": pickle.dumps({"format": 1})},
        {**original(), "run.json": DEEP},
        with_value("run.json", ("tensors", "scale", "shape"), [2**45]),
        with_value("run.json", ("tensors", "a\nb\x1b[2J"), {"shape": [1], "dtype": "F32", "kind": "parameter"}),
        {**original(), attempt_key(0): b"\xff"},
        attempts(world_size=2**20),
        attempts(t=0),
    ],
    ids=["pickle", "deep", "terabytes", "lines", "attempt", "world", "hidden"],
)
def test_the_whole_way_ends_in_one_line(
    files: Mapping[str, bytes], folder: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = folder({key: data for key, data in files.items() if "a1/" not in key or "attempts" in str(files)})
    command = ("synthesize", path, "--sigma-rel", "0.15@6", "--out", tmp_path / "out.safetensors")
    said = refusal(capsys, *command)
    assert str(path) in said
    assert not (tmp_path / "out.safetensors").exists()
    state = {"scale": torch.zeros(5)}
    with pytest.raises(CheckpointException) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=SynthesisReader(path, 0.15, 6, partial=True))
    for error, _ in caught.value.failures.values():  # torch compares shapes first
        assert isinstance(error, PhemaError) or "Size mismatch" in str(error)
        one_line(str(error))


def test_a_hostile_snapshot_is_left_out_on_the_whole_way(
    folder: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = folder(with_value(MANIFEST, (*FILE, "name"), "../../../../etc/passwd"))
    assert main(["synthesize", str(path), "--sigma-rel", "0.15", "--out", str(tmp_path / "out.safetensors")]) == 0
    refusal(capsys, "synthesize", path, "--sigma-rel", 0.15, "--strict", "--out", tmp_path / "other.safetensors")
    state = {"scale": torch.zeros(5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=SynthesisReader(path, 0.15, partial=True))
    assert state["scale"].tolist() == without(MIDDLE)[1][1]["scale"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What synthesize --sharded leaves on one rank."""
    folder = tmp_path_factory.mktemp("shards")
    assert main(["synthesize", str(RUN), "--sigma-rel", "0.15", "--sharded", "--out", str(folder)]) == 0
    return folder


def facts_of(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """A change of what the metadata say of the checkpoint."""

    def apply(table: dict[str, Any]) -> None:
        facts = json.loads(table["__metadata__"]["phema_dist"])
        change(facts)
        table["__metadata__"]["phema_dist"] = json.dumps(facts)

    return apply


def shard(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return facts_of(lambda facts: change(facts["shard"]))


JOINED: dict[str, Any] = {
    **{f"a shape with {number!r}": shard(lambda s, n=number: s["shapes"].update(gain=[n])) for number in NUMBERS},
    **{f"a box with {number!r}": change("scale", shape=[number]) for number in NUMBERS},
    **{f"offsets at {number!r}": offsets_of(lambda o, n=number: o["scale"].update(saved_offsets=[n]))
       for number in NUMBERS},
    **{f"data at {number!r}": change("scale", data_offsets=[number, 20]) for number in NUMBERS},
    **{f"rank {number!r}": shard(lambda s, n=number: s.update(rank=n)) for number in NUMBERS if number is not True},
    "an offset too many": offsets_of(lambda o: o["gain"].update(saved_offsets=[0])),
    "deep": b"[" * 100_000,
    "deep metadata": lambda t: t["__metadata__"].update(phema_dist=DEEP.decode()),
    "NaN": lambda t: t["__metadata__"].update(phema_dist='{"t":NaN}'),
    "pickle": pickle.dumps({}),
    "no metadata": lambda t: t.pop("__metadata__"),
    "metadata that are a list": lambda t: t.update(__metadata__=[1]),
    "facts that are a list": lambda t: t["__metadata__"].update(phema_dist="[1]"),
    "no certificate": facts_of(lambda facts: facts.pop("certificate")),
    "a certificate of words": facts_of(lambda facts: facts["certificate"].update(profile_error="x\ny")),
    "a target with lines": facts_of(lambda facts: facts.update(target="a\nb")),
    "a t of words": facts_of(lambda facts: facts.update(t="a\nb")),
    "an odd dtype": change("scale", dtype="F4"),
    "a dtype that is a list": change("scale", dtype=["F32"]),
    "a tensor too many": lambda t: t.update({"a\nb": t["scale"]}),
    "a tensor that is missing": lambda t: t.pop("scale"),
    "overlapping data": lambda t: t["scale"].update(data_offsets=t["gain"]["data_offsets"]),
    "tied without end": shard(lambda s: s["tied"].update(scale=["scale"] * 1000)),
    "tied to nothing": shard(lambda s: s["tied"].update(scale=["ghost"])),
    "tied to numbers": shard(lambda s: s["tied"].update(scale=[1])),
    "tied to lines": shard(lambda s: s["tied"].update(scale=["a\nb"])),
    "shapes of a list": shard(lambda s: s.update(shapes=[1])),
    "no shapes": shard(lambda s: s.update(shapes={})),
}  # fmt: skip


@pytest.mark.parametrize("change", JOINED.values(), ids=JOINED)
def test_shards_that_cannot_be_are_not_joined(
    change: Any, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (original_path,) = shards.iterdir()
    data = original_path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    text = change
    if not isinstance(change, bytes):
        table = json.loads(data[8 : 8 + size])
        change(table)
        text = json.dumps(table).encode()
    path = tmp_path / "shards" / original_path.name
    path.parent.mkdir()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    said = refusal(capsys, "consolidate", path.parent, "--out", tmp_path / "out.safetensors")
    assert str(path) in said or str(path.parent) in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["shards"]


@CHANCE
@given(data=st.data())
def test_forged_shards_are_joined_or_refused(
    data: st.DataObject, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (original_path,) = shards.iterdir()
    content = original_path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    table = json.loads(content[8 : 8 + size])
    how = data.draw(st.sampled_from([lambda change: change, offsets_of, facts_of, shard]))
    try:
        how(partial(change_something, data))(table)
        text = json.dumps(table).encode()
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    if data.draw(st.booleans()):
        text = spliced(data, text)
    folder = tmp_path_factory.mktemp("forged")
    (folder / original_path.name).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    try:
        open_shards(folder)
    except PhemaError as error:
        one_line(str(error))
    shutil.rmtree(folder)


# How much memory and time the worst of them take: of the largest documents that are read at all.

WORST = """
import sys, time
from pathlib import Path
from phema_dist.errors import PhemaError
from phema_dist.storage import completeness, run

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))

class Store:
    url, read_concurrency = "bucket", 1
    def __init__(self, files): self.files = files
    def describe(self, key=""): return f"bucket/{key}"
    def list(self, prefix=""): return {key: len(data) for key, data in self.files.items()}
    def get_many(self, keys, absent_ok=False): return {key: self.files[key] for key in keys}

top, kind = Path(sys.argv[1]), sys.argv[2]
files = {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
key, size = {"run": ("run.json", run._LARGEST_INFO),
             "manifest": (sys.argv[3], completeness.LARGEST_MANIFEST),
             "index": (sys.argv[4], completeness.LARGEST_INDEX)}[kind]
part = sys.argv[5].encode()
files[key] = b'{"a":[' + part * ((size - 20) // len(part)) + b"0]}"
if kind == "manifest":
    del files[sys.argv[4]]
before, begin = resident("VmRSS:"), time.monotonic()
try:
    opened = run.open_run(Store(files))
    said = "; ".join(s.problem for s in opened.snapshots if s.problem)
except PhemaError as error:
    said = str(error)
print(round(time.monotonic() - begin, 2), resident("VmHWM:") - before, size >> 20, said)
"""


@pytest.mark.parametrize(
    ("kind", "part"), [("run", '{"a":"bcdefghi"},'), ("manifest", '"ab",'), ("manifest", "{},"), ("index", "[],")]
)
def test_the_worst_documents_take_a_bounded_multiple_of_their_size(kind: str, part: str) -> None:
    command = [sys.executable, "-c", WORST, RUN, kind, MANIFEST, INDEX, part]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=6 * SECONDS)
    seconds, used, size, said = done.stdout.rstrip("\n").split(" ", 3)
    assert int(used) < 20 * int(size) + 50, done.stdout  # MiB
    assert float(seconds) < SECONDS
    assert kind == "index" or one_line(said).startswith("bucket/")


# Credentials: in no message, log, document or repr.

KEY, SECRET, TOKEN, PASSWORD = "AKIAHUSHHUSHHUSH", "HushHush/secret+1", "HushHushToken", "HushHushPassword"
HUSH = re.compile(rf"(?i)hush|{re.escape(READER.key)}|{re.escape(READER.secret)}|{re.escape(ADMIN.secret)}")
HOPELESS: list[Any] = [
    ("s3://bucket/run", {"key": KEY, "secret": SECRET, "token": TOKEN}),
    ("s3://bucket/run", {"client_kwargs": {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}}),
    (f"https://user:{PASSWORD}@127.0.0.1:9/run", {}),
    (f"nonsense://user:{PASSWORD}@bucket/run", {"password": PASSWORD}),
    (f"s3://{KEY}:{PASSWORD}@bucket/run", {}),
    (f"s3://{KEY}:{SECRET}@bucket/run", {}),
    (f"simplecache::s3://{KEY}:{PASSWORD}@bucket/run", {}),
]


def messages_of(step: Callable[[], object]) -> list[str]:
    """What an error of ours says, and a repr of it; what its causes say is the client's."""
    try:
        step()
    except PhemaError as error:
        return [one_line(str(error)), repr(error)]
    pytest.fail("it must not work")


@pytest.mark.parametrize(("url", "options"), HOPELESS)
def test_credentials_show_in_no_message_log_or_repr(
    url: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "phema_dist")
    options = options | ({"endpoint_url": "http://127.0.0.1:9"} if url.startswith("s3") else {})
    said: list[str] = []
    try:
        store = open_store(url, options, deadline_seconds=0.5)
    except PhemaError as error:
        said += [one_line(str(error)), repr(error)]
    else:
        said += [store.url, store.describe("key"), repr(store)]
        said += messages_of(lambda: store.put("key", b"x")) + messages_of(lambda: store.get("key"))
    said += [record.getMessage() for record in caplog.records if record.name.startswith("phema_dist")]
    assert not [text for text in said if HUSH.search(text)]


@pytest.mark.s3
def test_credentials_stand_in_nothing_that_is_written(
    s3_server: S3Server, s3_url: Target, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "phema_dist")
    url, options = s3_url
    model = nn.Linear(2, 2)
    with PostHocEMA.from_model(model, url, update_every=1, checkpoint_every=1, storage_options=options) as ema:
        ema.update_()
        said = [repr(ema), str(ema), repr(vars(ema).keys())]
    read = PostHocEMA.from_path(url, storage_options=options)
    said += [repr(read), repr(open_run(open_store(url, options)).store)]
    store = open_store(url, options)
    keys = store.list()
    assert any(key.endswith("rank-00000-of-00001.json") for key in keys)
    written = store.get_many(keys)
    for option in ({"key": READER.key, "secret": READER.secret}, {"key": ADMIN.key, "secret": SECRET}):
        refused = partial(PostHocEMA.from_model, model, f"{url}-2", storage_options={**options, **option})
        said += messages_of(refused)
        assert main(["ls", url, "--storage-options", json.dumps({**options, **option})]) in {0, 1}
    said += [*keys, *map(repr, written.values()), capsys.readouterr().err]
    said += [record.getMessage() for record in caplog.records if record.name.startswith("phema_dist")]
    assert not [text for text in said if HUSH.search(text)]
