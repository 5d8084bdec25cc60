"""Documents survive the way to storage and back, and nothing else passes for one."""

import json
from unittest.mock import ANY

import pytest
import xxhash
from big_run import unsealed

from phema_dist.errors import RunError
from phema_dist.storage import manifest, snapshot
from phema_dist.storage.manifest import Attempt, Index, Manifest, RunInfo, ShardFile, TensorFacts, from_json, to_json

FILE = ShardFile("sigma_rel-0.05/rank-00003.safetensors", 0.05, 128, 4096, ("0011", "2233"))
MANIFEST = Manifest(1, 1000, 0, "abc", 3, 8, 1000, ((900, 90), (1000, 1)), "F32", 4 << 20, (FILE,), None)
RUN = RunInfo(
    1, "0.1.0", (0.05, 0.28), "steps", 0, only_save_diff=False,
    tensors={"w": TensorFacts((2, 3), "F32", "parameter")}, aliases={"v": "w"},
)  # fmt: skip


DOCUMENTS = [MANIFEST, RUN, Attempt(1, 0, 500, 8, "abc"), Attempt(0, None, 0, 1, "def"), Index(1, (MANIFEST, MANIFEST))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_come_back_equal(document: object) -> None:
    assert from_json(type(document), to_json(document), "there") == document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_begins_with_the_checksum_of_the_rest(document: object) -> None:
    text = to_json(document)
    rest = unsealed(text)
    assert text == b'{"xxh3":"%s",' % xxhash.xxh3_64_hexdigest(rest).encode() + rest[1:]
    assert json.loads(rest) == {key: value for key, value in json.loads(text).items() if key != "xxh3"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_of_before_there_were_checksums_is_read(document: object) -> None:
    assert from_json(type(document), unsealed(to_json(document)), "there") == document
    spaced = json.dumps(json.loads(unsealed(to_json(document))), indent=1).encode()
    assert from_json(type(document), spaced, "there") == document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_byte_of_a_document_can_change(document: object) -> None:
    text = to_json(document)
    for position in range(len(text)):
        for bit in range(8):
            flipped = bytearray(text)
            flipped[position] ^= 1 << bit
            with pytest.raises(RunError, match="there"):
                from_json(type(document), bytes(flipped), "there")


def test_a_checksum_that_differs_is_told_but_a_newer_format_first() -> None:
    text = to_json(RUN)
    with pytest.raises(RunError, match=r"there is not the document that was written \(its checksum differs\)"):
        from_json(RunInfo, text.replace(b'"origin":0', b'"origin":1'), "there")
    with pytest.raises(RunError, match="its checksum differs"):
        from_json(RunInfo, json.dumps(json.loads(text)).encode(), "there")  # of the bytes, not of what they mean
    with pytest.raises(RunError, match="there has format 2"):
        from_json(RunInfo, text.replace(b'"format":1', b'"format":2'), "there")


def test_names_of_dtypes_are_those_that_snapshots_know() -> None:
    assert set(manifest.DTYPES) == snapshot.DTYPES.keys()
    assert set(manifest.AVERAGED_DTYPES) == {snapshot.DTYPE_NAMES[dtype] for dtype in snapshot.AVERAGE_DTYPES}
    assert set(manifest.STORED_DTYPES) == snapshot.HALF_ULP.keys()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b'"kind":"parameter"',
            b'"kind":"paramdter"',
            r"tensors\[w\]\.kind must be one of parameter, buffer, found 'par",
        ),
        (b'"dtype":"F32"', b'"dtype":"F31"', r"tensors\[w\]\.dtype must be one of F64, F32, .*, found 'F31'"),
        (b"[0.05,0.28]", b"[]", "sigma_rels must not be empty"),
    ],
)
def test_a_value_that_cannot_be_is_named_also_without_a_checksum(old: bytes, new: bytes, message: str) -> None:
    text = unsealed(to_json(RUN))
    assert old in text
    with pytest.raises(RunError, match=message):
        from_json(RunInfo, text.replace(old, new), "there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"there has format 2; this phema-dist reads formats up to 1\. Upgrade phema-dist"),
        ({"rank": -1}, "rank must not be negative, found -1"),
        ({"rank": "3"}, "rank must be int, found '3'"),
        ({"rank": True}, "rank must be int, found 'True'"),
        ({"rank": 3.5}, "rank must be int"),
        ({"files": {}}, "files must be a list"),
        ({"files": [1]}, r"files\[0\] must have exactly the fields of ShardFile"),
        ({"updates": [[1, 2, 3]]}, r"updates\[0\] must be a list like"),
        ({"surprise": 1}, "surprise"),
        ({"world_size": 0}, "world_size must be 1 to 1048576, found '0'"),
        ({"block_bytes": 0}, r"block_bytes must be a power of two from 16 to 2\*\*26, found '0'"),
        ({"dtype": "F31"}, "dtype must be one of F64, F32, F16, BF16, found 'F31'"),
        ({"dtype": "I32"}, "dtype must be one of F64, F32, F16, BF16, found 'I32'"),
    ],
)
def test_a_field_that_is_not_what_it_must_be_is_named(change: dict[str, object], message: str) -> None:
    text = json.dumps({**json.loads(unsealed(to_json(MANIFEST))), **change}).encode()
    with pytest.raises(RunError, match=message):
        from_json(Manifest, text, "there")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\x80\x04K\x01."])
def test_what_is_no_document_is_refused(text: bytes) -> None:
    with pytest.raises(RunError, match="there"):
        from_json(Manifest, text, "there")


def test_a_missing_field_is_named() -> None:
    facts = json.loads(unsealed(to_json(MANIFEST)))
    del facts["token"]
    with pytest.raises(RunError, match=r"differs in \['token'\]"):
        from_json(Manifest, json.dumps(facts).encode(), "there")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), 1, r"there is not a Index of format 1: it must have exactly the fields of Index; differs in no object"),
        (("manifests",), None, "1: manifests must be a list like "),
        (("manifests", 1), [], r"1: manifests\[1\] must have exactly the fields of Manifest; differs in no object"),
        (("manifests", 1, "calls"), None, r"1: manifests\[1\]\.calls must be int, found 'None'"),
        (("manifests", 0, "dtype"), 32, r"1: manifests\[0\]\.dtype must be str, found '32'"),
        (("manifests", 1, "updates", 0), [1], r"1: manifests\[1\]\.updates\[0\] must be a list like"),
        (("manifests", 1, "updates", 1, 0), -4, r"1: manifests\[1\]\.updates\[1\]\[0\] must not be negative, found -4"),
        (("manifests", 0, "files", 0, "name"), 1, r"1: manifests\[0\]\.files\[0\]\.name must be str"),
        (("manifests", 0, "files", 0, "checksums", 1), 1, r"1: manifests\[0\]\.files\[0\]\.checksums\[1\] must be str"),
        (("manifests", 0, "files", 0, "sigma_rel"), 10**400, r"files\[0\]\.sigma_rel must be float, found '1000"),
        (("manifests", 0, "files", 0, "sigma_rel"), True, r"files\[0\]\.sigma_rel must be float, found 'True'"),
    ],
)
def test_what_is_wrong_deep_inside_is_named_by_its_path(
    path: tuple[str | int, ...], value: object, message: str
) -> None:
    document = [json.loads(unsealed(to_json(Index(1, (MANIFEST, MANIFEST)))))]
    inside, last = document, 0
    for step in path:
        inside, last = inside[last], step  # type: ignore[index]
    inside[last] = value  # type: ignore[index]
    with pytest.raises(RunError, match=message):
        from_json(Index, json.dumps(document[0]).encode(), "there")


def test_numbers_may_be_written_without_a_fraction() -> None:
    text = unsealed(to_json(RUN)).replace(b"0.05", b"1")
    assert from_json(RunInfo, text, "there").sigma_rels == (1.0, 0.28)
    assert type(from_json(RunInfo, text, "there").sigma_rels[0]) is float


def test_an_entry_of_a_table_is_named() -> None:
    text = unsealed(to_json(RUN)).replace(b'"kind":"parameter"', b'"kind":null')
    with pytest.raises(RunError, match=r"tensors\[w\]\.kind must be str, found 'None'"):
        from_json(RunInfo, text, "there")


def test_a_field_that_older_writers_did_not_know_may_be_absent_and_no_other() -> None:
    written = json.loads(to_json(MANIFEST))
    assert (written.pop("measured"), written.pop("xxh3")) == (None, ANY)
    assert from_json(Manifest, json.dumps(written).encode(), "here") == MANIFEST
    with pytest.raises(RunError, match=r"differs in .*'calls'"):
        from_json(Manifest, json.dumps({k: v for k, v in written.items() if k != "calls"}).encode(), "here")
    with pytest.raises(RunError, match=r"differs in .*'later'"):
        from_json(Manifest, json.dumps({**written, "later": 1}).encode(), "here")
